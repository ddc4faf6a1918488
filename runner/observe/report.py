"""A report on runs: one HTML file that opens offline, with charts and a table that sorts.

Everything that a run brought along (names, overrides, reasons) is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from runner.observe.charts import colour, histogram, line_chart, stacked_bars
from runner.observe.history import RunHistory
from runner.record.outcome import Result

#: Tags that a report needs of a run.
TAGS = ("train/loss", "step/time_ms", "eval/")

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
h1{font-size:20px}h2{font-size:16px;margin-top:2em}
svg{width:100%;max-width:820px;font:11px system-ui,sans-serif}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr:nth-child(even){background:#f6f6f6}
th{cursor:pointer;border-bottom:1px solid #888;white-space:nowrap}.bad{color:#b00}
.legend span{margin-right:1em}
.legend b{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
div.wide{overflow-x:auto}
"""
_SCRIPT = """
document.querySelectorAll("th").forEach(function (head, column) {
  head.addEventListener("click", function () {
    var body = head.closest("table").tBodies[0];
    var up = head.dataset.up !== "1";
    head.dataset.up = up ? "1" : "0";
    var key = function (row) { return row.cells[column].dataset.v; };
    Array.from(body.rows).sort(function (a, b) {
      var x = key(a), y = key(b), order;
      if (x === "" || y === "") return (x === "") - (y === "");
      order = isNaN(x) || isNaN(y) ? (x < y ? -1 : x > y) : x - y;
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""

Cell = tuple[str, float | str]


def report_page(title: str, runs: Sequence[RunHistory]) -> str:
    """The whole page.

    Args:
        title: What it is about.
        runs: The runs, in the order in which they are shown.
    """
    named = {run.label: run for run in runs}
    losses = {name: run.curves.get("train/loss", []) for name, run in named.items()}
    times = {
        name: [value for _, value in run.curves.get("step/time_ms", [])]
        for name, run in named.items()
    }
    sections = [
        ("Table", _table(runs)),
        ("Training loss", _legend(runs) + line_chart(losses, x="step", y="train/loss")),
        *_evaluations(named),
        ("Step times", histogram(times, x="ms a step, steps that compiled left out")),
        ("Compile time against step time", stacked_bars(_compile(runs), unit="s")),
        ("Where the time went", stacked_bars(_goodput(runs), unit="s")),
    ]
    body = "".join(f"<h2>{html.escape(head)}</h2>{content}" for head, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _evaluations(named: dict[str, RunHistory]) -> Iterator[tuple[str, str]]:
    tags = sorted({tag for run in named.values() for tag in run.curves if tag.startswith("eval/")})
    for tag in tags:
        curves = {name: run.curves.get(tag, []) for name, run in named.items()}
        if any(len(curve) > 1 for curve in curves.values()):
            yield tag, line_chart(curves, x="step", y=tag)


def _legend(runs: Sequence[RunHistory]) -> str:
    names = "".join(
        f'<span><b style="background:{colour(number)}"></b>{html.escape(run.name)}</span>'
        for number, run in enumerate(runs)
    )
    return f'<p class="legend">{names}</p>'


def _compile(runs: Sequence[RunHistory]) -> dict[str, dict[str, float]]:
    return {
        run.name: {
            "trace": run.result.compile.trace_s,
            "XLA": run.result.compile.xla_s,
            "steps": run.result.goodput.productive_s,
        }
        for run in runs
    }


def _goodput(runs: Sequence[RunHistory]) -> dict[str, dict[str, float]]:
    parts = {}
    for run in runs:
        good = run.result.goodput
        parts[run.name] = {
            "steps": good.productive_s,
            "compile": good.compile_s,
            "data": good.data_s,
            "checkpoint": good.checkpoint_s,
            "evaluation": good.eval_s,
            "lost": good.lost_s,
        }
    return parts


def _table(runs: Sequence[RunHistory]) -> str:
    metrics = sorted({name for run in runs for name in run.result.final})
    fixed = ("run", "overrides", "state", "steps", "compiles", "compile s", "ms/step", "ex/s")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*fixed, *metrics, "reason"))
    rows = "".join(f"<tr>{''.join(_cells(run, metrics))}</tr>" for run in runs)
    table = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


def _cells(run: RunHistory, metrics: Sequence[str]) -> Iterator[str]:
    result: Result = run.result
    yield _words(run.name)
    yield _words(" ".join(run.overrides))
    yield _words(result.state.value, bad=not result.state.good)
    yield _number(result.steps, "{:,}")
    yield _number(result.compile.count, "{}")
    yield _number(result.compile.total_s, "{:.2f}")
    yield _number(result.step.median_ms, "{:.3f}")
    yield _number(result.throughput.examples_per_s, "{:,.1f}")
    for name in metrics:
        value = result.final.get(name)
        yield _number(value if isinstance(value, (int, float)) else None, "{:.5g}")
    yield _words(result.reason)


def _words(words: str, *, bad: bool = False) -> str:
    shown = html.escape(words)
    return f'<td data-v="{shown}"{" class=bad" if bad else ""}>{shown}</td>'


def _number(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="n" data-v=""></td>'
    return f'<td class="n" data-v="{value!r}">{form.format(value)}</td>'
