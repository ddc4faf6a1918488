"""What the hosts of a job say to each other besides the step's collectives.

They stop after the same step, save and resume the same checkpoint, and end together: a host whose
peer has died would wait in a collective for ever. Votes and farewells go through torch's gloo,
words through its TCPStore; nothing that arrives is ever unpickled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # torch's stubs lack some
    AllreduceOptions,
    DistError,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    TCPStore,
)

from runner.config.hosts import Host
from runner.record.errors import DeviceBusyError, ExitCode, Fault
from runner.record.events import Ended

Json = Any
A = TypeVar("A")
OnLost = Callable[[Ended], None]

_FOREVER = datetime.timedelta(days=365)
_POLL_S = 0.2
#: Seconds that a connection may take.
_REACH_S = 30.0
#: Seconds that a host which has ended well waits to hear how the others did.
_FAREWELL_S = 60.0
#: Seconds that one which has failed waits for the others to go, whose lines then close.
_RETREAT_S = 5.0
#: Seconds that a host has to end by itself for the reason that another has told, by exit code.
_NOTICE_S = {ExitCode.PREEMPTED: 60.0, ExitCode.INTERRUPTED: 60.0}
_SHORT_NOTICE_S = 2.0
#: Seconds in which an error that may be another host's death seen from here shows as that.
_HEAR_S = 3.0
#: Seconds for the hosts' lines to each other.
_CONNECT_S = 120.0
_COMPLETE = "complete"
_WORD_BYTES = 4096
#: Characters of a reason that fit in there, whatever they are: JSON takes up to six bytes for one.
_REASON = 600


class Hosts:
    """The hosts of a job as one of them sees them; of a host alone every answer is its own.

    Attributes:
        index: Which one this is, from 0.
        count: How many there are.
        first: Whether this is the one that writes what there is one of.
    """

    def __init__(self, host: Host) -> None:
        self.index, self.count, self.first = host.index, host.count, host.first

    def largest(self, *values: int) -> list[int]:
        """The largest of all hosts' values, for each value.

        sync: waits for all hosts; they ask in the same order.
        """
        return list(values)

    def settle(self, topic: str, said: Json, decide: Callable[[list[Json]], A]) -> A:
        """What the first host makes of what all of them say, told to all.

        sync: waits for all hosts; of a topic one thread asks, in the same order.

        Args:
            topic: What it is about.
            said: This host's word: plain data.
            decide: From all words by index to the answer, plain data; called on the first host.
        """
        return decide([said])

    def leave(self, ended: Ended) -> None:
        """Tell the others how this host's part ended; if well, wait for theirs."""


#: A host that trains by itself.
ALONE = Hosts(Host())


class Peers(Hosts):
    """Hosts that have found each other: see `join`.

    Args:
        host: Which one this is.
        store: Holds words; the first host serves it.
        on_lost: Called in a thread of its own when another host ends badly or goes silently.
    """

    def __init__(self, host: Host, store: Store, on_lost: OnLost) -> None:
        super().__init__(host)
        self._store, self._on_lost = store, on_lost
        self._leaving, self._has_failed = threading.Event(), False
        self._rounds: collections.Counter[str] = collections.Counter()
        self._votes = self._group("votes")
        self._farewells = self._group("farewells")
        others = range(1, self.count) if self.first else [0]
        self._watches = {other: self._watch(other) for other in others}

    def largest(self, *values: int) -> list[int]:
        """See `Hosts.largest`."""
        ballot = torch.tensor(values)
        options = AllreduceOptions()
        options.reduceOp = ReduceOp.MAX  # type: ignore[assignment]
        options.timeout = _FOREVER
        self._votes.allreduce([ballot], options).wait()
        found: list[int] = ballot.tolist()
        return found

    def settle(self, topic: str, said: Json, decide: Callable[[list[Json]], A]) -> A:
        """See `Hosts.settle`."""
        store: Any = self._store.clone()  # type: ignore[attr-defined]  # one that waits is taken
        count = self._rounds[topic]
        self._rounds[topic] += 1
        answered = f"{topic}/{count}/answer"
        if not self.first:
            store.set(f"{topic}/{count}/{self.index}", json.dumps(said))
            told: A = _json(store, answered)
            return told
        keys = [f"{topic}/{count}/{index}" for index in range(1, self.count)]
        answer = decide([said, *(_json(store, key) for key in keys)])
        store.set(answered, json.dumps(answer))
        for key in (*keys, f"{topic}/{count - 1}/answer"):  # all have read the one before
            store.delete_key(key)
        return answer

    def leave(self, ended: Ended) -> None:
        """See `Hosts.leave`."""
        if ended.exit_code in (ExitCode.BUG, ExitCode.DEVICE):
            time.sleep(_HEAR_S)
        self._has_failed = ended.exit_code != 0
        self._leaving.set()
        ended = dataclasses.replace(ended, reason=f"host {self.index}: {ended.reason}")
        for other in self._watches:
            self._tell(other, ended)
        deadline = time.monotonic() + (_RETREAT_S if ended.exit_code else _FAREWELL_S)
        for watch in self._watches.values():
            watch.join(max(0.0, deadline - time.monotonic()))

    def _group(self, name: str) -> Any:  # torch's stubs lack its methods
        return ProcessGroupGloo(
            PrefixStore(name, self._store),
            self.index,
            self.count,
            timeout=datetime.timedelta(seconds=_CONNECT_S),
        )

    def _watch(self, other: int) -> threading.Thread:
        thread = threading.Thread(
            target=self._hear, args=(other,), name=f"host {other}", daemon=True
        )
        thread.start()
        return thread

    def _hear(self, other: int) -> None:
        """Wait for a host's last word; the first passes a bad one on, since it alone hears all."""
        word = torch.zeros(_WORD_BYTES, dtype=torch.uint8)
        try:
            self._farewells.recv([word], other, 0).wait(_FOREVER)
            ended = _ended(word)
        except RuntimeError:
            ended = Ended(
                int(ExitCode.PREEMPTED), f"host {other} was lost", 0, Fault.PREEMPTION.value
            )
        else:
            # All of them stop at a signal, or see a loss that is not finite, in the same step.
            self._leaving.wait(_NOTICE_S.get(ExitCode(ended.exit_code), _SHORT_NOTICE_S))
        if ended.exit_code == 0 or self._has_failed:
            return
        for bystander in self._watches:
            if bystander != other:
                self._tell(bystander, ended)
        self._on_lost(ended)

    def _tell(self, other: int, ended: Ended) -> None:
        with contextlib.suppress(RuntimeError):  # it is gone already
            self._farewells.send([_word(ended)], other, 0).wait()


