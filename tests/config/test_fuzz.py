"""Overrides and YAML from a hostile hand: a valid configuration or a typed error, nothing else.

`pytest --fuzz 2000` tries as many of each; the default is a fast share of them.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.schema import Config
from runner.config.stored import read_config
from runner.config.typed import known_keys
from runner.record.errors import RunnerError

KEYS = (*known_keys(Config), "model.width", "optim.options.momentum", "hydra.run.dir", "hydra")
HOSTILE = (
    "os:system",
    "{_target_: os.system, command: touch escaped}",
    "${oc.env:HOME}",
    "${oc.decode:x}",
    "${now:%Y}",
    "../../escaped",
    "!!python/object/apply:os.system ['touch escaped']",
    "ext://os.system",
    "1e999",
    "null",
    "[1, [2, {a: b}]]",
    "'",
    "${",
)
VALUES = (
    st.sampled_from(HOSTILE)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.booleans().map(str)
    | st.text(max_size=15)
)
KEY = st.sampled_from(KEYS) | st.text(max_size=12)
OVERRIDE = st.builds(
    lambda sign, key, value: f"{sign}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    KEY,
    VALUES,
) | st.text(max_size=30)


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--fuzz")
    return count


@pytest.fixture
def empty(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The working folder, in which nothing may appear."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if "escaped" in path.name] == []


def tried(cases: int, strategy: st.SearchStrategy[Any], one: Callable[[Any], object]) -> None:
    """Call `one` with as many values; it may raise a typed error."""

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def case(value: Any) -> None:
        with contextlib.suppress(RunnerError):
            one(value)

    case()


def test_overrides_give_a_configuration_or_a_typed_error(empty: pathlib.Path, cases: int) -> None:
    composer = Composer(conf_folder(), extra=None, trusted=frozenset({"jobs"}))
    lines = st.lists(OVERRIDE, min_size=1, max_size=3)
    tried(cases, lines, lambda overrides: composer.config(["job=mlp", *overrides]))


def test_a_stored_file_gives_a_configuration_or_a_typed_error(
    empty: pathlib.Path, cases: int, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "config.yaml"
    line = st.builds(lambda key, value: f"{key}: {value}\n", KEY, VALUES)
    content = st.lists(line, max_size=6).map("".join) | st.text(max_size=60)

    def read(text: str) -> Config:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return read_config(path)

    tried(cases, content, read)
