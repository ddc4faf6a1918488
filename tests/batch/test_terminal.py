"""A batch on a terminal: the table is drawn while jobs run."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pty
import re
import struct
import subprocess
import termios

from tests.batch.toys import ROOT, Toys


def on_a_terminal(argv: list[str], folder: pathlib.Path) -> tuple[int, str]:
    """Run a command on a terminal of 30 lines and 100 columns: exit code, what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    more = {"PYTHONPATH": str(ROOT), "RUNNER_TRUST": "tests", "TERM": "xterm-256color"}
    with subprocess.Popen(
        argv, cwd=folder, env={**environment, **more}, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                written += chunk
        except OSError:  # what a terminal says when nobody has its other end any more
            pass
        os.close(ours)
        code = process.wait(timeout=60)
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def test_the_table_is_drawn_with_what_tells_the_jobs_apart(tmp_path: pathlib.Path) -> None:
    toys = Toys(tmp_path)
    argv = toys.argv("seed=0,1,2", "optim.lr=0.1", "model.step_s=0.1", "steps=12")
    code, written = on_a_terminal(argv, tmp_path)
    assert code == 0, written
    assert "Traceback" not in written
    rows = [" ".join(line.split()) for line in written.splitlines()]
    assert "job overrides state step loss rate left" in rows
    assert any(re.match(r"0 seed=0 running step \d+/12 \d\.\d{4} ", row) for row in rows)
    done = [row for row in rows if row.startswith("1 seed=1 succeeded train/loss=")]
    assert done, "a long result takes no room from the other columns"
    assert "2 seed=2 pending" in rows
    assert "3 of 3 jobs succeeded" in written