def join(
    host: Host,
    *,
    timeout_s: float,
    waiting: Callable[[str], None],
    on_lost: OnLost,
    clock: Callable[[], float] = time.monotonic,
) -> Hosts:
    """Find the other hosts of the job, which were started by the same command.

    Args:
        host: Which one this is.
        timeout_s: How long to wait for them.
        waiting: Called now and then with what is waited for.
        on_lost: See `Peers`.
        clock: Monotonic seconds.

    Raises:
        DeviceBusyError: Some have not come in time.
    """
    if host.count == 1:
        return ALONE
    deadline = clock() + timeout_s

    def wait(whom: str) -> None:
        if clock() > deadline:
            raise DeviceBusyError(
                f"host {host.index}: {whom} has not come in time (timeouts.hosts_s): the same "
                "command must be started on every host of the slice"
            )
        waiting(whom)
        time.sleep(_POLL_S)

    store = _reach(host)
    while store is None or not _all_have_come(host, store, wait):
        wait(f"host 0 at {host.coordinator}")
        store = _reach(host)
    try:
        return Peers(host, store, on_lost)
    except RuntimeError as error:
        raise DeviceBusyError(
            f"host {host.index}: the hosts of the job have met and do not reach each other: {error}"
        ) from error


def _reach(host: Host) -> TCPStore | None:
    """The store, served or joined; None while nobody serves it."""
    address, _, port = host.coordinator.rpartition(":")
    try:
        if host.index:  # whose own complaint of a refusal is long
            socket.create_connection((address, int(port)), timeout=_REACH_S).close()
        return TCPStore(
            address,
            int(port),
            host.count,
            is_master=host.index == 0,
            timeout=datetime.timedelta(seconds=_REACH_S),
            wait_for_workers=False,
        )
    except (OSError, RuntimeError):
        return None


def _all_have_come(host: Host, store: Store, wait: Callable[[str], None]) -> bool:
    """Waits for all hosts at a store; False if it is of an attempt that has ended, or ends so."""
    try:
        # What is left of an attempt that has just failed may listen there still. Who comes for a
        # second time while others are awaited has ended meanwhile and was started again.
        came_before = store.add(f"joined/{host.index}", 1) > 1
        if came_before and store.check([_COMPLETE]):
            return False
        while not store.check([_COMPLETE]):
            missing = _answer_the_roll(host, store)
            if not missing:
                store.set(_COMPLETE, "yes")
                break
            wait(f"host {', '.join(str(index) for index in missing)} of {host.count}")
    except DistError:  # the first host has gone, and the store with it
        return False
    return True


def _answer_the_roll(host: Host, store: Store) -> list[int]:
    """Says that this host is here, once all have come; who has not come, or not said so since.

    To have come is not enough: who has ended since, while others were awaited, cannot take it back.
    """
    arrivals = [f"joined/{index}" for index in range(host.count)]
    absent = [index for index, key in enumerate(arrivals) if not store.check([key])]
    if absent:
        return absent
    roll = ",".join(store.get(key).decode() for key in arrivals)
    answers = [f"here/{roll}/{index}" for index in range(host.count)]
    store.set(answers[host.index], "yes")
    return [index for index, key in enumerate(answers) if not store.check([key])]


def _json(store: Store, key: str) -> Json:
    store.wait([key], _FOREVER)
    return json.loads(store.get(key))


def _word(ended: Ended) -> Tensor:
    plain = [ended.exit_code, ended.reason[:_REASON], ended.step, ended.fault]
    said = json.dumps(plain).encode()
    word = torch.zeros(_WORD_BYTES, dtype=torch.uint8)
    word[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    return word


def _ended(word: Tensor) -> Ended:
    return Ended(*json.loads(bytes(word.tolist()).rstrip(b"\0")))
