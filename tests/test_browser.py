"""A real sweep in TensorBoard, as a headless browser shows it; its pictures are the README's.

Without the internet the profile page lacks what it draws with Google Charts, which it loads from
there: the diagrams of its overview and the tables of its statistics. Its figures and its trace
viewer are complete.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.browser import ROOT, Browser, browser

JOBS = ("0-mlp/tb", "1-mlp/tb", "2-mlp/tb")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser on a sweep of three learning rates, with profiles."""
    folder = tmp_path_factory.mktemp("a sweep")
    asked = ("job=mlp", "optim.lr=0.005,0.02,0.08", "steps=60", "eval_every=10")
    done = subprocess.run(
        [sys.executable, "-m", "runner", "-m", *asked, "profile.steps=[31,33]", "batch.name=rates"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with browser(folder / "multirun" / "rates", tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_step_time_chart_shows_every_job(page: Browser) -> None:
    page.open("timeseries", query="?tagFilter=step%2Ftime_ms")
    page.wait(lambda text: "/time_ms" in text and set(JOBS) <= set(text) and "60" in text)
    page.picture("timeseries")


def test_compile_time_and_step_time_lie_side_by_side(page: Browser) -> None:
    page.open("custom_scalars")
    # Two tags of compile time and three of step time, of three jobs.
    page.wait(lambda text: "Matches (6)" in text and "Matches (9)" in text and "60" in text)
    left, top = page.place("compile time (s)")
    beside, same_top = page.place("step time (ms)")
    assert same_top == top
    assert beside > left
    page.picture("custom_scalars")


def test_the_hparams_table_has_every_job(page: Browser) -> None:
    page.open("hparams")
    text = page.wait(lambda text: "Trial ID" in text and set(JOBS) <= set(text))
    table = text[text.index("Trial ID") :]
    assert {"optim.lr", "eval/accuracy", "compile/total_s", "step/time_ms"} <= set(table)
    page.picture("hparams")


def test_the_images_page_shows_held_out_examples_of_every_job(page: Browser) -> None:
    page.open("images")
    page.wait(lambda text: "eval/examples" in text and set(JOBS) <= set(text))
    page.picture("images")


def test_the_profile_page_shows_the_trace(page: Browser) -> None:
    page.open("profile")
    page.wait(lambda text: "Sessions (3)" in text and "Performance Summary" in text)
    page.choose("Overview Page", "Trace Viewer")
    page.wait(lambda text: any("/host:CPU" in piece for piece in text))
    page.picture("profile")
