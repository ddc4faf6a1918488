"""Options that take some of a few names, or a count."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def some(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads "a,b" as those of the choices, in their order, and refuses others."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                allowed = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"must be among {allowed}; got {name!r}")
        return [name for name in choices if name in names]

    return read


def positive(text: str) -> int:
    """Reads a whole number that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1; got {text!r}")
    return int(text)
