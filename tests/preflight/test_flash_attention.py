"""The flash kernels: what they compute, interpreted on the CPU, and what the TPU compiler says.

Interpreted is all of it but the lowering to Mosaic, of which the compiler's verdict is the test.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.backends.passes.flash_attention import FlashAttention
from runner.backends.passes.mode import Rewriting
from runner.backends.passes.rewrite import Held
from runner.config.chips import CHIPS
from runner.config.schema import PassesConfig
from runner.preflight import costs
from runner.preflight.hlo import Module
from runner.preflight.tpu_compiler import TpuCompiler, topology_of
from runner.preflight.trace import TracedStep, trace
from runner.record.errors import BackendError
from runner.xla import flash_attention, pallas
from runner.xla.pallas import USED, Function, Kernel, Shape, kernel
from tests.preflight.problems import module, program, recipe

CAUSAL = {"is_causal": True}


@pytest.mark.parametrize("name", [f"{m}:{name}" for m, names in USED.items() for name in names])
def test_what_is_used_of_jax_is_there(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert hasattr(importlib.import_module(module), attribute)


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """A kernel's function, run by JAX on the CPU; it takes and gives what the kernel does."""

    function: Function
    arguments: Sequence[Shape | None]
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        from jax import numpy as jnp
        from jax.experimental.pallas import tpu

        assert tuple(pallas.shape_of(operand) for operand in operands) == self.operands
        given = iter(operands)
        arrays: list[Any] = []
        for shape, kind in zip(self.arguments, self._kinds(), strict=True):
            if shape is None:
                arrays.append(None)
                continue
            tensor = next(given)
            tensor = tensor if tuple(tensor.shape) == shape.sizes else tensor[..., 0]
            arrays.append(jnp.asarray(tensor.float().numpy()).astype(kind))
        with tpu.force_tpu_interpret_mode():
            made = self.function(*arrays)
        found = [one for one in (made if isinstance(made, tuple) else (made,)) if one is not None]
        return [_as_tensor(one, shape) for one, shape in zip(found, self.results, strict=True)]

    def _kinds(self) -> list[str]:
        return ["" if s is None else str(s.dtype).removeprefix("torch.") for s in self.arguments]


def _as_tensor(array: Any, shape: Shape) -> Tensor:
    tensor = torch.from_numpy(np.array(array.astype("float32"))).to(shape.dtype)
    if tensor.dim() < len(shape.sizes):
        tensor = tensor.unsqueeze(-1).expand(shape.sizes)
    assert tuple(tensor.shape) == shape.sizes
    return tensor


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operations on CPU tensors, by interpreted kernels."""

    def interpreted(
        function: Function, arguments: tuple[Shape | None, ...], *, flops: float
    ) -> Interpreted:
        lowered = kernel(function, arguments, flops=flops)
        return Interpreted(function, arguments, lowered.operands, lowered.results)

    monkeypatch.setattr(flash_attention, "kernel", interpreted)
    library: Any = torch.library.Library("runner", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("flash_attention", flash_attention._on_tpu, "CPU")
    library.impl("flash_attention_gradients", flash_attention._gradients_on_tpu, "CPU")
    yield
    library._destroy()


def attend(tensors: Sequence[Tensor], **how: Any) -> tuple[list[Tensor], int]:
    """Attention and gradients of its inputs, through the pass; and how many calls it rewrote."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    rewrite = FlashAttention(Held(), Held())
    with Rewriting([rewrite]):
        mixed = F.scaled_dot_product_attention(*leaves, **how)
        weights = torch.linspace(-1, 1, mixed.numel()).reshape(mixed.shape)
        grads = torch.autograd.grad((mixed.float() * weights).sum(), leaves)
    return [mixed.detach(), *grads], rewrite.count


