"""A resumed run equals, with ==, one that was never interrupted, whatever makes its program."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import signal

import pytest
import torch
from torch import Tensor

from runner.backends import registry
from runner.backends.state import state_dict_names
from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.names import TRAINING_BACKENDS
from runner.config.schema import Config
from runner.config.trust import trusted_packages
from runner.record.errors import StopRequested
from runner.record.events import Evaluated, Event, Steps
from runner.record.manifest import folder_name
from runner.record.storage import LocalStorage
from runner.train.build import build
from runner.train.checkpoint import Label, load
from runner.train.loop import Training
from runner.train.profiler import Profiler
from runner.train.resume import restore
from runner.train.saver import Saver
from runner.train.signals import StopFlag

STEPS = 5
#: Everything that makes a step depend on more than the weights: dropout, micro-batches, a
#: schedule with warm-up, clipping, optimizer state with counters.
OVERRIDES = (
    "job=mlp",
    "job.batch_size=16",
    "model.width=16",
    "model.dropout=0.2",
    "optim=adamw",
    "optim.lr=0.01",
    "accumulate_steps=2",
    "grad_clip_norm=0.5",
    "schedule.warmup_fraction=0.4",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    f"steps={STEPS}",
)


@dataclasses.dataclass
class Outcome:
    """What a run left behind."""

    losses: dict[int, float]
    evaluations: dict[int, dict[str, float]]
    state: dict[str, Tensor]
    first_step: int


def config_of(backend: str, *more: str) -> Config:
    composer = Composer(conf_folder(), extra=None, trusted=trusted_packages())
    return composer.config([*OVERRIDES, f"backend={backend}", *more])


def train(
    config: Config, folder: pathlib.Path, *, stop: StopFlag | None = None, evaluated: int = 0
) -> Outcome:
    """Train in this process from whatever checkpoints the folder holds."""
    events: list[Event] = []
    storage = LocalStorage(folder)
    built = build(config)
    names = state_dict_names(built.recipe.model)
    backend = registry.build(
        config.backend.name,
        built.recipe,
        on_start=lambda role: None,
        on_record=lambda record: None,
        strict=True,
        steps_per_call=config.backend.steps_per_call,
    )
    first = restore(backend, config, own=storage, warn=pytest.fail)
    saver = Saver(storage, config.checkpoint, label=Label(names, {}), send=events.append)
    saver.begin(first)
    heldout = built.data.heldout if config.eval_every else None
    data = dataclasses.replace(built.data, heldout=heldout)
    with saver:
        Training(
            config,
            dataclasses.replace(built, data=data),
            backend,
            send=events.append,
            stop=stop or StopFlag(),
            saver=saver,
            profiler=Profiler(None, folder=folder, send=events.append),
            step=first,
            evaluated=evaluated,
        ).train()
    losses = {e.records[-1].step: e.metrics["loss"] for e in events if isinstance(e, Steps)}
    evaluations = {e.step: e.metrics for e in events if isinstance(e, Evaluated)}
    _, state = load(storage, folder_name(config.steps))
    return Outcome(losses, evaluations, {name: t.clone() for name, t in state.items()}, first)


def keep_only(whole: pathlib.Path, step: int, folder: pathlib.Path) -> pathlib.Path:
    """A run folder as it was left when the run was interrupted after `step`."""
    shutil.copytree(whole / folder_name(step), folder / folder_name(step))
    return folder


def assert_equal(resumed: Outcome, whole: Outcome, *, first: int) -> None:
    assert resumed.first_step == first
    assert resumed.losses == {k: v for k, v in whole.losses.items() if k > first}
    assert list(resumed.state) == list(whole.state)
    for name, tensor in resumed.state.items():
        assert torch.equal(tensor, whole.state[name]), name


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_resumed_at_any_step_and_twice_it_equals_the_uninterrupted_run(
    backend: str, tmp_path: pathlib.Path
) -> None:
    config = config_of(backend)
    whole = train(config, tmp_path / "whole")
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    for step in range(1, STEPS):
        folder = keep_only(tmp_path / "whole", step, tmp_path / f"from-{step}")
        resumed = train(config, folder)
        assert_equal(resumed, whole, first=step)
    again = keep_only(tmp_path / "from-1", 3, tmp_path / "again")
    assert_equal(train(config, again), whole, first=3)


def test_several_steps_a_call_resume_between_calls(tmp_path: pathlib.Path) -> None:
    more = ("backend.steps_per_call=2", "checkpoint.every_steps=2", "steps=6")
    config = config_of("openxla_step", *more)
    whole = train(config, tmp_path / "whole")
    for step in (2, 4):
        folder = keep_only(tmp_path / "whole", step, tmp_path / f"from-{step}")
        assert_equal(train(config, folder), whole, first=step)


def test_batch_statistics_and_unusual_optimizer_state_come_back(tmp_path: pathlib.Path) -> None:
    more = ("optim=nadam", "optim.lr=0.001", "steps=3")
    for backend in ("openxla_step", "eager"):
        config = config_of(backend, *more)
        whole = train(config, tmp_path / backend)
        folder = keep_only(tmp_path / backend, 1, tmp_path / f"{backend}-1")
        assert_equal(train(config, folder), whole, first=1)


def test_saving_leaves_the_numbers_as_they_are(tmp_path: pathlib.Path) -> None:
    saved = train(config_of("openxla_step"), tmp_path / "saved")
    plain = train(config_of("openxla_step", "checkpoint.every_steps=0"), tmp_path / "plain")
    assert saved.losses == plain.losses
    for name, tensor in saved.state.items():
        assert torch.equal(tensor, plain.state[name])


class StopAt(StopFlag):
    """Asks for a stop when it is looked at for so many times."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self._calls, self._at = 0, call

    @property
    def number(self) -> int:
        self._calls += 1
        return signal.SIGTERM if self._calls == self._at else 0


@pytest.mark.parametrize("backend", ["openxla_step", "lazy"])
def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(
    backend: str, tmp_path: pathlib.Path
) -> None:
    config = config_of(backend, "eval_every=2", "job.eval_batch_size=500")
    whole = train(config, tmp_path / "whole")
    assert sorted(whole.evaluations) == [2, 4, STEPS]
    # Asked before each of the two steps, then in the evaluation after them.
    with pytest.raises(StopRequested):
        train(config, tmp_path / "cut", stop=StopAt(3))
    assert LocalStorage(tmp_path / "cut").steps()[0] == 2
    resumed = train(config, tmp_path / "cut")
    assert_equal(resumed, whole, first=2)
    assert resumed.evaluations == whole.evaluations
    (tmp_path / "again").mkdir()
    later = keep_only(tmp_path / "cut", 2, tmp_path / "again")
    assert sorted(train(config, later, evaluated=2).evaluations) == [4, STEPS]


def test_a_resumed_run_has_nothing_to_save_before_its_first_step(tmp_path: pathlib.Path) -> None:
    config = config_of("eager", "steps=2")
    train(config, tmp_path)
    before = (tmp_path / folder_name(2) / "manifest.json").stat().st_mtime_ns
    again = train(config, tmp_path)
    assert again.losses == {}
    assert (tmp_path / folder_name(2) / "manifest.json").stat().st_mtime_ns == before
