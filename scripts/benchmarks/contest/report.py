"""Shows the rows of `scripts/bench step` as a table, and beneath it what they amount to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contest.rounds import Row, ratio
from contest.targets import Target

COLUMNS = (
    "first s",
    "XLA s",
    "compiles",
    "step ms",
    "p95 ms",
    "host ms",
    "after ms",
    "program ms",
    "programs",
    "held MB",
    "x step",
    "host/bind",
)
WIDTH = 164
#: The share of the machine's CPU time from which others are said to disturb.
DISTURBED = 0.05


def show(rows: Sequence[Row], targets: Sequence[Target]) -> None:
    """Print table, notes and targets."""
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    console.print(_table(rows))
    for line in notes(rows):
        console.print(line, highlight=False, markup=False)
    if targets:
        console.print(_verdicts(targets))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="A training step, by contestant (milliseconds of one optimizer update)")
    table.add_column("contestant", overflow="fold", min_width=28, max_width=28)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    model = None
    for row in rows:
        if row.model != model:
            model = row.model
            table.add_section()
            count = next((r.parameters for r in rows if r.model == model and r.parameters), 0)
            table.add_row(f"[bold]{model}[/bold] ({count:,} parameters)")
        name = f"  {row.contestant}"
        table.add_row(
            escape(f"{name}: {row.error}") if row.error else name,
            *([] if row.error else _cells(row)),
        )
    return table


def _cells(row: Row) -> list[str]:
    held = None if row.device_bytes is None else row.device_bytes / 1e6
    return [
        _number(row.first_step_s, 2),
        _number(row.compile_s, 2),
        _number(row.compiles, 0),
        _number(row.step_median_ms, 2),
        _number(row.step_p95_ms, 2),
        _number(row.host_ms, 3),
        _number(row.after_ms, 3),
        _number(row.program_ms, 2),
        _number(row.programs_per_step, 1),
        _number(held, 1),
        _number(row.to_openxla_step, 2),
        _number(row.host_to_binding, 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What to know before believing the table."""
    for model in dict.fromkeys(row.model for row in rows):
        others = max(row.others_cpu_share for row in rows if row.model == model)
        if others > DISTURBED:
            yield f"{model}: others used {others:.0%} of the CPU: do not trust these"
        ran = {r.contestant: r for r in rows if r.model == model and r.error is None}
        yield from _floor(model, ran)
        yield from _inline(model, ran)
        yield from _agreement(model, list(ran.values()))
    if any(row.device_bytes_source == "state" for row in rows):
        yield "held MB: the runtime reports nothing here; parameters, buffers and state are counted"


def _floor(model: str, rows: dict[str, Row]) -> Iterator[str]:
    lazy, step = rows.get("lazy"), rows.get("openxla_step")
    if not lazy or not step:
        return
    most = ratio(lazy.step_median_ms, step.program_ms)
    if most is not None:
        yield (
            f"{model}: the program alone takes {step.program_ms:.2f} ms of lazy's "
            f"{lazy.step_median_ms:.2f} ms a step: without host time a step would be "
            f"{most:.1f} times faster than lazy"
        )


def _inline(model: str, rows: dict[str, Row]) -> Iterator[str]:
    jax = rows.get("jax")
    share = ratio(jax.host_ms, jax.waited_ms) if jax else None
    if share is not None and share > 0.5:
        yield f"{model}: JAX ran the program before its call returned: its host ms contains it"


def _agreement(model: str, rows: Sequence[Row]) -> Iterator[str]:
    if len({row.parameters for row in rows}) > 1:
        counts = ", ".join(f"{row.contestant} {row.parameters}" for row in rows)
        yield f"{model}: parameter counts must be equal; got {counts}"
    if len(rows) > 1:
        first, tenth = (
            max(row.losses[i] for row in rows) - min(row.losses[i] for row in rows) for i in (0, -1)
        )
        yield (
            f"{model}: first losses are {rows[0].losses[0]:.6f} within {first:.1e}, "
            f"tenth {rows[0].losses[-1]:.6f} within {tenth:.1e}"
        )


def _verdicts(targets: Sequence[Target]) -> Table:
    table = Table(title="openxla_step's targets")
    for name in ("model", "figure", "target", "measured", ""):
        table.add_column(name, justify="right" if name == "measured" else "left")
    words = {True: "[green]met[/green]", False: "[red]not met[/red]", None: "not measured"}
    for target in targets:
        table.add_row(
            target.model,
            target.what,
            f"{target.bound} {target.limit:g}",
            _number(target.figure, 2),
            words[target.met],
        )
    return table
