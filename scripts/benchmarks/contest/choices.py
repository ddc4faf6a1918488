"""An option that takes some of a few names."""

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
