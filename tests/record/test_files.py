"""What is written is whole or not there; what is read back is what was written."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from runner.record import events
from runner.record.files import strict_json, write_atomic, write_json
from runner.record.pipe import EventReader, EventWriter


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "result.json"
    write_atomic(target, "old")
    code = (
        "import resource, pathlib, sys; from runner.record.files import write_atomic\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomic(pathlib.Path(sys.argv[1]), 'x' * 5000)\n"
        "except OSError: sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], timeout=60, check=False)
    assert done.returncode == 3
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_numbers_that_json_lacks_are_written_as_words(tmp_path: pathlib.Path) -> None:
    value = {"a": [math.nan, 1.5], "b": {"c": math.inf}}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", value)
    write_json(tmp_path / "x.json", strict_json(value))
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": ["NaN", 1.5],
        "b": {"c": "Infinity"},
    }


EVENTS: list[events.Event] = [
    events.Started(pid=1, device="xla:0", devices=1, versions={"torch": "2.9.0"}),
    events.Phase("compiling", "forward"),
    events.Compiled(events.GraphRecord("step", 3, 0.1, 0.2, "ab", 12, 0, "first call")),
    events.Steps(
        records=[events.StepRecord(1, 2.0, 1.0, 0.5, 3.0, True)],
        metrics={"loss": 0.25},
        compile_count=1,
        compile_s=0.2,
        device_bytes=8,
        host_rss_bytes=9,
        examples_per_step=32,
    ),
    events.Evaluated(1, {"accuracy": 0.5}, examples=10, seconds=0.1),
    events.Saving(1),
    events.CheckpointSaved(1, "checkpoints/step-00000001", 10, 0.1),
    events.Notice("warning", "line one\nline two"),
    events.Ended(0, "", 1),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_survives_the_wire(event: events.Event) -> None:
    line = events.encode(event)
    assert line.count(b"\n") == 1
    assert events.decode(line) == event


def test_events_arrive_whole_however_the_bytes_are_cut() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    reader = EventReader(reading)
    data = b"".join(events.encode(event) for event in EVENTS)
    got: list[events.Event] = []
    for start in range(0, len(data), 7):
        os.write(writing, data[start : start + 7])
        got.extend(reader.read())
    os.close(writing)
    got.extend(reader.read())
    assert got == EVENTS
    assert reader.closed
    os.close(reading)


def test_a_line_that_is_no_event_is_an_error() -> None:
    for line in (b"{}", b'{"kind": "steps"}', b"[1]", b'{"kind": "no such"}', b"{"):
        with pytest.raises(ValueError):  # noqa: PT011 - json and our own both derive from it
            events.decode(line)


def test_a_writer_whose_reader_is_gone_goes_on() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    EventWriter(writing).send(EVENTS[0])
    os.close(writing)


def test_before_a_save_the_worker_waits_until_all_before_it_is_recorded() -> None:
    reading, writing = os.pipe()
    answered, answering = os.pipe()
    os.set_blocking(reading, False)
    writer, reader = EventWriter(writing, answered), EventReader(reading, answering)
    for event in EVENTS[:3]:
        writer.send(event)
    saving = threading.Thread(target=writer.send, args=[events.Saving(1)], daemon=True)
    saving.start()
    recorded: list[events.Event] = []
    deadline = time.monotonic() + 60
    while events.Saving(1) not in recorded and time.monotonic() < deadline:
        for event in reader.read():
            saving.join(0.1)
            assert saving.is_alive(), "it goes on though the last event is not recorded"
            recorded.append(event)
    assert recorded == [*EVENTS[:3], events.Saving(1)]
    saving.join(60)
    assert not saving.is_alive()
    for descriptor in (reading, writing, answered, answering):
        os.close(descriptor)


def test_a_worker_whose_runner_is_gone_saves_nothing_more() -> None:
    reading, writing = os.pipe()
    answered, answering = os.pipe()
    os.close(answering)
    with pytest.raises(ConnectionError, match="the runner is gone"):
        EventWriter(writing, answered).send(events.Saving(1))
    for descriptor in (reading, writing, answered):
        os.close(descriptor)
