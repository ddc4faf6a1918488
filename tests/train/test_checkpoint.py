"""The checkpoint room: what is saved comes back, and what was changed is noticed."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch
from torch import Tensor

from runner.backends.snapshot import HostPiece, HostTensor, Snapshot, snapshot_of
from runner.backends.state import TrainState, state_dict_names
from runner.record import manifest as manifests
from runner.record.checkpoints import open_storage
from runner.record.errors import CheckpointError, ConfigError
from runner.record.manifest import FileEntry, Manifest, Piece, TensorEntry, folder_name, step_of
from runner.record.storage import LocalStorage, Storage
from runner.train import tensorfile
from runner.train.checkpoint import DamagedError, Label, load, save

LABEL = Label({"fc.weight": "params/fc.weight"}, {"job": "test"})
TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def state(step: int = 7) -> TrainState:
    params = {"fc.weight": torch.arange(24.0).view(6, 4), "odd #1/name": torch.ones(3)}
    buffers = {str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype).t() for dtype in TYPES} | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
    }
    return TrainState(params, buffers, {"fc.weight/step": torch.tensor(7.0)}, step=step)


def named(train_state: TrainState) -> dict[str, Tensor]:
    groups = train_state.groups().items()
    return {f"{group}/{name}": t for group, tensors in groups for name, t in tensors.items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    same = (f.dtype == w.dtype and torch.equal(f, w) for f, w in zip_by_name(found, wanted))
    return found.keys() == wanted.keys() and all(same)


def zip_by_name(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((a[name], b[name]) for name in a)


@pytest.fixture(params=["local", "memory://", "local://"])
def storage(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Storage:
    if request.param == "memory://":
        return open_storage(f"memory://{uuid.uuid4().hex}/runs/1")
    prefix = "" if request.param == "local" else request.param
    return open_storage(f"{prefix}{tmp_path}/a room/checkpoints")


def test_every_type_and_shape_comes_back(storage: Storage) -> None:
    assert storage.steps() == []
    saved = save(storage, snapshot_of(state()), label=LABEL)
    assert saved.name == "step-00000007"
    assert storage.steps() == [7]
    manifest, tensors = load(storage, saved.name)
    assert equal(tensors, named(state()))
    assert (manifest.step, manifest.state_dict) == (7, LABEL.state_dict)
    assert saved.bytes == sum(entry.bytes for entry in manifest.files.values())


@pytest.mark.parametrize("file_bytes", [1, 40, 10_000])
def test_large_tensors_are_split_over_files(storage: Storage, file_bytes: int) -> None:
    save(storage, snapshot_of(state()), label=LABEL, file_bytes=file_bytes)
    manifest, tensors = load(storage, folder_name(7))
    assert equal(tensors, named(state()))
    pieces = manifest.tensors["params/fc.weight"].pieces
    assert len(pieces) == {1: 6, 40: 3, 10_000: 1}[file_bytes]
    assert len({piece.file for piece in pieces}) == len(pieces)


def test_weights_are_read_without_the_rest(tmp_path: pathlib.Path) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, snapshot_of(state()), label=LABEL)
    (tmp_path / folder_name(7) / "optimizer-00000.safetensors").unlink()
    _, tensors = load(storage, folder_name(7), groups=("params", "buffers"))
    assert "params/fc.weight" in tensors
    with pytest.raises(DamagedError, match=r"optimizer-00000\.safetensors is missing"):
        load(storage, folder_name(7))


def test_a_sharded_state_comes_back_whole(storage: Storage) -> None:
    whole = torch.arange(60.0).view(6, 10)
    boxes = itertools.product((0, 4), (0, 5))
    pieces = tuple(
        HostPiece((row, column), whole[row : row + 4 if row == 0 else 6, column : column + 5])
        for row, column in boxes
    )
    snapshot = Snapshot(3, {"params/w": HostTensor((6, 10), pieces)})
    save(storage, snapshot, label=Label({}, {}), file_bytes=50)
    assert equal(load(storage, folder_name(3))[1], {"params/w": whole})


def test_other_tools_read_the_files(tmp_path: pathlib.Path) -> None:
    save(LocalStorage(tmp_path), snapshot_of(state()), label=LABEL)
    file = tmp_path / folder_name(7) / "model-00000.safetensors"
    read = safetensors.torch.load_file(file)
    weights = {name: t for name, t in named(state()).items() if not name.startswith("optimizer")}
    assert equal(read, weights)


def test_a_type_that_the_format_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"params/q must have a type.*got complex128"):
        list(tensorfile.parts({"params/q": torch.zeros(2, dtype=torch.complex128)}))


def test_saving_a_step_again_replaces_it(storage: Storage) -> None:
    for value in (1.0, 2.0):
        other = TrainState({"w": torch.tensor(value)}, {}, {}, step=1)
        save(storage, snapshot_of(other), label=Label({}, {}))
    assert load(storage, folder_name(1))[1]["params/w"] == 2.0


def test_what_was_cut_short_is_no_checkpoint_and_is_cleaned_up(storage: Storage) -> None:
    save(storage, snapshot_of(state(1)), label=LABEL)
    folder = storage.begin(folder_name(2))
    storage.write(folder, "model-00000.safetensors", [memoryview(b"half")])
    assert storage.steps() == [1]
    storage.clean()
    assert storage.names() == [folder_name(1)]
    save(storage, snapshot_of(state(2)), label=LABEL)
    assert storage.steps() == [2, 1]


def test_a_checkpoint_set_aside_is_kept_and_never_used(storage: Storage) -> None:
    for _ in range(2):
        save(storage, snapshot_of(state(4)), label=LABEL)
        storage.set_aside(folder_name(4), "corrupt")
    assert storage.steps() == []
    assert sorted(storage.names()) == ["corrupt-step-00000004", "corrupt-step-00000004.2"]
    storage.remove("corrupt-step-00000004.2")
    assert storage.names() == ["corrupt-step-00000004"]


def _cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _empty(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def _lengthen(path: pathlib.Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


DAMAGES: list[Callable[[pathlib.Path], None]] = [_cut, _flip, _empty, pathlib.Path.unlink]


@pytest.mark.parametrize("damage", [*DAMAGES, _lengthen], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", ["model-00000.safetensors", "optimizer-00000.safetensors"])
def test_a_damaged_file_is_noticed(
    tmp_path: pathlib.Path, file: str, damage: Callable[[pathlib.Path], None]
) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, snapshot_of(state()), label=LABEL)
    damage(tmp_path / folder_name(7) / file)
    with pytest.raises(DamagedError, match=file):
        load(storage, folder_name(7))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_manifest_is_noticed(
    tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None]
) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, snapshot_of(state()), label=LABEL)
    damage(tmp_path / folder_name(7) / "manifest.json")
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        load(storage, folder_name(7))


def test_any_changed_byte_of_a_manifest_is_noticed_or_means_nothing(
    tmp_path: pathlib.Path,
) -> None:
    storage = LocalStorage(tmp_path)
    save(
        storage, snapshot_of(TrainState({"w": torch.ones(2)}, {}, {}, step=1)), label=Label({}, {})
    )
    path = tmp_path / folder_name(1) / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 8, 64):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            try:
                manifest, _ = load(storage, folder_name(1))
            except CheckpointError:
                continue
            assert manifest == manifests.decode(whole)


def test_a_folder_that_was_renamed_is_noticed(tmp_path: pathlib.Path) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, snapshot_of(state(7)), label=LABEL)
    (tmp_path / folder_name(7)).rename(tmp_path / folder_name(9))
    with pytest.raises(DamagedError, match="is of step 7"):
        load(storage, folder_name(9))


def _sealed(**changes: object) -> bytes:
    entry = TensorEntry("float32", (4,), (Piece("a.safetensors", "w", (0,), (4,)),))
    plain = Manifest(1, {"a.safetensors": FileEntry(1, "0")}, {"params/w": entry}, {}, {})
    body = json.loads(plain.encode())["body"]
    body.update(changes)
    return manifests.seal(body)


def _tensor(*pieces: tuple[int, int], file: str = "a.safetensors") -> dict[str, object]:
    boxes = [{"file": file, "key": "w", "offset": [o], "shape": [n]} for o, n in pieces]
    return {"params/w": {"dtype": "float32", "shape": [4], "pieces": boxes}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema 1"),
        ({"step": -1}, "cannot be read"),
        ({"step": True}, "cannot be read"),
        ({"files": {"../escape": {"bytes": 1, "sha256": "0"}}}, "plain name"),
        ({"files": {"manifest.json": {"bytes": 1, "sha256": "0"}}}, "plain name"),
        ({"files": []}, "cannot be read"),
        ({"tensors": _tensor((0, 4), file="b.safetensors")}, "not listed"),
        ({"tensors": _tensor((0, 3))}, "cover it exactly once"),
        ({"tensors": _tensor((0, 3), (2, 1))}, "cover it exactly once"),
        ({"tensors": _tensor((1, 4))}, "cover it exactly once"),
        ({"tensors": _tensor()}, "cover it exactly once"),
        ({"state_dict": {"w": "params/v"}}, "not there"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: dict[str, object], said: str) -> None:
    assert manifests.decode(_sealed()).step == 1
    with pytest.raises(CheckpointError, match=said):
        manifests.decode(_sealed(**changes))


def test_only_whole_names_are_checkpoints() -> None:
    assert step_of("step-00000100") == 100
    assert step_of("step-123456789012") == 123456789012
    for name in ("step-100", "step-000000100", ".writing-step-00000100", "corrupt-step-00000100"):
        assert step_of(name) is None


def test_a_url_that_nothing_serves_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.root.*nosuch"):
        open_storage("nosuch://bucket/folder")


def test_state_dict_names_know_tied_weights_and_leave_out_what_is_not_saved() -> None:
    module = torch.nn.Module()
    module.embed, module.head = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 3, bias=False)
    module.head.weight = module.embed.weight
    module.register_buffer("mean", torch.zeros(2))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert state_dict_names(module) == {
        "mean": "buffers/mean",
        "embed.weight": "params/embed.weight",
        "head.weight": "params/embed.weight",
    }
