"""What a run starts from: its own checkpoints, somebody else's, or nothing.

A run that has checkpoints never starts from zero: damaged ones are set aside and the one before
is used, and if none is whole the run fails.
"""

from __future__ import annotations

from collections.abc import Callable

from runner.backends.base import Backend
from runner.backends.state import TrainState
from runner.config.schema import Config
from runner.record.checkpoints import Source, find_source
from runner.record.errors import CheckpointError
from runner.record.manifest import folder_name
from runner.record.storage import Storage
from runner.train.checkpoint import DamagedError, load, state_of

#: What a checkpoint that was found to be damaged is renamed to.
CORRUPT = "corrupt"

Warn = Callable[[str], None]


def restore(backend: Backend, config: Config, *, own: Storage, warn: Warn) -> int:
    """Load what the run is to start from into the backend; returns the completed updates.

    Args:
        backend: Holds the job's initial state.
        config: The run's configuration.
        own: The run's checkpoints; half-written ones are removed.
        warn: Called with what the user should read.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
        ConfigError: `resume` or `init_from` names no checkpoint.
    """
    own.clean()
    state = _own_state(own, warn)
    if state is None and config.resume not in ("auto", "never"):
        state = _foreign_state(find_source(config.resume, key="resume"), warn)
    if state is None and config.init_from is not None:
        weights = _foreign_state(find_source(config.init_from, key="init_from"), warn, all=False)
        state = TrainState(weights.params, weights.buffers, backend.state(0).optimizer, step=0)
    if state is None:
        return 0
    backend.load(state)
    return state.step


def _own_state(storage: Storage, warn: Warn) -> TrainState | None:
    for step in storage.steps():
        name = folder_name(step)
        try:
            return _state(storage, name)
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


def _foreign_state(source: Source, warn: Warn, *, all: bool = True) -> TrainState:
    """The newest whole checkpoint of a source, which is left as it is."""
    storage = source.storage
    names = [source.name] if source.name else [folder_name(step) for step in storage.steps()]
    for name in names:
        try:
            return _state(storage, name, all=all)
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
