"""Checkpoint folders from a hostile hand: a typed error or the very state, and nothing else.

`pytest --fuzz 2000` tries as many folders; the default is a fast share of them.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.backends.snapshot import snapshot_of
from runner.backends.state import TrainState
from runner.record import manifest as manifests
from runner.record.errors import RunnerError
from runner.record.manifest import MANIFEST, folder_name, step_of
from runner.record.storage import LocalStorage
from runner.train.checkpoint import Label, load, save

STEP = 3
STATE = TrainState(
    {"w": torch.arange(6.0).view(2, 3)},
    {"mean": torch.ones(2)},
    {"w/step": torch.tensor(3.0)},
    step=STEP,
)
FILES = (MANIFEST, "model-00000.safetensors", "optimizer-00000.safetensors")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["../../escape", "/etc/passwd", "manifest.json", "params/w", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--fuzz")
    return count


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good")
    save(LocalStorage(folder), snapshot_of(STATE), label=Label({"w": "params/w"}, {}))
    return folder / folder_name(STEP)


def change_bytes(data: st.DataObject, path: pathlib.Path) -> None:
    """Flip, cut, lengthen, overwrite or remove a file."""
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add", "replace", "remove", "folder"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "add":
        content += data.draw(st.binary(min_size=1, max_size=50))
    elif kind == "replace":
        content = bytearray(data.draw(st.binary(max_size=200)))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "remove":
        path.write_bytes(content)


def change_manifest(data: st.DataObject, path: pathlib.Path) -> None:
    """Put any JSON anywhere into the manifest, and seal it as its writer would."""
    body = json.loads(path.read_bytes())["body"]
    node: Any = body
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inside = node[key]
        if isinstance(inside, (dict, list)) and inside and data.draw(st.booleans()):
            node = inside
            continue
        if isinstance(node, dict) and data.draw(st.integers(0, 9)) == 0:
            del node[key]
        else:
            node[key] = data.draw(JSON)
        break
    path.write_bytes(manifests.seal(body))


def seal_again(folder: pathlib.Path) -> None:
    """Make the manifest agree with whatever the files now are."""
    from runner.record.storage import hash_file

    body = json.loads((folder / MANIFEST).read_bytes())["body"]
    for name in body["files"]:
        entry = hash_file(folder / name)
        body["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (folder / MANIFEST).write_bytes(manifests.seal(body))


def is_whole(found: dict[str, torch.Tensor]) -> bool:
    wanted = {f"{g}/{n}": t for g, named in STATE.groups().items() for n, t in named.items()}
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def test_no_folder_gives_anything_but_the_state_or_a_typed_error(
    good: pathlib.Path, cases: int
) -> None:
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            root = pathlib.Path(temporary)
            room = root / "room"
            shutil.copytree(good, room / folder_name(STEP))
            folder = room / folder_name(STEP)
            kind = data.draw(st.sampled_from(["bytes", "manifest", "sealed"]))
            if kind == "manifest":
                change_manifest(data, folder / MANIFEST)
            else:
                change_bytes(data, folder / data.draw(st.sampled_from(FILES)))
            if kind == "sealed":
                try:
                    seal_again(folder)
                except (OSError, ValueError, KeyError, TypeError):
                    return
            try:
                _, tensors = load(LocalStorage(room), folder_name(STEP))
            except RunnerError:
                pass
            else:
                assert kind != "bytes" or is_whole(tensors)
            assert [path.name for path in root.iterdir()] == ["room"]

    one()


def test_no_name_is_taken_for_a_checkpoint_that_was_not_written_as_one(cases: int) -> None:
    @settings(max_examples=cases, deadline=None, database=None, derandomize=True)
    @given(st.text(max_size=30) | st.from_regex(r"step-[0-9]{1,20}", fullmatch=True))
    def one(name: str) -> None:
        step = step_of(name)
        assert step is None or folder_name(step) == name

    one()
