"""`ls` and `report`: what a user sees of runs and batches that are over."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import signal
import urllib.request

import psutil
import pytest

from tests.batch.runs import wait_until
from tests.batch.toys import Toys


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    made = Toys(tmp_path_factory.mktemp("look"))
    assert made.run("model.fault=none,raise", "optim.lr=0.1,0.2", "steps=40").returncode == 1
    return made


class Page(html.parser.HTMLParser):
    """Counts what a page has, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_ls_lists_batches_and_their_jobs(toys: Toys) -> None:
    listed = toys.command("ls")
    assert listed.returncode == 0, listed.stderr
    assert "4 jobs: " in listed.stdout
    assert "2 succeeded" in listed.stdout
    assert "2 failed" in listed.stdout
    jobs = toys.command("ls", str(toys.batch)).stdout
    assert jobs.count("multirun/b/") == 4
    assert jobs.count("eval/loss=") == 2
    assert jobs.count("the job's own error") == 2


def test_ls_of_nothing_says_so(tmp_path: pathlib.Path) -> None:
    listed = Toys(tmp_path).command("ls")
    assert (listed.returncode, listed.stdout) == (0, "no runs in outputs or multirun\n")


def test_ls_does_not_take_a_killed_run_for_a_running_one(tmp_path: pathlib.Path) -> None:
    toys = Toys(tmp_path)
    with toys.start("seed=0", "model.step_s=0.1", "steps=1000") as process:
        wait_until(lambda: toys.count("begin").total() == 1)
        assert "1 running" in toys.command("ls").stdout
        process.kill()
        process.wait(timeout=60)
    assert "1 cancelled" in toys.command("ls").stdout
    assert "resume goes on with it" in toys.command("ls", str(toys.batch)).stdout


def test_the_report_is_one_file_that_fetches_nothing(toys: Toys) -> None:
    done = toys.command("report", "multirun/b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "multirun/b/report.html\n"
    text = (toys.batch / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert page.tags.count("tr") == 1 + 4
    assert page.tags.count("svg") == 4
    assert "http" not in text
    assert "0-toy" in text
    for head in ("Training loss", "Step times", "Compile time against step time", "Where the time"):
        assert head in text


def test_what_a_run_is_called_cannot_break_the_page(toys: Toys) -> None:
    path = toys.batch / "0-toy" / "result.json"
    before = path.read_text()
    result = json.loads(before)
    result["reason"] = '<script>alert("x")</script>'
    path.write_text(json.dumps(result))
    try:
        toys.command("report", "multirun/b", "--to", "other.html")
    finally:
        path.write_text(before)
    page = Page((toys.folder / "other.html").read_text())
    assert page.tags.count("script") == 1


def test_tensorboard_serves_the_newest_batch_until_it_is_interrupted(toys: Toys) -> None:
    with toys.background("tensorboard", "--port=0") as process:
        assert process.stdout is not None
        said: list[str] = []
        while "http://" not in (line := process.stdout.readline()):
            assert line, said
            said.append(line)
        assert said[0] == "multirun/b; Ctrl-C ends it\n"
        address = re.search(r"http://localhost:\d+/", line)
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}data/runs", timeout=60) as answer:
            runs = json.loads(answer.read())
        assert sorted(runs) == [f"{number}-toy/tb" for number in range(4)]
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tensorboard", "conf"], "tensorboard needs a folder with runs in it; got 'conf'"),
        (["tensorboard", "--port=x"], "--port: invalid"),
        (["explain", "multirun/b"], "explain needs one run; multirun/b is a batch"),
        (["report", "conf"], "report needs a folder with runs"),
        (["ls", "nowhere"], "ls needs a folder"),
        (["report"], "the following arguments are required"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(toys: Toys, argv: list[str], said: str) -> None:
    done = toys.command(*argv)
    assert done.returncode == 64
    assert said in done.stderr
