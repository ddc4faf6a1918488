"""What an exception that nobody expected means: an exit code, a reason, and what may be retried."""

from __future__ import annotations

import re

import psutil

from runner.record.errors import ExitCode, Fault, is_busy

#: The runtime's words for one on the device; the name of its status is not always among them.
_DEVICE_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory allocating", "Ran out of memory in memory")
#: torch's words for an allocation on the host that failed.
_HOST_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_SIZE = re.compile(r"\d[\d,.]*\s*(?:[KMGT]i?B?|bytes)\b")


def explain(error: Exception, *, state_bytes: int) -> tuple[ExitCode, str, Fault]:
    """Exit code, reason and fault of an exception of the job, of torch or of the runtime.

    Args:
        error: What was raised.
        state_bytes: Bytes of the training state, for the message when memory is short.
    """
    text = str(error)
    if any(words in text for words in _DEVICE_WORDS):
        reason = f"out of device memory: {_sizes(text)}{first_line(error)}; the training state "
        reason += f"takes {_gb(state_bytes)}. Smaller job.batch_size, or larger accumulate_steps"
        return ExitCode.DEVICE, reason, Fault.FINAL
    if isinstance(error, MemoryError) or any(words in text for words in _HOST_WORDS):
        return ExitCode.DEVICE, f"out of host memory: {_host(error)}", Fault.HOST_MEMORY
    reason = f"{type(error).__name__}: {first_line(error)}"
    if is_busy(text):
        return ExitCode.DEVICE, reason, Fault.INFRASTRUCTURE
    return ExitCode.BUG, reason, Fault.FAILURE


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _sizes(text: str) -> str:
    first, _, rest = text.strip().partition("\n")
    found = [] if _SIZE.search(first) else _SIZE.findall(rest)
    return f"{found[0]} asked for: " if found else ""


def _host(error: Exception) -> str:
    memory = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    said = f"{first_line(error)}; " if str(error) else ""
    return (
        f"{said}the process holds {_gb(resident)}, the machine has {_gb(memory.available)} "
        f"free of {_gb(memory.total)}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
