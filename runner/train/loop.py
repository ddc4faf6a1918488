"""The training loop.

The order is fixed: stop? save? profile? next batch, step, clock, log, evaluate. A call of the
backend makes one update, or several where the job asks for it. The host never waits for the
call that it has just handed over; every place where it does wait is marked `# sync:`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import psutil
from torch import Tensor

from runner.backends.base import PREDICTED, Backend
from runner.config.schema import Config
from runner.record.errors import CheckpointError, NonFiniteError, StopRequested
from runner.record.events import Evaluated, Event, Notice, Phase, StepRecord, Steps
from runner.train.build import Built, example_batch
from runner.train.clock import FinishedStep, StepClock
from runner.train.hosts import ALONE, Hosts
from runner.train.input import InputPipeline, Share, evaluation_batches
from runner.train.order import BatchOrder
from runner.train.profiler import Profiler
from runner.train.pulse import Pulse
from runner.train.saver import Saver
from runner.train.schedule import learning_rate
from runner.train.show import Show
from runner.train.signals import StopFlag, stop_error

#: Seconds between two readings of memory in use.
_MEMORY_EVERY_S = 1.0


@dataclasses.dataclass
class Training:
    """One run of one job on one backend.

    Attributes:
        config: What was asked for.
        built: The job and its data.
        backend: The compiled step and the state.
        send: Where events go.
        stop: Whether to stop early.
        saver: Saves the state.
        profiler: Traces some steps.
        step: Completed updates.
        evaluated: The step of the newest evaluation that is recorded.
        compiled_before: What XLA had compiled in this process before the job: a count and
            seconds.
        hosts: Those that train together.
        share: What this one reads of every batch.
    """

    config: Config
    built: Built
    backend: Backend
    send: Callable[[Event], None]
    stop: StopFlag
    saver: Saver
    profiler: Profiler
    step: int = 0
    evaluated: int = 0
    compiled_before: tuple[int, float] = (0, 0.0)
    hosts: Hosts = ALONE
    share: Share = dataclasses.field(default_factory=Share)
    pulse: Pulse = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.send)

    def train(self) -> None:
        """Train from the current step to the last, then evaluate.

        Raises:
            StopRequested: A signal asked for it.
            NonFiniteError: The loss is not a number.
            DataError: An example cannot be read.
            CheckpointError: Too many saves failed.
        """
        count, log = self.backend.steps_per_call, StepLog(self)
        if self.evaluation_due() and self.evaluated < self.step:
            self._make_up_evaluation()
        self.send(Phase("training"))
        with (
            StepClock(self.backend, on_end=log.add) as clock,
            self.input() as batches,
            self.profiler as profiler,
        ):
            while self.step < self.config.steps:
                # sync: several hosts do what they have agreed on, or they would part here
                stop, save = self.hosts.largest(self.stop.number, self.saver.due(self.step))
                if stop:
                    clock.drain()  # sync: the end of the run
                    raise self.stopped(stop)

                if save:
                    clock.drain()  # sync: before a pause; a loss that is lost is not saved
                    self.saver.save(self.step, self.backend.snapshot)
                    clock.resume()

                if profiler.due(self.step, count):
                    clock.drain()  # sync: before a pause
                    profiler.turn(self.step)
                    clock.profiling = profiler.running
                    clock.resume()

                waited = batches.waited_s
                call = [next(batches) for _ in range(count)]
                lrs = [self.lr(self.step + k) for k in range(count)]
                ready, waited = clock.now(), batches.waited_s - waited

                self.backend.log.step = self.step
                with profiler.call(self.step, count):
                    metrics = self.backend.train_steps(call, step=self.step, lrs=lrs)
                self.step += count
                # sync: the call before the last one; the device has this one to go on with.
                clock.launched(self.step, metrics, host_s=clock.now() - ready, wait_s=waited)

                if self.evaluation_due():
                    clock.drain()  # sync: before a pause
                    self.evaluate()
                    self.send(Phase("training"))
                    clock.resume()
            clock.drain()  # sync: the end of the run
        self.send(Phase("saving"))
        self.saver.finish(self.step, self.backend.snapshot)
        self.evaluate()

    def input(self) -> InputPipeline:
        """The batches from the current step to the last."""
        config, source = self.config, self.built.data.train
        return InputPipeline(
            source,
            BatchOrder(len(source), config.job.batch_size, config.seed),
            first_step=self.step,
            last_step=config.steps,
            place=self.backend.place,
            depth=config.data.prefetch * self.backend.steps_per_call,
            share=self.share,
        )

    def stopped(self, number: int) -> StopRequested:
        """Save the state and say why the run ends early: by which signal."""
        self.send(Phase("saving"))
        try:
            self.saver.finish(self.step, self.backend.snapshot)
        except CheckpointError as error:
            self.send(Notice("warning", f"stopping without a checkpoint of this step: {error}"))
        return stop_error(number, self.step)

    def _go_on(self) -> None:
        """Between two parts of an evaluation: show life, and stop if asked to."""
        self.pulse.beat(self.step)
        (stop,) = self.hosts.largest(self.stop.number)
        if stop:
            raise self.stopped(stop)

    def lr(self, step: int) -> float:
        """Learning rate of the update after `step` completed ones."""
        config = self.config
        return learning_rate(config.schedule, lr=config.optim.lr, step=step, steps=config.steps)

    def evaluation_due(self) -> bool:
        """Whether to evaluate now, between two steps."""
        every = self.config.eval_every
        return every > 0 and self.step % every == 0 and self.step < self.config.steps

    def _make_up_evaluation(self) -> None:
        """The run was stopped in the middle of an evaluation, which is still owed."""
        example = example_batch(self.built, self.config)
        calls = range(self.backend.steps_per_call)
        self.backend.prepare([self.backend.place(example) for _ in calls])
        self.evaluate()

    def evaluate(self) -> None:
        """Pass once over the held-out data; every example counts once.

        Raises:
            StopRequested: A signal asked for it.
        """
        source = self.built.data.heldout
        if source is None or len(source) == 0:
            return
        self.send(Phase("evaluating"))
        start = time.perf_counter()
        sums: list[Mapping[str, Tensor]] = []
        batch_size = self.config.job.eval_batch_size
        show = Show(self.built, batches=math.ceil(len(source) / batch_size))
        for arrays, mask in evaluation_batches(source, batch_size, share=self.share):
            placed = self.backend.place({**arrays, "mask": mask})
            mask_on_device = placed.pop("mask")
            found = self.backend.eval_step(placed, mask_on_device)
            predicted = found.pop(PREDICTED, None)
            if self.hosts.count == 1:  # no host has the others' examples
                show.take(arrays, predicted, examples=int(mask.sum()))
            sums.append(found)
            self._go_on()
        totals = dict.fromkeys(sums[0], 0.0)
        for part in sums:
            for name in totals:
                totals[name] += float(part[name].item())  # sync: the end of an evaluation
            self._go_on()
        metrics = {name: total / len(source) for name, total in totals.items()}
        seconds = time.perf_counter() - start
        event = Evaluated(self.step, metrics, examples=len(source), seconds=seconds)
        self.send(show.added_to(event, say=self.send))


class StepLog:
    """Turns finished steps into events, one every `log_every` steps."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._records: list[StepRecord] = []
        self._process = psutil.Process()
        self._memory = (0, 0)
        self._memory_read_s = -_MEMORY_EVERY_S
        self._tokens = training.built.job.tokens_per_example()

    def add(self, finished: FinishedStep) -> None:
        """Take a finished step.

        Raises:
            NonFiniteError: Its loss is not a number.
        """
        training, record, loss = self._training, finished.record, finished.value("loss")
        self._records.append(record)
        training.pulse.beat(record.step)
        finite = math.isfinite(loss)
        last = record.step == training.config.steps
        if record.step % training.config.log_every == 0 or last or not finite:
            self._send(finished)
        if not finite:
            raise NonFiniteError(
                f"the loss must be a finite number; it was {loss} at step {record.step}"
            )

    def _send(self, finished: FinishedStep) -> None:
        training, step = self._training, finished.record.step
        metrics = {name: finished.value(name) for name in finished.metrics.names}
        count, seconds = training.backend.compile_totals()
        count_before, seconds_before = training.compiled_before
        batch_size = training.config.job.batch_size
        device_bytes, host_bytes = self._memory_bytes()
        training.send(
            Steps(
                records=self._records,
                metrics={**metrics, "lr": training.lr(step - 1)},
                compile_count=count - count_before,
                compile_s=seconds - seconds_before,
                device_bytes=device_bytes,
                host_rss_bytes=host_bytes,
                examples_per_step=batch_size,
                tokens_per_step=batch_size * self._tokens,
            )
        )
        self._records = []

    def _memory_bytes(self) -> tuple[int, int]:
        now = time.perf_counter()
        if now - self._memory_read_s >= _MEMORY_EVERY_S:
            backend = self._training.backend
            self._memory = (backend.memory_bytes(), self._process.memory_info().rss)
            self._memory_read_s = now
        return self._memory