def plainly(tensors: Sequence[Tensor], **how: Any) -> list[Tensor]:
    """The same by torch itself, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    mixed = F.scaled_dot_product_attention(*leaves, **how)
    weights = torch.linspace(-1, 1, mixed.numel()).reshape(mixed.shape)
    return [mixed.detach(), *torch.autograd.grad((mixed * weights).sum(), leaves)]


def inputs(*leading: int, rows: tuple[int, int] = (256, 256), kv_heads: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = (*leading[:-1], kv_heads or leading[-1])
    shapes = [(*leading, rows[0], 32), (*shared, rows[1], 32), (*shared, rows[1], 32)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


CASES: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "causal": (inputs(2, 2), CAUSAL),
    "of all": (inputs(1, 2), {}),
    "scaled": (inputs(1, 1), {"scale": 0.3, **CAUSAL}),
    "without a batch": (inputs(2), CAUSAL),
    "in two batches": (inputs(2, 1, 2), CAUSAL),
    "of three blocks": (inputs(1, 1, rows=(384, 384)), CAUSAL),
    "of more keys than queries": (inputs(1, 1, rows=(128, 384)), {}),
    "with shared keys": (inputs(1, 4, kv_heads=2), {"enable_gqa": True, **CAUSAL}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("on_the_cpu")
def test_it_computes_what_torch_computes(case: str) -> None:
    tensors, how = CASES[case]
    found, count = attend(tensors, **how)
    assert count == 1
    for ours, theirs in zip(found, plainly(tensors, **how), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_the_cpu")
def test_under_autocast_it_computes_in_bf16() -> None:
    tensors = inputs(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, count = attend(tensors, is_causal=True)
    assert count == 1
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for ours, theirs in zip(found, plainly(tensors, is_causal=True), strict=True):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.usefixtures("on_the_cpu")
def test_gradients_of_gradients_are_refused() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in inputs(1, 1))
    with Rewriting([FlashAttention(Held(), Held())]):
        mixed = F.scaled_dot_product_attention(query, key, value)
        with pytest.raises(BackendError, match="gradients of gradients"):
            torch.autograd.grad(mixed.sum(), query, create_graph=True)


class Attending(nn.Module):
    """Attention of heads of several widths, one layer for each."""

    def __init__(self, *widths: int, **how: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 3 * 2 * width) for width in widths)
        self.widths, self.how = widths, how

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer, width in zip(self.layers, self.widths, strict=True):
            query, key, value = layer(x).unflatten(-1, (2, 3, width)).transpose(1, 2).unbind(-2)
            outputs.append(F.scaled_dot_product_attention(query, key, value, **self.how).mean())
        return torch.stack(outputs)


def traced(build: Callable[[], nn.Module], *shape: int, flash: bool, bf16: bool = False) -> Any:
    made = dataclasses.replace(
        recipe(build),
        passes=PassesConfig(flash_attention=flash),
        autocast=torch.bfloat16 if bf16 else None,
    )
    return trace(made, {"x": torch.empty(shape, device="meta")})


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def step(request: pytest.FixtureRequest) -> TracedStep:
    bf16 = request.param == "bf16"
    made: TracedStep = traced(
        lambda: Attending(32, 64, 128, 256, is_causal=True), 2, 2048, 64, flash=True, bf16=bf16
    )
    return made


@pytest.mark.parametrize("kind", CHIPS)
def test_the_compiler_takes_every_width_that_is_not_refused(kind: str, step: TracedStep) -> None:
    assert step.passes["flash_attention"] == 4
    shape = (1, 1, 1) if kind in ("v4", "v5p") else (1, 1)
    compiled = TpuCompiler(topology_of(CHIPS[kind], shape)).compile(program(step))
    instructions = Module(compiled.hlo).entry.instructions
    kernels = [one for one in instructions if one.target == "tpu_custom_call"]
    assert len(kernels) == 3 * 4
    assert all(one.kernel_work is not None for one in kernels)


def test_no_scores_are_held(step: TracedStep) -> None:
    text = TpuCompiler(topology_of(CHIPS["v5e"], (1, 1))).compile(program(step)).hlo
    assert "2048,2048" not in text


def test_its_flops_are_counted_as_those_of_other_attention() -> None:
    def flops(flash: bool) -> float:
        made = traced(lambda: Attending(64), 2, 256, 64, flash=flash)
        within = sum(operation.kernel_flops for operation in made.operations)
        assert bool(within) == flash
        return within + sum(costs.flops(module(made), costs.place_of).values())

    assert flops(True) == pytest.approx(flops(False), rel=1e-6)


class Alike(nn.Module):
    """Attention of a projection to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return F.scaled_dot_product_attention(made, made, made)


def test_query_key_and_value_may_be_one() -> None:
    made = traced(Alike, 2, 256, 64, flash=True)
    assert sum(operation.kernel_flops for operation in made.operations) == 6 * 2 * 2 * 256**2 * 64


REFUSED: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "dropout": ({"dropout_p": 0.5}, (2, 256, 32), "dropout_p=0.5"),
    "a mask": ({"attn_mask": torch.zeros(256, 256)}, (2, 256, 32), "attn_mask"),
    "part of a block": ({}, (2, 200, 32), "multiples of 128; got 200 queries"),
    "an odd width": ({}, (2, 128, 192), "at most 128 wide, or 256; got 192"),
    "a great width": ({}, (2, 128, 512), "at most 128 wide, or 256; got 512"),
    "float64": ({}, (2, 128, 32), "it is in torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_suit_is_computed_otherwise_and_said_if_nothing_suits(case: str) -> None:
    how, shape, word = REFUSED[case]
    dtype = torch.float64 if case == "float64" else torch.float32
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    rewrite = FlashAttention(Held(), Held())
    with Rewriting([rewrite]):
        mixed = F.scaled_dot_product_attention(*tensors, **how)
    assert mixed.shape == shape
    assert rewrite.count == 0
    with pytest.raises(BackendError, match="no call of scaled_dot_product_attention") as caught:
        rewrite.check()
    assert word in str(caught.value)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(BackendError, match="there is none"):
        traced(lambda: nn.Linear(8, 8), 4, 8, flash=True)


def test_a_kernel_is_the_same_from_wherever_it_is_asked_for() -> None:
    query = torch.empty(1, 2, 256, 64, device="meta")
    first = flash_attention.forward_kernel(query, query, causal=True, scale=0.5)

    def from_deeper() -> Kernel:
        pallas.kernel.cache_clear()
        return flash_attention.forward_kernel(query, query, causal=True, scale=0.5)

    assert from_deeper() == first
