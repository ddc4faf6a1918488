"""Machines of a Ray cluster, borrowed for jobs. The only importer of ray.

A crew is what one job runs on: an actor, or one on every host of a pod slice. Crews outlive
jobs, so that their workers stay warm; one that is lost is replaced by whatever Ray finds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import slice_placement_group

from runner.batch.host import Host, Report, Task
from runner.config.chips import Slice
from runner.record.errors import ConfigError, DeviceError

_POLL_S = 0.1
#: Threads of an actor: one that waits for events, and those that end the wait.
_THREADS = 4
#: Actors in a row that may die before they have answered: a node just lost takes some with it.
_DEATHS = 10
_RESERVE_S = 5.0
_REACH_S = 10.0
#: What Ray calls the generations of chips.
_GENERATIONS = {"v5e": "v5litepod"}


class CrewLost(Exception):
    """A machine of the crew is gone."""


@dataclasses.dataclass(frozen=True)
class Need:
    """What one job asks the cluster for.

    Attributes:
        cpus: Processor cores, of each host.
        chips: TPU chips, of each host; 0 for none.
        slice: The pod slice whose hosts it needs all, or None for one host.
    """

    cpus: float
    chips: int
    slice: Slice | None = None


class Crew:
    """The actors of one job.

    Args:
        actors: One a host; the first is the one whose events count.
        release: Gives back what was reserved for them.
    """

    def __init__(self, actors: Sequence[Any], release: Callable[[], None]) -> None:
        self.key: str | None = None
        self._actors = list(actors)
        self._release = release
        self.up = [actor.name.remote() for actor in actors]

    def names(self) -> list[str]:
        """The machines' names."""
        return list(self._all("name"))

    def begin(self, task: Task) -> tuple[int, str, str] | None:
        """See `Host.begin`."""
        self.key = task.key
        return next((refusal for refusal in self._all("begin", task) if refusal), None)

    def poll(self, seconds: float) -> Report:
        """See `Host.poll`; the job has ended when it has on all hosts, or failed on one."""
        first, *others = self._all("poll", seconds)
        codes = [first.exit_code, *(each.exit_code for each in others)]
        failed = next((code for code in codes if code), None)
        code = failed if failed is not None else None if None in codes else 0
        return Report(first.events, first.log, code)

    def signal(self, number: int) -> None:
        """See `Host.signal`."""
        self._all("signal", number)

    def kill(self) -> None:
        """See `Host.kill`."""
        self._all("kill")

    def finish(self) -> None:
        """See `Host.finish`."""
        self._all("finish")

    def dismiss(self) -> None:
        """End the actors, and with them all that they started."""
        for actor in self._actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        self._release()

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every actor.

        Raises:
            CrewLost: One of them is gone, or cannot be reached.
        """
        try:
            found: list[Any] = ray.get(
                [getattr(actor, method).remote(*arguments) for actor in self._actors]
            )
        except RayActorError as error:
            raise CrewLost(str(error).strip().splitlines()[0]) from error
        return found


class Fleet:
    """Lends crews to the threads of a batch, in the order in which they ask.

    Args:
        need: What each job asks for.
        most: Crews at a time.
    """

    def __init__(self, need: Need, *, most: int) -> None:
        self._need, self._most = need, most
        self._lock = threading.Lock()
        self._line: collections.deque[object] = collections.deque()
        self._idle: list[Crew] = []
        self._coming: list[Crew] = []
        self._count = self._deaths = 0

    def acquire(self, key: str, *, asked: Callable[[], bool]) -> Crew | None:
        """A crew that is up, one with the graph `key` if possible; None once `asked` says so.

        Raises:
            DeviceError: Actors die one after another before they have answered.
        """
        ticket, own = object(), None
        with self._lock:
            self._line.append(ticket)
        try:
            while not asked():
                if (crew := self._take(ticket, key)) is not None:
                    return crew
                own = own or self._order()
                if own is not None and self._is_settled(own):
                    own = None
                time.sleep(_POLL_S)
            return None
        finally:
            with self._lock:
                self._line.remove(ticket)
                if own is not None:
                    self._coming.append(own)

    def give_back(self, crew: Crew, *, good: bool) -> None:
        """A job is over; a crew that is not `good` is dismissed."""
        if not good:
            self._drop(crew)
            return
        with self._lock:
            self._idle.append(crew)

    def close(self) -> None:
        """Dismiss all crews."""
        with self._lock:
            crews, self._idle, self._coming = self._idle + self._coming, [], []
        for crew in crews:
            crew.dismiss()

    def _take(self, ticket: object, key: str) -> Crew | None:
        with self._lock:
            if self._line[0] is not ticket or not self._idle:
                return None
            same = (at for at, crew in enumerate(self._idle) if crew.key == key)
            return self._idle.pop(next(same, 0))

    def _order(self) -> Crew | None:
        """A new crew, which may have to wait for room; None if there are as many as may be."""
        with self._lock:
            if self._coming:
                return self._coming.pop()
            if self._count >= self._most:
                return None
            self._count += 1
        crew = _crew(self._need)
        if crew is None:
            with self._lock:
                self._count -= 1
        return crew

    def _is_settled(self, crew: Crew) -> bool:
        """Whether a new crew is up, and idle from now on, or has died."""
        up, coming = ray.wait(crew.up, num_returns=len(crew.up), timeout=0)
        try:
            ray.get(up)
        except RayError as error:
            self._drop(crew)
            self._deaths += 1
            if self._deaths > _DEATHS:
                raise DeviceError(f"no machine of the cluster could start: {error}") from error
            return True
        if coming:
            return False
        with self._lock:
            self._deaths = 0
            self._idle.append(crew)
        return True

    def _drop(self, crew: Crew) -> None:
        crew.dismiss()
        with self._lock:
            self._count -= 1


def _crew(need: Need) -> Crew | None:
    if need.slice is not None:
        return _slice_crew(need.slice, need)
    return Crew([_actor(need)], lambda: None)


def _actor(need: Need, **placed: Any) -> Any:
    return (
        ray.remote(Host)
        .options(
            num_cpus=need.cpus,
            resources={"TPU": need.chips} if need.chips else {},
            max_restarts=0,
            max_concurrency=_THREADS,
            **placed,
        )
        .remote()
    )


def _slice_crew(wanted: Slice, need: Need) -> Crew | None:
    """An actor on every host of one slice; None while no slice is free."""
    generation = wanted.chip.generation
    try:
        reserved = slice_placement_group(
            topology="x".join(str(side) for side in wanted.shape),
            accelerator_version=_GENERATIONS.get(generation, generation),
            head_reservation_timeout_s=_RESERVE_S,
        )
    except TimeoutError:
        return None
    group = reserved.slice_placement_group
    places = [
        PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=at)
        for at in range(wanted.hosts)
    ]
    actors = [_actor(need, scheduling_strategy=place) for place in places]

    def release() -> None:
        with contextlib.suppress(RayError):
            remove_placement_group(group)
            reserved.shutdown()

    return Crew(actors, release)


def connect(address: str | None) -> dict[str, float]:
    """Join the cluster at an address, or start one on this machine; returns what it has.

    Raises:
        ConfigError: There is none.
    """
    # Nothing is sent to the makers of Ray, and no device variable is touched for CPU jobs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _reach(address)
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"ray.address must be that of a cluster that runs (HOST:PORT, or auto for one on this "
            f"machine), or null to start one here; got {address!r}: {error}"
        ) from error
    found: dict[str, float] = ray.cluster_resources()
    return found


def _reach(address: str | None) -> None:
    """Ray itself tries for minutes.

    Raises:
        OSError: Nobody answers at HOST:PORT.
        ValueError: It is no such address.
    """
    if address in (None, "auto"):
        return
    host, colon, port = str(address).rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ValueError("it is neither HOST:PORT nor auto")
    socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def largest_node(resource: str) -> float:
    """How much of a resource the best node has."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return max((node["Resources"].get(resource, 0.0) for node in nodes), default=0.0)


def disconnect() -> None:
    """Leave the cluster; one that was started here ends."""
    ray.shutdown()
