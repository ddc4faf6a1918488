"""A preflight's report as tables: what it needs, what it costs, what to try."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.record.preflight import Estimate, ModuleCost, PreflightReport, Roof, Trial

_MODULES = 14
_TEXT_WIDTH = 120
_ROOFS = {"compute": "the chip's arithmetic", "hbm": "its memory", "interconnect": "its links"}


def print_preflight(console: Console, report: PreflightReport) -> None:
    """Print a report."""
    console.print(_facts(report))
    if report.largest:
        console.print(_largest(report))
    if report.collectives:
        console.print(_collectives(report))
    if report.estimate is not None:
        console.print(_modules(report.estimate))
        console.print(Text(_without(report.estimate)), soft_wrap=True)
    for title, trials in (("search", report.search), ("what to try", report.suggestions)):
        if trials:
            console.print(_trials(title, trials))
    console.print(Text("A roof is a bound, not a prediction. Not modelled: "), end="")
    console.print(Text("; ".join(report.unmodelled) + "."), soft_wrap=True)
    console.print(Text(report.reason, style="green" if report.fits else "red"), soft_wrap=True)


def preflight_text(report: PreflightReport) -> str:
    """The same as plain text."""
    stream = io.StringIO()
    print_preflight(Console(file=stream, width=_TEXT_WIDTH), report)
    return stream.getvalue()


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def number(value: float) -> str:
    """A large number with a decimal prefix."""
    for unit in (" ", " k", " M", " G", " T"):
        if abs(value) < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g} P"


def _facts(report: PreflightReport) -> Table:
    table = _table(f"preflight on {report.hardware}", ("", ""))
    for name, value in _fact_rows(report):
        table.add_row(Text(name), Text(value))
    return table


def _fact_rows(report: PreflightReport) -> Iterator[tuple[str, str]]:
    seconds, hbm = report.seconds, report.hbm
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    yield "slice", f"{report.chip}, {report.chips} chips" + (f" ({mesh})" if mesh else "")
    yield "model", f"{number(report.parameters)} parameters, {report.nodes:,} operations traced"
    known = "from the cache; it took " if report.cached else ""
    yield (
        "compile",
        f"{known}{seconds.compile:.1f} s (trace {seconds.trace:.1f} s, "
        f"lowering {seconds.lower:.1f} s)",
    )
    share = f"{hbm.total / hbm.capacity:.1%}"
    yield "memory of a chip", f"{size(hbm.total)} of {size(hbm.capacity)} ({share})"
    yield "  arguments", f"{size(hbm.arguments)} ({size(report.arguments_bytes)} without padding)"
    if hbm.outputs:
        yield "  results", f"{size(hbm.outputs)}, {size(hbm.aliased)} of it in arguments' place"
    yield "  temporaries", size(hbm.temporaries)
    if hbm.program:
        yield "  program", size(hbm.program)
    yield "model FLOPs a step", f"{number(report.model_flops)}FLOP on all chips"
    if report.roof is not None and report.estimate is not None:
        yield (
            "a chip's step",
            f"{number(report.flops)}FLOP, {size(report.hbm_bytes)} of memory traffic",
        )
        yield from _speed(report.roof, report.estimate, batch_size=report.batch_size)


def _speed(roof: Roof, estimate: Estimate, *, batch_size: int) -> Iterator[tuple[str, str]]:
    yield (
        "roof",
        f"{_ms(roof.step_s)} a step, bound by {_ROOFS[roof.binds]} (compute {_ms(roof.compute_s)}, "
        f"memory {_ms(roof.hbm_s)}, links {_ms(roof.interconnect_s)})",
    )
    tokens = f", {roof.tokens_per_s:,.0f} tokens/s" if roof.tokens_per_s else ""
    yield (
        "at the roof",
        f"{roof.examples_per_s:,.0f} examples/s{tokens}; MFU at most {roof.mfu:.1%}",
    )
    yield (
        "compiler's estimate",
        f"{_ms(estimate.step_s)} a step ({number(estimate.cycles)}cycles), "
        f"{batch_size / estimate.step_s:,.0f} examples/s",
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _largest(report: PreflightReport) -> Table:
    table = _table("largest arrays of a chip", ("size", "what", "kind", "shape", "line"))
    for one in report.largest:
        cells = (size(one.bytes), one.what, one.kind, one.shape, one.source)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _collectives(report: PreflightReport) -> Table:
    table = _table("collectives of a step", ("kind", "count", "bytes", "a chip sends"))
    for one in report.collectives:
        cells = (one.kind, f"{one.count:,}", size(one.bytes), size(one.wire_bytes))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _modules(estimate: Estimate) -> Table:
    headings = ("module", "share", "forward", "backward", "other", "model FLOPs")
    table = _table("compiler's estimate by module, in cycles", headings)
    for row in grouped(estimate.modules, rows=_MODULES):
        cells = (
            row.module,
            f"{row.cycles / max(estimate.cycles, 1):.1%}",
            *(f"{count:,}" if count else "" for count in (row.forward, row.backward, row.other)),
            number(row.flops) if row.flops else "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def grouped(modules: Sequence[ModuleCost], *, rows: int) -> list[ModuleCost]:
    """At most `rows` rows: modules under a common name together, the dearest taken apart first."""
    groups = _by_prefix(modules, 1)
    while True:
        dearest = sorted(groups, key=lambda name: -sum(one.cycles for one in groups[name]))
        for name in dearest:
            depth = name.count(".") + 2
            parts = _by_prefix(groups[name], depth)
            if len(parts) > 1 and len(groups) - 1 + len(parts) <= rows:
                del groups[name]
                groups.update(parts)
                break
        else:
            return [_sum(name, groups[name]) for name in dearest[:rows]]


def _by_prefix(modules: Iterable[ModuleCost], depth: int) -> dict[str, list[ModuleCost]]:
    groups: dict[str, list[ModuleCost]] = {}
    for one in modules:
        own = one.module.startswith("(")
        name = one.module if own else ".".join(one.module.split(".")[:depth])
        groups.setdefault(name, []).append(one)
    return groups


def _sum(name: str, modules: Sequence[ModuleCost]) -> ModuleCost:
    return ModuleCost(
        name,
        forward=sum(one.forward for one in modules),
        backward=sum(one.backward for one in modules),
        other=sum(one.other for one in modules),
        flops=sum(one.flops for one in modules),
    )


def _without(estimate: Estimate) -> str:
    most = sorted(estimate.without.items(), key=lambda item: -item[1])[:8]
    listed = ", ".join(f"{count:,} {name}" for name, count in most)
    return f"Without an estimate: {listed}." if listed else "Every operation has an estimate."


def _trials(title: str, trials: Sequence[Trial]) -> Table:
    table = _table(title, ("change", "verdict", "memory", "estimate", "why"))
    for one in trials:
        verdict = {True: "fits", False: "does not fit", None: "not compiled"}[one.fits]
        cells = (
            one.change,
            verdict,
            size(one.total) if one.total else "",
            _ms(one.step_s) if one.step_s else "",
            one.why,
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(
        box=box.SIMPLE, title=Text(title), show_header=any(headings), title_justify="left"
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
