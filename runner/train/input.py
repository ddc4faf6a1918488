"""Batches for the loop: made ready in a background thread, waits measured.

The order of examples comes from `runner.train.order`, their content from a job's data source,
their place on the device from the backend; this module only moves them along.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import jobs.base
from runner.record.errors import DataError
from runner.train.order import BatchOrder

Tensors = dict[str, Tensor]
T = TypeVar("T")

CLOSE_TIMEOUT_S = 1.0


class Prefetcher(Generic[T]):
    """Runs an iterable ahead in a thread of its own; iterate it, then `close` it.

    An exception of the iterable is raised by `next`, as it is, after what came before it.

    Args:
        items: What to run ahead; only the thread touches it from now on.
        depth: Items that are kept ready.
        clock: Monotonic seconds.

    Attributes:
        waited_s: Seconds that all `next` together have waited.
    """

    def __init__(self, items: Iterable[T], *, depth: int, clock: Callable[[], float]) -> None:
        assert depth >= 1, depth
        self.waited_s = 0.0
        self._depth = depth
        self._clock = clock
        self._ready: collections.deque[T] = collections.deque()
        self._end: BaseException | None = None
        self._changed = threading.Condition()
        # A daemon: a source that blocks for ever must not keep the process alive.
        self._thread = threading.Thread(
            target=self._fill, args=(iter(items),), name="prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            while self._wait_for_room():
                item = next(items)
                with self._changed:
                    if self._end is None:
                        self._ready.append(item)
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._end = self._end or error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Whether another item is wanted, once there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None or len(self._ready) < self._depth)
            return self._end is None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        asked = self._clock()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            self.waited_s += self._clock() - asked
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """End the thread; a `next` from now on ends the iteration. May be called twice.

        A thread that is inside a blocked source is left behind, to end when the source returns.
        """
        with self._changed:
            self._end = StopIteration()
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class Share:
    """What this host reads of every batch: the parts that its own devices take.

    Attributes:
        parts: Their numbers.
        of: In how many parts of one size a batch is cut; 1 if this host reads all of it.
    """

    parts: tuple[int, ...] = (0,)
    of: int = 1

    def read(
        self,
        source: jobs.base.Source,
        indices: npt.NDArray[np.int64],
        rng_of: Callable[[int], np.random.Generator | None],
    ) -> Tensors:
        """The batch with the examples of this host in their places; the others' are zeros.

        A part is the same whichever host reads it.

        Args:
            source: Where the examples come from.
            indices: Of the whole batch, which divides into the parts.
            rng_of: From a part's number to the randomness of its augmentation.

        Raises:
            DataError: An example cannot be read.
        """
        if self.of == 1:
            return read(source, indices, rng=rng_of(0))
        size = len(indices) // self.of
        batch: Tensors = {}
        for part in self.parts:
            rows = slice(part * size, (part + 1) * size)
            for name, own in read(source, indices[rows], rng=rng_of(part)).items():
                if name not in batch:
                    # Pages that nobody touches take no memory.
                    array = np.zeros((len(indices), *own.shape[1:]), dtype=own.numpy().dtype)
                    batch[name] = torch.from_numpy(array)
                batch[name][rows] = own
        return batch


@dataclasses.dataclass
class InputPipeline:
    """The training batches of a run, in order; entered, it prepares them ahead.

    Attributes:
        source: Where the examples come from.
        order: Which examples, in which order.
        first_step: Completed updates before the first batch.
        last_step: Completed updates after the last batch.
        place: Moves a batch to the device.
        depth: Batches that are kept ready there.
        share: What this host reads of them.
        clock: Monotonic seconds.
    """

    source: jobs.base.Source
    order: BatchOrder
    first_step: int
    last_step: int
    place: Callable[[Tensors], Tensors]
    depth: int
    share: Share = dataclasses.field(default_factory=Share)
    clock: Callable[[], float] = time.monotonic
    _prefetcher: Prefetcher[Tensors] = dataclasses.field(init=False, repr=False)

    def batches(self) -> Iterator[Tensors]:
        """The batches, each prepared when it is asked for.

        Raises:
            DataError: An example cannot be read.
        """
        for step in range(self.first_step, self.last_step):
            rng_of = functools.partial(self.order.rng, step)
            yield self.place(self.share.read(self.source, self.order.indices(step), rng_of))

    def __enter__(self) -> Prefetcher[Tensors]:
        self._prefetcher = Prefetcher(self.batches(), depth=self.depth, clock=self.clock)
        return self._prefetcher

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._prefetcher.close()


_ALL = Share()


def evaluation_batches(
    source: jobs.base.Source, batch_size: int, *, share: Share = _ALL
) -> Iterator[tuple[Tensors, Tensor]]:
    """Every example once, in order, in batches of one size on the host, of each its share.

    Yields:
        A batch, and a float32 mask of shape [batch_size] that is 1 where an example counts: the
        last batch is filled up with its last example.

    Raises:
        DataError: An example cannot be read.
    """
    examples = len(source)
    for start in range(0, examples, batch_size):
        wanted = np.arange(start, start + batch_size, dtype=np.int64)
        batch = share.read(source, np.minimum(wanted, examples - 1), lambda part: None)
        yield batch, torch.from_numpy((wanted < examples).astype(np.float32))


def read(
    source: jobs.base.Source,
    indices: npt.NDArray[np.int64],
    *,
    rng: np.random.Generator | None,
) -> Tensors:
    """A source's examples as tensors that share memory with its arrays.

    Raises:
        DataError: An example cannot be read.
    """
    try:
        arrays = source.batch(indices, rng=rng)
    except jobs.base.DataError as error:
        raise DataError(str(error)) from error
    # A view that is read-only or runs backwards is copied: torch can hold neither.
    return {
        name: torch.from_numpy(np.require(array, requirements=["C", "W"]))
        for name, array in arrays.items()
    }
