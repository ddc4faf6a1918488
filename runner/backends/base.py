"""What a backend is: it owns the state and turns a recipe into steps.

The training loop knows nothing of graphs; a backend knows nothing of data order, schedules,
logging or checkpoints.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.backends.compiles import CompileLog
from runner.backends.snapshot import Snapshot, snapshot_of
from runner.backends.state import TrainState
from runner.config.schema import PassesConfig

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]
#: What `Job.evaluate` may return beside metrics, and of how many examples it is handed out.
PREDICTED, SHOWN = "predicted", 8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one training step computes, before a backend has made a program of it.

    Attributes:
        model: The model on the host, with its initial weights.
        loss: Mean loss of a (micro-)batch, a scalar.
        evaluate: Held-out metrics, one value an example; see `jobs.base.Job.evaluate`.
        make_optimizer: An optimizer over the parameters of a module shaped like `model`.
        autocast: Type for `torch.autocast` around forward and loss, or None for float32.
        clip_norm: Largest global gradient norm, or None.
        accumulate: Micro-batches that a batch is split into.
        remat: Whether layers are computed again in the backward pass instead of being kept, by
            a backend that traces the step as a whole.
        scan_layers: Whether layers that repeat are a loop in the program, with `remat`, by such a
            backend.
        passes: What may be done to the traced step, by a backend that traces it as a whole.
        seed: What dropout's random numbers are a function of, together with the step.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module, Batch], dict[str, Tensor]]
    make_optimizer: Callable[[nn.Module], Optimizer]
    autocast: torch.dtype | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    remat: bool = False
    scan_layers: bool = False
    seed: int = 0
    passes: PassesConfig = dataclasses.field(default_factory=PassesConfig)

    def autocast_on(self, device_type: str) -> torch.autocast:
        """The precision context for forward and loss on a device."""
        return torch.autocast(
            device_type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def step_seed(self, step: int) -> int:
        """The seed of the random operations of the update after `step` completed ones."""
        return step_seed(self.seed, step)


@functools.lru_cache(maxsize=8)
def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed that differs for every (seed, step); splitmix64's mixing function.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    mask = (1 << 64) - 1
    z = ((seed & mask) * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1342543DE82EF95) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


class Backend(abc.ABC):
    """A compiled training step and the state that it changes.

    Args:
        recipe: What to compute. The backend takes the model over.
        log: Where compiled graphs are recorded.
        steps_per_call: Updates that one call of `train_steps` makes.
    """

    device: torch.device

    def __init__(self, recipe: Recipe, *, log: CompileLog, steps_per_call: int = 1) -> None:
        self.recipe = recipe
        self.log = log
        self.steps_per_call = steps_per_call

    @abc.abstractmethod
    def place(self, batch: Batch) -> dict[str, Tensor]:
        """The host batch on the device; may be called from another thread."""

    @abc.abstractmethod
    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """One optimizer update.

        Args:
            batch: What `place` returned; the first dimension is the example.
            step: Completed updates before this one.
            lr: Learning rate of this update, before a group's `lr_scale`.

        Returns:
            Scalars still on the device: "loss" and "grad_norm" (before clipping). Reading
            one waits for the step.
        """

    def train_steps(self, batches: Sequence[Batch], *, step: int, lrs: Sequence[float]) -> Metrics:
        """`steps_per_call` optimizer updates, the same as `train_step` makes one by one.

        Args:
            batches: What `place` returned, one for each update.
            step: Completed updates before the first.
            lrs: Learning rate of each update.

        Returns:
            As `train_step`, of shape [steps_per_call] if that is more than 1.
        """
        (batch,), (lr,) = batches, lrs
        return self.train_step(batch, step=step, lr=lr)

    def prepare(self, batches: Sequence[Batch]) -> None:  # noqa: B027 - most have nothing to do
        """Compile the training step for batches like these, if the backend does so ahead.

        The program then is the same whether an evaluation comes before the first step or not.
        """

    def ended(self, step: int) -> None:  # noqa: B027 - most have nothing to do
        """Told, when the end of a call was seen, how many updates have ended with it.

        Here is the place for work that need not delay the next call; called from the thread
        that waits for ends.
        """

    @abc.abstractmethod
    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """Held-out metrics of a batch, summed over the examples where `mask` is 1.

        What is "predicted" is that of the first `SHOWN` examples: [SHOWN, ...].

        Args:
            batch: A batch on the device, padded to a constant size.
            mask: float32 of shape [batch].
        """

    @abc.abstractmethod
    def state(self, step: int) -> TrainState:
        """The state after `step` updates. The tensors may change with the next step."""

    def snapshot(self, step: int) -> Snapshot:
        """The state after `step` updates, copied to the host.

        sync: waits until the step has ended.
        """
        groups = self.state(step).groups()
        copies = iter(self.to_host([t for named in groups.values() for t in named.values()]))
        copied = {group: {name: next(copies) for name in named} for group, named in groups.items()}
        return snapshot_of(TrainState(**copied, step=step))

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of state tensors on the host, which no later step changes."""
        return [tensor.detach().clone() for tensor in tensors]

    @abc.abstractmethod
    def load(self, state: TrainState) -> None:
        """Replace the state by a saved one with the same names and shapes.

        Raises:
            CheckpointError: Names or shapes differ from this model's and optimizer's.
        """

    def programs(self) -> int:
        """Device programs started so far; 0 where there is no device."""
        return 0

    @staticmethod
    def compile_totals() -> tuple[int, float]:
        """XLA compiles in this process so far, and their seconds."""
        return (0, 0.0)

    def memory_bytes(self) -> int:
        """Bytes held on a device: as the runtime tells, else the state's own."""
        return self.state(0).bytes()


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` equal parts: see `dealt`."""
    parts = {name: dealt(tensor, count) for name, tensor in batch.items()}
    return [{name: own[i] for name, own in parts.items()} for i in range(count)]


def dealt(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """A tensor in `count` equal parts along its first dimension, one index to each in turn.

    Where that dimension is cut over devices, every part takes of every device's share: of parts
    one after the other, each would lie on some devices only.
    """
    if count == 1:
        return [tensor]
    return tensor.reshape(-1, count, *tensor.shape[1:]).unbind(1)


def masked_sums(metrics: Mapping[str, Tensor], mask: Tensor) -> Metrics:
    """Sums over the examples that count; of what is predicted, the first few as they are."""
    return {
        name: values[:SHOWN] if name == PREDICTED else (values.float() * mask).sum()
        for name, values in metrics.items()
    }
