"""A worker's stop flag hears signals, whatever started the worker."""

from __future__ import annotations

import signal
import subprocess
import sys

_PROGRAM = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
from runner.train.signals import StopFlag
flag = StopFlag()
flag.install()
os.kill(os.getpid(), signal.SIGINT)
print(flag.number)
"""


def test_a_signal_that_the_starting_thread_had_blocked_is_heard() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"{signal.SIGINT.value}\n"
