"""What a step costs, against torch's own counter and against hand-made programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from runner.preflight import costs
from runner.preflight.costs import Place
from runner.preflight.hlo import Module
from tests.preflight.problems import module, recipe, traced


class Attention(nn.Module):
    """One head of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        weights: Tensor = torch.softmax(query @ key.transpose(1, 2), dim=-1)
        return weights @ value


def pointwise_and(layer: nn.Module) -> nn.Module:
    """The layer behind another, so that its input has a gradient."""
    return nn.Sequential(nn.Conv2d(8, 8, 1), layer)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 16)), (32, 48)),
    "conv": (lambda: pointwise_and(nn.Conv2d(8, 16, 3, padding=1)), (4, 8, 20, 20)),
    "strided conv": (lambda: pointwise_and(nn.Conv2d(8, 16, 3, 2, 1)), (4, 8, 32, 32)),
    "large stride": (lambda: pointwise_and(nn.Conv2d(8, 16, 16, 16)), (4, 8, 64, 64)),
    "dilated conv": (lambda: pointwise_and(nn.Conv2d(8, 16, 3, dilation=2)), (4, 8, 24, 24)),
    "transposed": (lambda: pointwise_and(nn.ConvTranspose2d(8, 16, 4, 2, 1)), (4, 8, 16, 16)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 4, 5)), (4, 8, 50)),
    "attention": (lambda: Attention(32), (2, 24, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_agree_with_torchs_counter(name: str) -> None:
    build, shape = MODELS[name]
    work = recipe(build)
    counter = FlopCounterMode(display=False)
    with counter:
        work.loss(work.model, {"x": torch.empty(shape, device="meta")}).backward()
    counted = costs.flops(module(traced(build, *shape)), costs.place_of)
    assert sum(counted.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("groups", [4, 8])
def test_a_grouped_convolution_costs_its_groups_in_each_of_its_three_products(groups: int) -> None:
    """Torch's counter takes the gradient of a grouped weight for a dense one."""
    step = traced(lambda: pointwise_and(nn.Conv2d(8, 16, 3, groups=groups)), 4, 8, 20, 20)
    counted = costs.flops(module(step), costs.place_of)
    pointwise = 2 * 4 * 20 * 20 * 8 * 8
    grouped = 2 * 4 * 18 * 18 * 16 * (8 // groups) * 9
    assert sum(counted.values()) == 2 * pointwise + 3 * grouped


PARALLEL = """\
HloModule step, entry_computation_layout={()->f32[]}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%fused (p: f32[1024,8]) -> f32[128,8] {
  %p = f32[1024,8]{1,0} parameter(0)
  ROOT %scatter = f32[128,8]{1,0} reduce-scatter(%p), channel_id=3, \
replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
}

ENTRY %main (a: f32[128,8], b: f32[1024,8]) -> f32[128,8] {
  %a = f32[128,8]{1,0} parameter(0)
  %b = f32[1024,8]{1,0} parameter(1)
  %gather.1 = (f32[128,8]{1,0}, f32[1024,8]{1,0}) all-gather-start(%a), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="forward/fc/all_gather"}
  %gather.2 = f32[1024,8]{1,0} all-gather-done(%gather.1)
  %reduce = f32[1024,8]{1,0} all-reduce(%b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%sum
  ROOT %out = f32[128,8]{1,0} fusion(%b), kind=kCustom, calls=%fused
}
"""


def test_collectives_are_found_in_every_form_and_sized_by_the_whole_array() -> None:
    found = {one.kind: one for one in costs.collectives(Module(PARALLEL))}
    whole = 1024 * 8 * 4
    assert {kind: (one.bytes, one.group) for kind, one in found.items()} == {
        "all-gather": (whole, 8),
        "all-reduce": (whole, 4),
        "reduce-scatter": (whole, 8),
    }
    assert found["all-gather"].place == Place("forward", "fc")
    assert found["all-reduce"].wire_bytes == pytest.approx(2 * whole * 3 / 4)
    assert found["reduce-scatter"].wire_bytes == pytest.approx(whole * 7 / 8)


TRAFFIC = """\
HloModule step, entry_computation_layout={()->f32[]}

%slice (p: f32[12,1000], i: s32[]) -> f32[1,1000] {
  %p = f32[12,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,1000]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,1000}
}

%update (q: f32[12,1000], r: f32[1,1000], j: s32[]) -> f32[12,1000] {
  %q = f32[12,1000]{1,0} parameter(0)
  %r = f32[1,1000]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %new = f32[12,1000]{1,0} dynamic-update-slice(%q, %r, %j, %none)
}

ENTRY %main (a: f32[12,1000], k: s32[]) -> f32[12,1000] {
  %a = f32[12,1000]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %one = f32[1,1000]{1,0} fusion(%a, %k), kind=kLoop, calls=%slice
  %near = f32[1,1000]{1,0:T(1,128)S(1)} negate(%one)
  ROOT %all = f32[12,1000]{1,0} fusion(%a, %near, %k), kind=kLoop, calls=%update
}
"""


def test_traffic_counts_slices_as_slices_and_nothing_that_stays_on_the_chip() -> None:
    row, index = 1000 * 4, 4
    sliced = row + index + row
    negated = row
    updated = index + row
    assert costs.memory_bytes(Module(TRAFFIC)) == sliced + negated + updated


PREFETCHED = """\
HloModule step, entry_computation_layout={()->f32[]}

ENTRY %main (a: f32[12,1000], i: s32[]) -> f32[2,1000] {
  %a = f32[12,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %start = ((f32[12,1000]{1,0}), f32[3,1000]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:3]}
  %done = f32[3,1000]{1,0:S(1)} slice-done(%start)
  %near = f32[1,1000]{1,0:S(1)} slice(%done), slice={[0:1], [0:1000]}
  %changed = f32[3,1000]{1,0:S(1)} dynamic-update-slice(%done, %near, %i, %i)
  %b = f32[12,1000]{1,0} dynamic-update-slice(%a, %near, %i, %i)
  %c = f32[12,1000]{1,0} dynamic-update-slice(%b, %a, %i, %i)
  ROOT %far = f32[2,1000]{1,0} slice(%changed), slice={[0:2], [0:1000]}
}
"""


def test_traffic_of_slices_is_what_leaves_or_reaches_main_memory() -> None:
    row = 1000 * 4
    ahead, back, from_the_chip, from_memory = 3 * row, 2 * row, row, 2 * 12 * row
    traffic = ahead + back + from_the_chip + from_memory
    assert costs.memory_bytes(Module(PREFETCHED)) == traffic


def test_a_place_is_read_from_an_operations_name() -> None:
    assert costs.place_of("forward/layers.0.fc/addmm") == Place("forward", "layers.0.fc")
    assert costs.place_of("optimizer/add") == Place("optimizer", "")
    assert costs.place_of("") == Place("", "")


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("holes", [1, 2, 3])
@pytest.mark.parametrize("before", [-1, 0, 2, 5])
def test_products_are_counted_where_a_window_lies_on_an_input(
    stride: int, holes: int, before: int
) -> None:
    """As by trying each place of the window over each result."""
    for inputs, results, size, spread in itertools.product((1, 4, 7), (1, 5), (1, 3, 6), (1, 2)):
        places = [
            result * stride + place * spread - before
            for result in range(results)
            for place in range(size)
        ]
        expected = sum(place % holes == 0 and 0 <= place // holes < inputs for place in places)
        found = costs.window_pairs(
            inputs, results, size=size, stride=stride, before=before, holes=holes, spread=spread
        )
        assert found == expected, (inputs, results, size, spread)


def test_products_of_many_matrices_cost_no_more_as_one_convolution() -> None:
    """The TPU compiler makes the number of matrices an axis of the window, mostly on padding."""
    compiled = Module(
        "ENTRY %main (a: bf16[96,64,32], b: bf16[96,32,16]) -> bf16[96,64,16] {\n"
        "  %a = bf16[96,64,32]{2,1,0} parameter(0)\n"
        "  %b = bf16[96,32,16]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[96,64,16]{2,1,0} convolution(%a, %b), window={size=96 stride=95"
        " lhs_dilate=96}, dim_labels=0bf_0io->0bf\n"
        "}\n"
    )
    assert costs.computed_flops(compiled) == 2 * 96 * 64 * 32 * 16
