"""Hosts that meet over the loopback network: what they agree on, and how they end together."""

from __future__ import annotations

import concurrent.futures
import gc
import pathlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from runner.backends.snapshot import HostPiece, HostTensor, Snapshot
from runner.config.hosts import Host
from runner.record.errors import DeviceBusyError
from runner.record.events import Ended
from runner.record.storage import LocalStorage
from runner.train.checkpoint import Label, load, save
from runner.train.hosts import Hosts, join

T = TypeVar("T")
COUNT = 3
DONE = Ended(0, "", 7)


class Met:
    """Hosts that have met, each in a thread of its own for what it is asked to do."""

    def __init__(self) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self._coordinator = f"127.0.0.1:{listening.getsockname()[1]}"
        self._pool = concurrent.futures.ThreadPoolExecutor(COUNT)
        self.lost: dict[int, Ended] = {}
        self.heard = threading.Semaphore(0)
        self.hosts = list(self._pool.map(self._join, range(COUNT)))

    def all(self, do: Callable[[Hosts], T]) -> list[T]:
        """What every host makes of it, side by side."""
        return list(self._pool.map(do, self.hosts))

    def _join(self, index: int) -> Hosts:
        def on_lost(ended: Ended) -> None:
            self.lost[index] = ended
            self.heard.release()

        host = Host(index, COUNT, self._coordinator)
        return join(host, timeout_s=30, waiting=lambda whom: None, on_lost=on_lost)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Met:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return Met()


def test_a_vote_is_the_largest_of_each(met: Met) -> None:
    assert met.all(lambda hosts: hosts.largest(hosts.index, -hosts.index)) == [[2, 0]] * COUNT
    met.all(lambda hosts: hosts.leave(DONE))
    assert met.lost == {}


def test_the_first_decides_by_what_all_say(met: Met) -> None:
    decided = []

    def decide(words: list[dict[str, int]]) -> dict[str, int]:
        decided.append(words)
        return {"sum": sum(word["own"] for word in words)}

    for turn in range(3):
        told = met.all(
            lambda hosts, turn=turn: hosts.settle("sum", {"own": hosts.index + turn}, decide)
        )
        assert told == [{"sum": 3 + COUNT * turn}] * COUNT
    assert decided[1] == [{"own": 1}, {"own": 2}, {"own": 3}]
    met.all(lambda hosts: hosts.leave(DONE))


def test_how_one_failed_reaches_all_others(met: Met) -> None:
    """The two that are not the first have no line to each other."""
    met.hosts[1].leave(Ended(65, "no data", 4, "final"))
    for _ in range(COUNT - 1):
        assert met.heard.acquire(timeout=20)
    said = Ended(65, "host 1: no data", 4, "final")
    assert met.lost == {0: said, 2: said}


def test_a_host_alone_asks_nobody() -> None:
    alone = join(Host(), timeout_s=0, waiting=lambda whom: None, on_lost=lambda ended: None)
    assert alone.first
    assert alone.largest(3, 4) == [3, 4]
    assert alone.settle("word", "own", lambda words: words) == ["own"]
    alone.leave(DONE)


@pytest.mark.parametrize(("index", "whom"), [(0, "host 1 of 2"), (1, "host 0 at 127.0.0.1:")])
def test_who_is_missing_is_named(index: int, whom: str) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    waited: list[str] = []
    with pytest.raises(DeviceBusyError, match=f"{whom}.* has not come in time"):
        join(
            Host(index, 2, f"127.0.0.1:{port}"),
            timeout_s=2,
            waiting=waited.append,
            on_lost=lambda ended: None,
        )
    assert waited[0].startswith(whom)


Come = Callable[..., Hosts]


