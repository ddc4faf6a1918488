"""What a run starts from: its own checkpoints, somebody else's, or nothing.

A run that has checkpoints never starts from zero: damaged ones are set aside and the one before
is used, and if none is whole the run fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from runner.backends.base import Backend
from runner.backends.state import TrainState
from runner.config.schema import Config
from runner.record.checkpoints import find_source
from runner.record.errors import CheckpointError
from runner.record.manifest import folder_name
from runner.record.storage import Storage
from runner.train.checkpoint import DamagedError, load, state_of
from runner.train.hosts import ALONE, Hosts

#: What a checkpoint that was found to be damaged is renamed to.
CORRUPT = "corrupt"

Warn = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Start:
    """A checkpoint that a run starts from.

    Attributes:
        of: "own", "resume" or "init_from": which setting named it.
        name: Its folder.
        state: What it holds.
    """

    of: str
    name: str
    state: TrainState


def restore(
    backend: Backend, config: Config, *, own: Storage, warn: Warn, hosts: Hosts = ALONE
) -> int:
    """Load what the run is to start from into the backend; returns the completed updates.

    Args:
        backend: Holds the job's initial state.
        config: The run's configuration.
        own: The run's checkpoints; half-written ones are removed.
        warn: Called with what the user should read.
        hosts: Those that train together; the first chooses, the others load the same.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
        ConfigError: `resume` or `init_from` names no checkpoint.
    """
    found: list[_Start] = []

    def choose(_: list[None]) -> list[str] | None:
        own.clean()
        start = _start(config, own, warn)
        if start is None:
            return None
        found.append(start)
        return [start.of, start.name]

    chosen = hosts.settle("restore", None, choose)
    if chosen is None:
        return 0
    state = found[0].state if found else _same(config, own, *chosen)
    if chosen[0] == "init_from":
        state = TrainState(state.params, state.buffers, backend.state(0).optimizer, step=0)
    backend.load(state)
    return state.step


def _start(config: Config, own: Storage, warn: Warn) -> _Start | None:
    """The checkpoint to start from, if there is one."""
    start = _own_start(own, warn)
    if start is None and config.resume not in ("auto", "never"):
        start = _foreign_start("resume", config.resume, warn)
    if start is None and config.init_from is not None:
        start = _foreign_start("init_from", config.init_from, warn)
    return start


def _same(config: Config, own: Storage, of: str, name: str) -> TrainState:
    """The state that the first host has chosen."""
    given = {"resume": config.resume, "init_from": config.init_from or ""}
    storage = find_source(given[of], key=of).storage if of in given else own
    try:
        return _state(storage, name, all=of != "init_from")
    except DamagedError as error:
        raise CheckpointError(
            f"{storage.where(name)} is whole for the first host of the job, and not here: {error}"
        ) from error


def _own_start(storage: Storage, warn: Warn) -> _Start | None:
    for step in storage.steps():
        name = folder_name(step)
        try:
            return _Start("own", name, _state(storage, name))
        except DamagedError as error:
            new = storage.set_aside(name, CORRUPT)
            warn(
                f"CORRUPT CHECKPOINT: {storage.where(name)}: {error}; it is now {new}, and the one "
                "before it is used"
            )
    lost = [name for name in storage.names() if name.startswith(CORRUPT)]
    if lost:
        raise CheckpointError(
            f"every checkpoint of the run is damaged ({len(lost)}, such as "
            f"{storage.where(lost[0])}); a run that has checkpoints does not start from zero by "
            "itself: restore one, or remove these folders"
        )
    return None


def _foreign_start(of: str, given: str, warn: Warn) -> _Start:
    """The newest whole checkpoint at a place, which is left as it is."""
    source = find_source(given, key=of)
    storage = source.storage
    names = [source.name] if source.name else [folder_name(step) for step in storage.steps()]
    for name in names:
        try:
            return _Start(of, name, _state(storage, name, all=of != "init_from"))
        except DamagedError as error:
            warn(f"CORRUPT CHECKPOINT: {storage.where(name)}: {error}; it is not used")
    raise CheckpointError(f"no checkpoint is whole among {', '.join(map(storage.where, names))}")


def _state(storage: Storage, name: str, *, all: bool = True) -> TrainState:
    groups = ("params", "buffers", "optimizer") if all else ("params", "buffers")
    try:
        manifest, tensors = load(storage, name, groups=groups)
    except OSError as error:
        raise CheckpointError(f"{storage.where(name)} cannot be read: {error}") from error
    return state_of(tensors, step=manifest.step)
