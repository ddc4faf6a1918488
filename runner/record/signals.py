"""Signals that the parent sends and the worker takes, besides those that the system names."""

from __future__ import annotations

import signal

#: Asks a worker to write the stacks of all its threads to its log, even from inside a compile.
SHOW_STACKS = signal.SIGUSR1
