"""The TPU compiler takes the training step of every job that ships, as its preflight asks it."""

from __future__ import annotations

import pathlib

import pytest

from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.schema import Config
from runner.preflight.run import Described, Preflight
from runner.record.preflight import PreflightReport
from runner.train.build import describe, described_batch
from tests.jobs.test_shipped import SMALL, write_csv

FLASH = ["data.options.seq_len=128", "backend.passes.flash_attention=true"]
#: Every job; and those whose attention suits the flash kernels, with these.
JOBS: dict[str, tuple[str, list[str]]] = {
    **{name: (name, overrides) for name, overrides in SMALL.items()},
    "gpt, flash": ("gpt", ["model.depth=1", *FLASH]),
    "llama, flash": ("llama", ["model.depth=1", *FLASH]),
    "bert, flash": ("bert", ["model.depth=1", *FLASH]),
}


def described(config: Config) -> Described:
    built = describe(config)
    batch = described_batch(built, config.job.batch_size)
    return Described(built.recipe, batch, built.job.tokens_per_example(), built.job.sharding)


def judged(overrides: list[str], folder: pathlib.Path) -> PreflightReport:
    """The report on what the command line with these overrides asks for."""
    composer = Composer(conf_folder(), extra=None, trusted=frozenset({"jobs"}))
    config = composer.config([*overrides, "mode=preflight"])
    return Preflight(described, lambda event: None, folder).judge(config)


@pytest.mark.parametrize("case", JOBS)
def test_the_compiler_takes_the_step_of_every_job(case: str, tmp_path: pathlib.Path) -> None:
    job, changes = JOBS[case]
    overrides = [f"job={job}", "hardware=v5e-1", "precision=bf16", *changes]
    if job == "bert_classifier":
        write_csv(tmp_path / "data")
        overrides.append(f"data.root={tmp_path / 'data'}")
    report = judged(overrides, tmp_path)
    assert report.fits
    assert report.model_flops > 0
    assert report.estimate is not None
    kernels = [one for one in report.estimate.operations if one.opcode == "custom-call"]
    assert bool(kernels) == ("flash" in case)
