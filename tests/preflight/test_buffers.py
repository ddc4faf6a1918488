"""Reading what the compiler says of memory."""

from __future__ import annotations

from runner.preflight.buffers import Allocation, allocations, overflow, size

ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <23 add.297 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 802816, parameter 1, shape |f32[256,784]| at ShapeIndex {}, maybe-live-out:
 value: <494 Arg_4.5 @0> (size=802816,offset=0): f32[256,784]{0,1:T(8,128)}
 value: <605 fusion.2{0} @0> (size=802816,offset=0): f32[256,784]{0,1:T(8,128)}
allocation 2: size 16384, maybe-live-out:
 value: <606 fusion.3 @0> (size=16384,offset=0): f32[10,256]{1,0:T(8,128)}
allocation 3: size 2000, color 1, preallocated-temp:
 value: <607 fusion.4 @0> (size=2000,offset=0): f32[500]{0}
allocation 4: size 3000000, preallocated-temp:
 value: <608 fusion.5 @0> (size=1000000,offset=0): f32[250000]{0}
 value: <609 fusion.6{1} @0> (size=2000000,offset=1000000): f32[500000]{0}
"""
NAMES = ["batch/image", "params/fc.weight"]
OPERATIONS = {"fusion.6": ("backward/fc/mm", "model.py:12")}

REPORT = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.

Total hbm usage >= 20.25G:
    reserved        258.00M\x20
    program           8.50G\x20
    arguments        12.00G\x20

Output size 11.00G; shares 4.00G with arguments.

Program hbm requirement 8.50G:
    HLO temp          8.00G (100.0% utilization: Unpadded (8.00G) Padded (8.00G))
    scoped            0.50G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="forward/fc/addmm" source_file="/m/model.py" source_line=30
     Shape: bf16[65536,65536]{1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     XLA label: fusion.1 = fusion(Arg_0.1, Arg_1.2), kind=kOutput, calls=fused_computation
     Allocation type: HLO temp
     ==========================

  2. Size: 392.0K
     Shape: f32[100000]{0:T(1024)}
     XLA label: copy-start.68 = copy-start(get-tuple-element.69)
     Allocation type: HLO temp
     ==========================
"""


def test_arrays_in_main_memory_come_largest_first_with_what_they_are() -> None:
    found = allocations(ASSIGNMENT, arguments=NAMES, operations=OPERATIONS)
    assert found == [
        Allocation("temporary", 2000000, "f32[500000]{0}", "backward/fc/mm", "model.py:12"),
        Allocation("temporary", 1000000, "f32[250000]{0}", "fusion.5"),
        Allocation("argument", 802816, "f32[256,784]{0,1:T(8,128)}", "params/fc.weight"),
        Allocation("result", 16384, "f32[10,256]{1,0:T(8,128)}", "fusion.3"),
    ]


def test_a_report_of_too_much_memory_is_read_in_full() -> None:
    found = overflow(REPORT)
    assert found is not None
    assert found.capacity == round(15.75 * 2**30)
    assert found.arguments == 12 * 2**30
    assert (found.outputs, found.aliased) == (11 * 2**30, 4 * 2**30)
    assert (found.temporaries, found.program) == (8 * 2**30, 2**29)
    assert found.largest == [
        Allocation(
            "HLO temp",
            8 * 2**30,
            "bf16[65536,65536]{1,0:T(8,128)(2,1)}",
            "forward/fc/addmm",
            "/m/model.py:30",
        ),
        Allocation("HLO temp", 392 * 1024, "f32[100000]{0:T(1024)}", "copy-start.68"),
    ]


def test_one_array_larger_than_the_memory_is_named() -> None:
    found = overflow(
        "RESOURCE_EXHAUSTED: Allocation (size=274877906944) would exceed memory (size=33822867456)"
        " :: #allocation394 [shape = 'bf16[512,32768,8192]{1,2,0:T(8,128)(2,1)}', space=hbm, size ="
        " 0xffffffffffffffff, tag = 'output of fusion.434@{}'] :: <no-hlo-instruction>"
    )
    assert found is not None
    assert (found.capacity, found.temporaries) == (33822867456, 2**38)
    (one,) = found.largest
    assert one.shape == "bf16[512,32768,8192]{1,2,0:T(8,128)(2,1)}"
    assert one.what == "output of fusion.434"


def test_another_error_is_no_report_of_too_much_memory() -> None:
    assert overflow("INVALID_ARGUMENT: Custom emitter for foo not found") is None


def test_sizes_have_binary_units() -> None:
    assert [size(text) for text in ("512B", "1.5K", "2.00M", "0.25G")] == [
        512,
        1536,
        2 * 2**20,
        2**28,
    ]
