"""Texts for TensorBoard, as markdown: the configuration, the environment, the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def config_block(yaml: str) -> str:
    """YAML in a code block."""
    return f"```yaml\n{yaml.rstrip()}\n```"


def text_block(text: str) -> str:
    """Plain text in a code block."""
    return f"```text\n{text.rstrip()}\n```"


def environment_table(facts: Mapping[str, Any]) -> str:
    """What a run ran on; facts within facts get dotted names."""
    return _table(("what", "value"), _flatten(facts, ""))


def graphs_table(graphs: Iterable[Mapping[str, Any]]) -> str:
    """One row a compiled graph, in the order of compilation."""
    header = (
        *("graph", "nodes", "trace s", "XLA s", "input MB", "step", "cause", "passes", "hash"),
    )
    rows = (
        (
            graph["role"],
            graph["nodes"],
            f"{graph['trace_s']:.3f}",
            f"{graph['xla_s']:.3f}",
            f"{graph['bytes'] / 1e6:.2f}",
            graph["step"],
            f"**recompile** {graph['cause']}" if graph["recompile"] else graph["cause"],
            ", ".join(f"{name} {count}" for name, count in graph["passes"].items()),
            graph["hash"],
        )
        for graph in graphs
    )
    return _table(header, rows)


def _flatten(facts: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
