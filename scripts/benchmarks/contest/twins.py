"""The models of `scripts/bench step` by hand in JAX, as the community writes them.

Pure functions over a flat dict of arrays, images NHWC and kernels HWIO, optax, one `jax.jit`
with everything that changes donated. Parameters keep the names of their PyTorch twins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array, lax

Tree = dict[str, Array]
#: From parameters, buffers and an input to logits and new buffers.
Apply = Callable[[Tree, Tree, Array], tuple[Array, Tree]]

HEADS = 4
EPSILON = 1e-5
MOMENTUM = 0.1


@dataclasses.dataclass(frozen=True)
class Twin:
    """A model and its optimizer.

    Attributes:
        apply: The forward pass.
        optimizer: With the settings of PyTorch's.
    """

    apply: Apply
    optimizer: Callable[[], optax.GradientTransformation]


def dense(params: Tree, name: str, x: Array) -> Array:
    """A linear layer."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def layer_norm(params: Tree, name: str, x: Array) -> Array:
    """Layer normalisation over the last dimension."""
    mean = x.mean(-1, keepdims=True)
    variance = x.var(-1, keepdims=True)
    normed = (x - mean) * lax.rsqrt(variance + EPSILON)
    return normed * params[f"{name}.weight"] + params[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """The exact GELU, which is PyTorch's default."""
    return jax.nn.gelu(x, approximate=False)


def mlp(params: Tree, buffers: Tree, x: Array) -> tuple[Array, Tree]:
    """The residual MLP on [batch, width]."""
    x = dense(params, "0", x)
    last = max(int(name.split(".")[0]) for name in params)
    for i in range(1, last):
        normed = layer_norm(params, f"{i}.norm", x)
        x = x + dense(params, f"{i}.second", gelu(dense(params, f"{i}.first", normed)))
    return dense(params, str(last), x), buffers


def gpt(params: Tree, buffers: Tree, numbers: Array) -> tuple[Array, Tree]:
    """The GPT on token numbers [batch, tokens]."""
    x = params["token.weight"][numbers] + params["position.weight"]
    i = 0
    while f"blocks.{i}.qkv.weight" in params:
        x = _block(params, f"blocks.{i}", x)
        i += 1
    return layer_norm(params, "norm", x) @ params["token.weight"].T, buffers


def _block(params: Tree, name: str, x: Array) -> Array:
    batch, tokens, width = x.shape
    parts = jnp.split(dense(params, f"{name}.qkv", layer_norm(params, f"{name}.norm1", x)), 3, -1)
    q, k, v = (part.reshape(batch, tokens, HEADS, width // HEADS) for part in parts)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + dense(params, f"{name}.out", mixed.reshape(batch, tokens, width))
    up = gelu(dense(params, f"{name}.up", layer_norm(params, f"{name}.norm2", x)))
    return x + dense(params, f"{name}.down", up)


class _Norms:
    """Batch normalisation, and the running statistics that it leaves."""

    def __init__(self, params: Tree, buffers: Tree) -> None:
        self.params = params
        self.buffers = buffers
        self.after: Tree = {}

    def __call__(self, name: str, x: Array) -> Array:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        count = x.size // x.shape[-1]
        for kind, value in (("mean", mean), ("var", variance * count / (count - 1))):
            key = f"{name}.running_{kind}"
            self.after[key] = (1 - MOMENTUM) * self.buffers[key] + MOMENTUM * value
        self.after[f"{name}.num_batches_tracked"] = self.buffers[f"{name}.num_batches_tracked"] + 1
        normed = (x - mean) * lax.rsqrt(variance + EPSILON)
        return normed * self.params[f"{name}.weight"] + self.params[f"{name}.bias"]


def _conv(params: Tree, name: str, x: Array, *, stride: int = 1) -> Array:
    kernel = params[f"{name}.weight"]
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def resnet18(params: Tree, buffers: Tree, images: Array) -> tuple[Array, Tree]:
    """ResNet-18 with the small stem, on [batch, height, width, channels]."""
    norm = _Norms(params, buffers)
    x = jax.nn.relu(norm("bn1", _conv(params, "conv1", images)))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(norm(f"{name}.bn1", _conv(params, f"{name}.conv1", x, stride=stride)))
            y = norm(f"{name}.bn2", _conv(params, f"{name}.conv2", y))
            if f"{name}.downsample.0.weight" in params:
                x = _conv(params, f"{name}.downsample.0", x, stride=stride)
                x = norm(f"{name}.downsample.1", x)
            x = jax.nn.relu(x + y)
    return dense(params, "fc", x.mean((1, 2))), norm.after


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(1e-3, momentum=0.9)


def _adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-4, weight_decay=0.01)


TWINS = {
    "resnet18": Twin(resnet18, _sgd),
    "mlp": Twin(mlp, _adamw),
    "gpt": Twin(gpt, _adamw),
    "gpt_128": Twin(gpt, _adamw),
}


def train_step(twin: Twin, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The jitted step: (params, buffers, state, batch) to the next three and the metrics."""

    def loss_of(params: Tree, buffers: Tree, batch: Tree) -> tuple[Array, Tree]:
        logits, after = twin.apply(params, buffers, batch["input"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
        return losses.mean(), after

    def step(params: Tree, buffers: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, buffers), grads = gradient(params, buffers, batch)
        norm = optax.global_norm(grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), buffers, state, (loss, norm)

    return jax.jit(step, donate_argnums=(0, 1, 2))


def converted(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """PyTorch's arrays of a kind ("parameter", "buffer", "batch/0"), in JAX's orders and types."""
    start = f"{kind}/"
    return {
        name.removeprefix(start): _converted(name, value)
        for name, value in arrays.items()
        if name.startswith(start)
    }


def _converted(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype == np.int64:
        return value.astype(np.int32)
    if value.ndim == 4:
        images = name.startswith("batch/")
        return np.ascontiguousarray(value.transpose((0, 2, 3, 1) if images else (2, 3, 1, 0)))
    embedding = name.endswith(("token.weight", "position.weight"))
    if name.startswith("parameter/") and value.ndim == 2 and not embedding:
        return np.ascontiguousarray(value.T)
    return value
