"""A mistake in a configuration: which key, what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from runner.record.errors import ConfigError


class Mistake(ConfigError):
    """A key that does not exist, or whose value breaks a rule.

    Args:
        key: The dotted key, for finding the line that set it.
        message: Key, rule, reason and value.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """` (did you mean ...?)` with the nearest of `names`, or an empty string."""
    nearest = nearest_name(word, names)
    return f" (did you mean {nearest!r}?)" if nearest else ""


def nearest_name(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` was probably meant to be.

    A dotted name is also found by its last part, so that `lr` finds `optim.lr`; of several, the
    one with the fewest parts.
    """
    by_folded = {name.lower(): name for name in names}
    folded = word.lower()
    leaf = folded.rpartition(".")[2]
    same_leaf = [name for name in by_folded if name.rpartition(".")[2] == leaf]
    same_leaf.sort(key=lambda name: name.count("."))
    near = same_leaf or difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    if near:
        return by_folded[near[0]]
    leaves = {name.rpartition(".")[2]: full for name, full in by_folded.items()}
    found = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    return leaves[found[0]] if found else None


def listed(names: Iterable[str]) -> str:
    """Names as they are shown in a message; a row of numbered ones as `v5e-1/4/8`."""
    rows: dict[str, list[str]] = {}
    for name in names:
        stem, dash, number = name.rpartition("-")
        row = f"{stem}-" if dash and number.isdigit() else name
        rows.setdefault(row, []).append(number)
    return ", ".join(_shown_row(row, numbers) for row, numbers in rows.items())


def _shown_row(row: str, numbers: list[str]) -> str:
    return row + "/".join(sorted(numbers, key=int)) if row.endswith("-") else row
