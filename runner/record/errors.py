"""Typed errors and the exit code that each one ends a run with.

A user error states the key, the rule, the reason and the value. Anything that is not a
`RunnerError` is our bug or an exception of the job's own code, and ends with `ExitCode.BUG`.
"""

from __future__ import annotations

import enum

#: What the TPU runtime says when another process has the chip.
_BUSY_WORDS = ("Device or resource busy", "already in use", "libtpu_lockfile")


class ExitCode(enum.IntEnum):
    """Process exit codes; part of the contract (README, "Exit codes")."""

    DONE = 0
    JOB_FAILED = 1
    CONFIG = 64
    DATA = 65
    BUSY = 66
    BUG = 70
    DEVICE = 71
    NON_FINITE = 72
    CHECKPOINT = 73
    HANG = 74
    PREEMPTED = 75
    PRUNED = 76
    INTERRUPTED = 130


class Fault(str, enum.Enum):
    """What ended an attempt, as far as trying again goes; each has a budget of its own."""

    NONE = ""
    FINAL = "final"  # It would come again, or somebody wanted it: never retried.
    FAILURE = "failure"
    PREEMPTION = "preemption"
    INFRASTRUCTURE = "infrastructure"
    HOST_MEMORY = "host memory"


class RunnerError(Exception):
    """An error with a known cause: it is shown as one message, without a traceback."""

    exit_code: ExitCode = ExitCode.BUG
    fault: Fault = Fault.FINAL


class ConfigError(RunnerError):
    """The configuration names something that does not exist or breaks a rule."""

    exit_code = ExitCode.CONFIG


class DataError(RunnerError):
    """Data is missing or broken; the message names the file or folder."""

    exit_code = ExitCode.DATA


class BusyError(RunnerError):
    """Another process owns the run folder."""

    exit_code = ExitCode.BUSY


class BackendError(RunnerError):
    """A model cannot be compiled as asked, or broke a rule such as `strict`."""

    exit_code = ExitCode.BUG


class DeviceError(RunnerError):
    """The device is missing, failed, or is out of memory."""

    exit_code = ExitCode.DEVICE


class DeviceBusyError(DeviceError):
    """The device is there, and some other process has it still."""

    fault = Fault.INFRASTRUCTURE


class NonFiniteError(RunnerError):
    """The loss is no longer a finite number."""

    exit_code = ExitCode.NON_FINITE


class CheckpointError(RunnerError):
    """A checkpoint cannot be written, or none can be read."""

    exit_code = ExitCode.CHECKPOINT


class StopRequested(RunnerError):
    """The loop ended early because it was asked to.

    Args:
        message: What asked for the stop, for the record.
        exit_code: `PREEMPTED` for SIGTERM, `INTERRUPTED` for Ctrl-C.
    """

    def __init__(self, message: str, *, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.fault = Fault.PREEMPTION if exit_code is ExitCode.PREEMPTED else Fault.FINAL


def is_busy(message: str) -> bool:
    """Whether an error's text says that another process has the device."""
    return any(words in message for words in _BUSY_WORDS)
