"""What a job of a batch is known by, when the batch goes on."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from runner.batch.ledger import Command, Ledger
from runner.cli.app import conf_folder
from runner.cli.batch import BatchPlan, plan_batch
from runner.config.compose import Composer
from runner.record.outcome import State

PREFLIGHT = ("mode=preflight", "job=mlp", "job.eval_batch_size=64")


@pytest.fixture
def composer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Composer:
    monkeypatch.chdir(tmp_path)
    return Composer(conf_folder(), extra=None, trusted=frozenset({"jobs"}))


def succeeded(plan: BatchPlan) -> None:
    """Leaves a ledger in which all jobs have."""
    plan.folder.mkdir(parents=True)
    ledger = Ledger(plan.folder, Command((), None, ""))
    for job in plan.jobs:
        ledger.put(dataclasses.replace(job.entry, state=State.SUCCEEDED))
    ledger.close()


def test_what_is_swept_is_shown_of_a_job_even_if_it_only_says_where_it_runs(
    composer: Composer,
) -> None:
    plan = plan_batch(composer, [*PREFLIGHT, "hardware=v5e-4,v6e-4", "parallel=data", "steps=1"])
    labels = [job.label for job in plan.jobs]
    assert ["hardware=v5e-4" in labels[0], "hardware=v6e-4" in labels[1]] == [True, True]
    assert not [label for label in labels if "parallel" in label]


def test_a_job_is_found_again_by_its_hardware_in_whatever_order(composer: Composer) -> None:
    asked = [*PREFLIGHT, "batch.name=b"]
    succeeded(plan_batch(composer, [*asked, "hardware=v5e-4,v6e-4"]))
    again = plan_batch(composer, [*asked, "hardware=v6e-4,v5p-8,v5e-4", "batch.resume=true"])
    assert [(job.number, job.done) for job in again.jobs] == [(1, True), (2, False), (0, True)]


@pytest.mark.parametrize(("mode", "done"), [("preflight", False), ("train", True)])
def test_a_verdict_on_other_hardware_is_another(composer: Composer, mode: str, done: bool) -> None:
    asked = [*PREFLIGHT, f"mode={mode}", "seed=0,1", "batch.name=b"]
    succeeded(plan_batch(composer, [*asked, "hardware=v5e-4"]))
    again = plan_batch(composer, [*asked, "hardware=v6e-4", "batch.resume=true"])
    assert [job.done for job in again.jobs] == [done, done]
