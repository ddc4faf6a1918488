"""`remat=layers` takes less memory in the program that the TPU compiler makes."""

from __future__ import annotations

import torch

from jobs.gpt import GPTJob
from runner.backends.base import Recipe
from runner.config.chips import CHIPS
from runner.preflight.tpu_compiler import Memory, TpuCompiler, topology_of
from runner.preflight.trace import trace
from tests.preflight.problems import adamw, program

BATCH, LENGTH, DEPTH = 128, 128, 3


def compiled(*, remat: bool) -> Memory:
    settings = {"depth": DEPTH, "width": 128, "heads": 2, "dropout": 0.0, "positions": "rotary"}
    facts = {"vocabulary": 64, "seq_len": LENGTH, "heldout_tokens": 100, "heldout_bytes": 400}
    job = GPTJob(settings, facts)
    with torch.device("meta"):
        model = job.build()
        tokens = torch.empty(BATCH, LENGTH, dtype=torch.int64)
    recipe = Recipe(model, job.loss, job.evaluate, adamw, remat=remat)
    step = trace(recipe, {"tokens": tokens, "target": tokens})
    return TpuCompiler(topology_of(CHIPS["v5e"], (1, 1))).compile(program(step)).memory


def test_temporaries_fall_to_less_than_half() -> None:
    kept, again = compiled(remat=False), compiled(remat=True)
    assert again.temporaries < kept.temporaries / 2
    assert again.arguments == kept.arguments
