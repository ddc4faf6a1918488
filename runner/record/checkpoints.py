"""Finding checkpoints: a run's own, and those that a configuration points at."""

from __future__ import annotations

import dataclasses
import pathlib

from runner.record.errors import CheckpointError, ConfigError
from runner.record.files import write_atomic
from runner.record.manifest import MANIFEST, step_of
from runner.record.rundir import RunDir
from runner.record.storage import LocalStorage, Storage

_ELSEWHERE = "elsewhere.txt"


@dataclasses.dataclass(frozen=True)
class Source:
    """Checkpoints to start from.

    Attributes:
        storage: Where they are.
        name: The one that was asked for, or None for the newest.
    """

    storage: Storage
    name: str | None


def location(run_dir: RunDir, root: str | None) -> str:
    """Where a run's checkpoints are kept: in its folder, or under `checkpoint.root`."""
    if root is None:
        return str(run_dir.checkpoints)
    path = run_dir.path.absolute()
    return f"{root.rstrip('/')}/{path.parent.name}/{path.name}"


def open_storage(place: str) -> Storage:
    """The storage at a local folder or a URL.

    Raises:
        ConfigError: No installed package serves such URLs.
    """
    if "://" not in place:
        return LocalStorage(pathlib.Path(place))
    from runner.record.cloud import CloudStorage  # brings fsspec, which most runs do not need

    return CloudStorage(place)


def share(place: str) -> None:
    """Make the folder at a place, as `check_shared` wants to see it from other machines."""
    if "://" not in place:
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)


def check_shared(place: str, *, among: str) -> None:
    """See that a folder of checkpoints which another machine has made is here, too.

    Args:
        place: As `location` gives it.
        among: Which machines share it, for the error.

    Raises:
        CheckpointError: It is not here.
    """
    if "://" not in place and not pathlib.Path(place).is_dir():
        raise CheckpointError(
            f"checkpoint.root must be storage that all {among} share, a bucket's URL or a folder "
            f"on a network file system: this one does not see {place}"
        )


def note_location(run_dir: RunDir, place: str) -> None:
    """Leave word in the run folder if its checkpoints are kept elsewhere."""
    if place != str(run_dir.checkpoints):
        run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir.checkpoints / _ELSEWHERE, f"{place}\n")


def find_source(given: str, *, key: str) -> Source:
    """The checkpoints that a run folder, a checkpoint's folder or a URL holds.

    Args:
        given: What was asked for.
        key: The setting that asked, for the error.

    Raises:
        ConfigError: There is no checkpoint.
    """
    parent, _, name = given.rstrip("/").rpartition("/")
    if "://" in given:
        one = step_of(name) is not None
        source = Source(open_storage(parent if one else given), name if one else None)
    else:
        source = _local_source(pathlib.Path(given).absolute())
    if source.name is None and not source.storage.steps():
        raise ConfigError(
            f"{key} must name a run folder or a checkpoint: {given!r} holds no checkpoint"
        )
    return source


def _local_source(path: pathlib.Path) -> Source:
    if (path / MANIFEST).exists():
        return Source(LocalStorage(path.parent), path.name)
    run_dir = RunDir(path)
    elsewhere = run_dir.checkpoints / _ELSEWHERE
    if elsewhere.exists():
        return Source(open_storage(elsewhere.read_text().strip()), None)
    inside = run_dir.checkpoints if run_dir.checkpoints.is_dir() else path
    return Source(LocalStorage(inside), None)
