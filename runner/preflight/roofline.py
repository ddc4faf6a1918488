"""What bounds a step on a chip: its arithmetic, its memory or its links.

A roof is a bound, not a prediction: it takes for granted that everything overlaps perfectly
and that nothing but the busiest part takes time.
"""

from __future__ import annotations

import dataclasses

from runner.config.chips import Chip
from runner.record.preflight import Roof

#: What neither the roofs nor the compiler's estimate know of.
UNMODELLED = (
    "padding of small or odd shapes on the matrix unit, and work that does not use it",
    "waits that overlap imperfectly: memory, links and arithmetic are taken as one another's equal",
    "the network's shape: all links of a chip are taken to be busy at once",
    "the host: input, dispatch, logging, checkpoints",
    "cycles of copies, of collectives and of kernels that state no work; of other kernels, what "
    "they need beyond their roof",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """A step's work.

    Attributes:
        flops: Of one chip, as compiled.
        model_flops: Of the whole step on all chips, recomputation left out.
        hbm_bytes: Of one chip.
        wire_bytes: That one chip sends.
        examples: Of the whole step.
        tokens: Of the whole step, or 0.
    """

    flops: float
    model_flops: float
    hbm_bytes: float
    wire_bytes: float
    examples: int
    tokens: int


def kernel_cycles(flops: float, hbm_bytes: float, *, chip: Chip) -> int:
    """The least cycles of a kernel on a chip: the compiler has no estimate of kernels."""
    seconds = max(flops / chip.peak_flops_per_s, hbm_bytes / chip.hbm_bytes_per_s)
    return round(seconds * chip.clock_hz)


def roof(work: Work, *, chip: Chip, chips: int) -> Roof:
    """The least time of a step and what it means."""
    seconds = {
        "compute": work.flops / chip.peak_flops_per_s,
        "hbm": work.hbm_bytes / chip.hbm_bytes_per_s,
        "interconnect": work.wire_bytes / chip.link_bytes_per_s,
    }
    binds = max(seconds, key=lambda name: seconds[name])
    step_s = seconds[binds]
    return Roof(
        compute_s=seconds["compute"],
        hbm_s=seconds["hbm"],
        interconnect_s=seconds["interconnect"],
        binds=binds,
        step_s=step_s,
        examples_per_s=work.examples / step_s,
        tokens_per_s=work.tokens / step_s,
        mfu=work.model_flops / (step_s * chips * chip.peak_flops_per_s),
    )