@pytest.fixture
def come(monkeypatch: pytest.MonkeyPatch) -> Come:
    """Joins as the host of an index; `waiting` hears for whom it waits."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listening.getsockname()[1]}"

    def come(index: int, *, waiting: Callable[[str], None] = lambda whom: None) -> Hosts:
        host = Host(index, COUNT, coordinator)
        return join(host, timeout_s=60, waiting=waiting, on_lost=lambda ended: None)

    return come


class Gone(Exception):
    """A host has ended while it waited."""


def wait_for(told: queue.Queue[str], whom: str) -> None:
    while not told.get(timeout=60).startswith(whom):
        pass


def test_who_ends_and_comes_again_while_others_are_awaited_is_taken(come: Come) -> None:
    told: queue.Queue[str] = queue.Queue()

    def go(whom: str) -> None:
        if whom == "host 2 of 3":
            raise Gone

    with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
        first = pool.submit(come, 0)
        with pytest.raises(Gone):
            come(1, waiting=go)
        last = pool.submit(come, 2, waiting=told.put)
        wait_for(told, "host 1 of 3")
        again = pool.submit(come, 1)
        hosts = [each.result(timeout=60) for each in (first, again, last)]
        votes = pool.map(lambda each: each.largest(each.index), hosts)
        assert list(votes) == [[2]] * COUNT
        list(pool.map(lambda each: each.leave(DONE), hosts))


def test_the_first_host_may_end_and_come_again_while_others_are_awaited(come: Come) -> None:
    told: queue.Queue[str] = queue.Queue()

    def go(_: str) -> None:
        if "host 2 of 3" in told.queue:
            raise Gone

    with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
        second = pool.submit(come, 1, waiting=told.put)
        with pytest.raises(Gone):
            come(0, waiting=go)
        gc.collect()  # its store, as the end of its process does
        wait_for(told, "host 2 of 3")
        wait_for(told, "host 0 at ")
        others = [pool.submit(come, index) for index in (0, 2)]
        hosts = [each.result(timeout=60) for each in (second, *others)]
        list(pool.map(lambda each: each.leave(DONE), hosts))


def test_a_long_reason_in_any_script_is_told(met: Met) -> None:
    met.hosts[0].leave(Ended(65, "数" * 2000, 4, "final"))
    for _ in range(COUNT - 1):
        assert met.heard.acquire(timeout=20)
    assert met.lost[1].reason.startswith("host 0: 数数数")


def snapshot(index: int) -> Snapshot:
    """Two of twelve numbers' parts are host 0's, one each the others'; a scale is everybody's."""
    numbers = torch.arange(12.0).reshape(4, 3)
    rows = {0: (0, 1), 1: (2,), 2: (3,)}[index]
    pieces = tuple(HostPiece((row, 0), numbers[row : row + 1]) for row in rows)
    whole = HostTensor((2,), (HostPiece((0,), torch.tensor([5.0, 6.0])),))
    return Snapshot(30, {"params/numbers": HostTensor((4, 3), pieces), "buffers/scale": whole})


def test_every_host_writes_its_pieces_and_the_first_commits(
    met: Met, tmp_path: pathlib.Path
) -> None:
    label = Label({"numbers": "params/numbers"}, {"job": "test"})
    storage = LocalStorage(tmp_path)
    for _ in range(2):  # a step that is saved again takes the place of the first
        saved = met.all(
            lambda hosts: save(storage, snapshot(hosts.index), label=label, hosts=hosts)
        )
    assert len(set(saved)) == 1
    manifest, tensors = load(storage, "step-00000030")
    assert torch.equal(tensors["params/numbers"], torch.arange(12.0).reshape(4, 3))
    assert tensors["buffers/scale"].tolist() == [5.0, 6.0]
    assert len(manifest.tensors["buffers/scale"].pieces) == 1
    assert manifest.state_dict == {"numbers": "params/numbers"}
    assert len(manifest.files) == COUNT
    met.all(lambda hosts: hosts.leave(DONE))


def test_a_host_that_cannot_write_fails_the_save_for_all(met: Met, tmp_path: pathlib.Path) -> None:
    class Full(LocalStorage):
        def write(self, *arguments: object) -> None:  # type: ignore[override]
            raise OSError(28, "No space left on device", "model-1-00000.safetensors")

    storages = {0: LocalStorage(tmp_path), 1: Full(tmp_path), 2: LocalStorage(tmp_path)}

    def failure(hosts: Hosts) -> str:
        with pytest.raises(OSError, match="No space left") as raised:
            save(storages[hosts.index], snapshot(hosts.index), label=Label({}, {}), hosts=hosts)
        return str(raised.value)

    assert set(met.all(failure)) == {
        "[Errno 28] No space left on device: 'model-1-00000.safetensors'"
    }
    assert storages[0].steps() == []
    met.all(lambda hosts: hosts.leave(DONE))
