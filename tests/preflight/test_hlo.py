"""Reading HLO text: shapes, instructions, loops."""

from __future__ import annotations

import pytest

from runner.preflight.hlo import Array, Module, arrays, parse

LOOP = """\
HloModule step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %y = f32[8]{0:T(128)} negate(%x), metadata={op_name="forward/layers/neg"}
  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) tuple(%next, %y)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %twelve = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""
KNOWN = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'


def test_an_array_has_a_type_sizes_and_a_place() -> None:
    assert arrays("bf16[128,256]{1,0:T(8,128)(2,1)S(1)}") == (
        Array("bf16", (128, 256), space=1, order=(1, 0), tile=(8, 128)),
    )
    assert arrays("(f32[], s32[4]{0}, token[])") == (Array("f32", ()), Array("s32", (4,)))


@pytest.mark.parametrize(
    ("shape", "plain", "padded"),
    [
        ("f32[10,256]{1,0:T(8,128)}", 10240, 16 * 256 * 4),
        ("f32[256,784]{0,1:T(8,128)}", 256 * 784 * 4, 256 * 784 * 4),
        ("f32[64,3,7,7]{0,1,3,2:T(4,128)}", 64 * 3 * 49 * 4, 128 * 4 * 49 * 4),
        ("f32[]{:T(128)}", 4, 512),
        ("s64[10]{0:T(128)}", 80, 1024),
        ("pred[100]{0:T(512)(128)(4,1)}", 100, 512),
        ("f32[3,5]", 60, 60),
        ("s4[3]", 2, 2),
    ],
)
def test_padding_follows_the_tiles_of_the_layout(shape: str, plain: int, padded: int) -> None:
    (array,) = arrays(shape)
    assert (array.bytes, array.padded_bytes) == (plain, padded)


def test_an_instruction_is_taken_apart() -> None:
    line = (
        "  ROOT %fusion.2 = (f32[8]{0:T(128)}, /*index=1*/bf16[2,3]{1,0}) fusion(%p.1, %p.2), "
        'kind=kLoop, calls=%fused, metadata={op_name="forward/fc/addmm" '
        'source_file="/a b/m.py" source_line=7}, '
        'backend_config={"window_config":{"estimated_cycles":"1825"}}'
    )
    one = parse(line)
    assert (one.name, one.opcode, one.root) == ("fusion.2", "fusion", True)
    assert one.operands == ("p.1", "p.2")
    assert [array.dims for array in one.results] == [(8,), (2, 3)]
    assert one.op_name == "forward/fc/addmm"
    assert one.source == "/a b/m.py:7"
    assert one.cycles == 1825
    assert one.attribute("calls") == "fused"


def test_a_loop_body_runs_as_often_as_its_condition_allows() -> None:
    times = {computation.name: count for computation, count in Module(LOOP).runs()}
    assert times == {"main": 1, "body": 12, "condition": 13}


def test_a_known_trip_count_is_believed() -> None:
    times = {c.name: count for c, count in Module(LOOP.replace("body=%body", KNOWN)).runs()}
    assert times["body"] == 7
