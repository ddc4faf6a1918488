"""What the person at the terminal sees, with a terminal and without."""

from __future__ import annotations

import io
import os
import pathlib
import pty
import re
import shlex
import subprocess
import sys
import time

import pytest

from runner.observe.console import Console
from runner.observe.metrics import Tally
from runner.record.events import Event, Notice, Planned
from runner.record.outcome import Attempt, Goodput, Result, State, StepFigures, Throughput
from tests.observe.conftest import Clock, recorded_run, started, steps_event


def shown(events: list[Event], clock: Clock, *, seconds_a_step: float = 0.0) -> list[str]:
    """The lines that events make where there is no terminal."""
    stream, tally = io.StringIO(), Tally(clock=clock)
    console = Console(stderr=stream, stdout=io.StringIO(), clock=clock)
    for event in events:
        clock.seconds += seconds_a_step
        console.handle(event, tally.take(event))
    console.close()
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_run_is_plain_lines(clock: Clock) -> None:
    assert shown(recorded_run(), clock)[:8] == [
        "started on CPU (process 4242)",
        "compiling forward",
        "compiled forward: 120 nodes, trace 0.5 s, XLA 1.5 s",
        "compiled backward: 120 nodes, trace 0.5 s, XLA 1.5 s",
        "step 1/6  loss 2.0000  lr 0.1",
        "step 2/6  loss 1.0000  lr 0.1  2,667 examples/s  12.0 ms/step  0 s left",
        "step 3/6  loss 0.6667  lr 0.1  2,462 examples/s  13.0 ms/step  0 s left",
        "compiled eval: 120 nodes, trace 0.5 s, XLA 1.5 s",
    ]


def test_a_long_run_has_a_line_every_tenth_or_ten_seconds(clock: Clock) -> None:
    plan = Planned(1000, 1, 1, 1, 1, None)
    steps = [steps_event(step) for step in range(1, 1001)]
    fast = shown([started(), plan, *steps], clock)
    assert [line.split()[1] for line in fast[1:]] == [
        f"{step}/1000" for step in (*range(1, 1000, 100), 1000)
    ]
    slow = shown([started(), plan, *steps[:30]], clock, seconds_a_step=5.0)
    assert [line.split()[1] for line in slow[1:4]] == ["1/1000", "3/1000", "5/1000"]


def test_log_lines_and_notices_are_text_and_nothing_but_text(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(stderr=stream, stdout=io.StringIO(), clock=clock)
    console.echo("[bold]not markup[/bold] :smile: \x1b[2J\x1b[31mred\x1b[0m")
    console.handle(Notice("warning", "[red]x[/red]"))
    console.handle(Notice("info", "y"))
    assert stream.getvalue().splitlines() == [
        "[bold]not markup[/bold] :smile: red",
        "warning: [red]x[/red]",
        "y",
    ]


RESULT = Result(
    "toy",
    "openxla",
    State.FAILED,
    72,
    "the loss must be a finite number; it was nan at step 3",
    attempts=[Attempt("start", 71, 3, 5.0), Attempt("retry", 72, 3, 5.0)],
    steps=3,
    step=StepFigures(12.0, 15.5, 1.0, 0.0, 1.0),
    throughput=Throughput(2666.6),
    goodput=Goodput(productive_s=30.0, lost_s=75.0),
    final={"train/loss": 0.25, "eval/accuracy": 0.975},
)


def test_the_final_table_goes_to_stdout_and_ends_with_a_command_to_paste(
    tmp_path: pathlib.Path,
) -> None:
    out, err = io.StringIO(), io.StringIO()
    logdir = tmp_path / ("it's a long name " * 10)
    Console(stderr=err, stdout=out).summary(RESULT, logdir)
    table, command = out.getvalue().rstrip("\n").rsplit("\n", 1)
    assert err.getvalue() == f"runner: {RESULT.reason}\n"
    for text in (
        "failed (exit code 72)",
        "12.00 ms median, 15.50 ms p95",
        "2,666.6 examples/s",
        "0.975",
        "30 s productive, 1:15 lost",
    ):
        assert text in table
    assert shlex.split(command) == ["tensorboard", "--logdir", str(logdir)]


SHOW = """
import pathlib
from runner.observe.console import Console
from runner.observe.metrics import Tally
from runner.record.outcome import Result, State
from tests.observe.conftest import recorded_run
console, tally = Console(), Tally()
for event in recorded_run():
    console.handle(event, tally.take(event))
    if event.kind == "steps":
        console.echo("[b]a line\\u2026 of the log[/b]")
console.close()
result = tally.fill(Result("toy", "openxla", State.SUCCEEDED, 0))
console.summary(result, pathlib.Path("outputs/toy"))
"""


def on_terminal(**environment: str) -> str:
    """What a terminal shows of a recorded run."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SHOW],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env,
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(master, 65536)
        except OSError:  # Linux says EIO when the last writer has gone.
            break
    os.close(master)
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


def test_on_a_terminal_progress_is_drawn_and_the_log_scrolls_above() -> None:
    text = on_terminal()
    assert "\x1b[?25l" in text
    assert text.count("\x1b[?25h") == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "step 6/6" in plain
    assert "ms/step" in plain
    assert plain.count("[b]a line\u2026 of the log[/b]") == 6
    assert "eval at step 6: loss 0.7000  accuracy 0.7500  (100 examples)" in plain
    assert plain.rstrip().endswith("tensorboard --logdir outputs/toy")


@pytest.mark.parametrize("columns", ["1", "7", "20", "49"])
def test_a_narrow_terminal_is_no_obstacle(columns: str) -> None:
    text = on_terminal(COLUMNS=columns)
    assert "tensorboard --logdir outputs/toy" in text


def test_colour_is_left_out_where_it_is_not_wanted() -> None:
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_terminal(NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines() -> None:
    text = on_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "step 1/6  loss 2.0000" in text


def test_a_locale_without_unicode_is_no_obstacle() -> None:
    text = on_terminal(PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert "a line? of the log" in text


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_goes_away_does_not_end_the_run(closed: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SHOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    streams = {"stdout": process.stdout, "stderr": process.stderr}
    gone = streams.pop(closed)
    assert gone is not None
    gone.close()
    (kept,) = streams.values()
    assert kept is not None
    text = kept.read().decode()
    kept.close()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in text
    assert "BrokenPipe" not in text
    assert ("step 6/6" if closed == "stdout" else "toy (openxla)") in text


def test_output_to_a_full_disk_does_not_change_the_exit_code() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SHOW], stdout=full, stderr=full, check=False)
    assert done.returncode == 0
