"""What may change when a run goes on, and what its own file says of it."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from runner.config.changes import check_unchanged, differences
from runner.config.stored import changed_config, read_config
from runner.record.errors import ConfigError
from tests.batch.runs import config

FILE = """
job: {name: mlp, entry: "jobs.mlp:MLP", batch_size: 8}
data: {name: digits, entry: "jobs.images:digits", options: {}}
backend: {name: eager}
optim: {name: SGD, lr: 0.1}
schedule: {name: constant, final_fraction: 1.0}
hardware: {name: cpu}
steps: 6
model: {width: 16, depth: 1, dropout: 0.0}
"""
TRUSTED = frozenset({"jobs"})


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


def test_what_changes_no_number_may_change(tmp_path: pathlib.Path) -> None:
    old = config()
    checkpoint = dataclasses.replace(old.checkpoint, every_s=1.0)
    new = dataclasses.replace(old, steps=99, log_every=7, checkpoint=checkpoint)
    assert set(differences(old, new)) == {"steps", "log_every", "checkpoint.every_s"}
    check_unchanged(old, new, folder=tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("optim__lr", 0.5), ("model__step_s", 1.0), ("checkpoint__root", "/elsewhere")],
)
def test_what_changes_the_run_is_refused_and_shown(
    tmp_path: pathlib.Path, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')}: .* -> {value!r}"):
        check_unchanged(config(), config(**{key: value}), folder=tmp_path)


def test_a_file_of_an_earlier_version_takes_the_defaults_for_what_it_lacks(
    file: pathlib.Path,
) -> None:
    assert read_config(file).checkpoint.keep == 2
    changed, text = changed_config(file, ["checkpoint.keep=4", "steps=9"], trusted=TRUSTED)
    assert (changed.checkpoint.keep, changed.steps) == (4, 9)
    assert "keep: 4" in text


def test_a_file_is_read_where_a_sink_that_it_names_is_not_installed(
    file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    file.write_text(FILE + "sinks: {mlflow: true, wandb: true}")
    assert read_config(file).sinks.wandb


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stepz=3", "stepz is not a key"),
        ("model.width=wide", "whole number"),
        ("+model.more=1", "takes key=value"),
        ("~model.width", "takes key=value"),
        ("steps", "cannot be read as key=value"),
        ("job.entry=os:system", "not trusted"),
        ("checkpoint.keep=1", "checkpoint.keep must be >= 2"),
    ],
)
def test_a_wrong_override_is_refused(file: pathlib.Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changed_config(file, [override], trusted=TRUSTED)


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "steps: !!python/object/apply:os.system [id]", "{", "a: ${nowhere}", "\x00"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: pathlib.Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_config(path)
