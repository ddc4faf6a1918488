"""The models of `scripts/bench tpu_program` in JAX, as its community writes them.

Parameters float32 and cast where they are used, activations bf16, statistics of norms, softmax
and loss float32; images NHWC, kernels HWIO; `jax.nn.dot_product_attention` as it comes, optax, one
`jax.jit` with parameters, statistics and optimizer state donated. Like the PyTorch step, it
returns loss and gradient norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = dict[str, Any]
Shape = tuple[int, ...]
#: From parameters, statistics and a batch to the loss and new statistics.
Loss = Callable[[Tree, Tree, Tree], tuple[Array, Tree]]

BF16, F32 = jnp.bfloat16, jnp.float32
VOCABULARY, TOKENS = 50257, 1024
ROTARY_BASE = 500_000.0


@dataclasses.dataclass(frozen=True)
class Twin:
    """A model in JAX.

    Attributes:
        shapes: Of parameters and of statistics, by name, for a number of layers.
        batch: Shapes and types of a batch.
        loss: The forward pass.
        optimizer: With the settings of PyTorch's.
    """

    shapes: Callable[[int], tuple[dict[str, Shape], dict[str, Shape]]]
    batch: dict[str, jax.ShapeDtypeStruct]
    loss: Loss
    optimizer: optax.GradientTransformation

    def lowered(self, layers: int, mesh: Mesh | None = None) -> Any:
        """The jitted step, lowered for a TPU; over the axis of a mesh the batch is cut."""
        whole, cut = (NamedSharding(mesh, P(*axes)) if mesh else None for axes in ((), ("data",)))

        def described(tree: Any, sharding: NamedSharding | None) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        params, stats = (
            {
                name: jax.ShapeDtypeStruct(shape, F32, sharding=whole)
                for name, shape in shapes.items()
            }
            for shapes in self.shapes(layers)
        )
        state = described(jax.eval_shape(self.optimizer.init, params), whole)
        batch = described(self.batch, cut)

        def step(params: Tree, stats: Tree, state: Any, batch: Tree) -> tuple[Any, ...]:
            gradient = jax.value_and_grad(self.loss, has_aux=True)
            (loss, stats), grads = gradient(params, stats, batch)
            norm = optax.global_norm(grads)
            updates, state = self.optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), stats, state, (loss, norm)

        traced = jax.jit(step, donate_argnums=(0, 1, 2)).trace(params, stats, state, batch)
        return traced.lower(lowering_platforms=("tpu",))

    def parameters(self, layers: int) -> int:
        """Numbers that training changes."""
        return sum(jnp.prod(jnp.array(shape)).item() for shape in self.shapes(layers)[0].values())


def _dense(params: Tree, name: str, x: Array) -> Array:
    y = x @ params[f"{name}.kernel"].astype(x.dtype)
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(x.dtype)


def _layer_norm(params: Tree, name: str, x: Array) -> Array:
    wide = x.astype(F32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    normed = (wide - mean) * lax.rsqrt(variance + 1e-5)
    return (normed * params[f"{name}.scale"] + params[f"{name}.bias"]).astype(x.dtype)


def _rms_norm(params: Tree, name: str, x: Array) -> Array:
    wide = x.astype(F32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return (normed * params[f"{name}.scale"]).astype(x.dtype)


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def _cross_entropy(logits: Array, target: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(F32), target)
    mean: Array = losses.mean()
    return mean


def _count(params: Tree, start: str) -> int:
    """How many layers there are by the names of their parameters, `start` and a number."""
    return len({name.split(".")[1] for name in params if name.startswith(f"{start}.")})


def _norm_shapes(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.scale": (width,), f"{name}.bias": (width,)}


def _dense_shapes(name: str, inner: int, outer: int, *, bias: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.kernel": (inner, outer)}
    return {**shapes, f"{name}.bias": (outer,)} if bias else shapes


def _block(params: Tree, name: str, x: Array, *, causal: bool) -> Array:
    """A pre-norm transformer block with 12 heads."""
    qkv = _dense(params, f"{name}.qkv", _layer_norm(params, f"{name}.norm1", x))
    query, key, value = (_split(part, 12) for part in jnp.split(qkv, 3, axis=-1))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
    x = x + _dense(params, f"{name}.out", mixed.reshape(x.shape))
    up = _dense(params, f"{name}.up", _layer_norm(params, f"{name}.norm2", x))
    return x + _dense(params, f"{name}.down", jax.nn.gelu(up, approximate=False))


def _block_shapes(name: str, *, bias: bool) -> dict[str, Shape]:
    dense = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    shapes = {**_norm_shapes(f"{name}.norm1", 768), **_norm_shapes(f"{name}.norm2", 768)}
    for part, (inner, outer) in dense.items():
        shapes |= _dense_shapes(f"{name}.{part}", inner, outer, bias=bias)
    return shapes


def _gpt_shapes(layers: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    shapes: dict[str, Shape] = {"token": (VOCABULARY, 768), "position": (TOKENS, 768)}
    for layer in range(layers):
        shapes |= _block_shapes(f"blocks.{layer}", bias=False)
    return {**shapes, **_norm_shapes("norm", 768)}, {}


def _gpt(params: Tree, stats: Tree, batch: Tree) -> tuple[Array, Tree]:
    token = params["token"].astype(BF16)
    x = token[batch["tokens"]] + params["position"].astype(BF16)
    for layer in range(_count(params, "blocks")):
        x = _block(params, f"blocks.{layer}", x, causal=True)
    logits = _layer_norm(params, "norm", x) @ token.T
    return _cross_entropy(logits, batch["target"]), stats


def _vit_shapes(layers: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    shapes: dict[str, Shape] = {
        "patch.kernel": (16, 16, 3, 768),
        "patch.bias": (768,),
        "class": (1, 1, 768),
        "position": (1, 197, 768),
    }
    for layer in range(layers):
        shapes |= _block_shapes(f"blocks.{layer}", bias=True)
    return {**shapes, **_norm_shapes("norm", 768), **_dense_shapes("head", 768, 1000)}, {}


def _vit(params: Tree, stats: Tree, batch: Tree) -> tuple[Array, Tree]:
    x = _convolution(params, "patch", batch["image"].astype(BF16), stride=16, padding=0)
    x = (x + params["patch.bias"].astype(BF16)).reshape(x.shape[0], -1, 768)
    first = jnp.broadcast_to(params["class"].astype(BF16), (x.shape[0], 1, 768))
    x = jnp.concatenate([first, x], axis=1) + params["position"].astype(BF16)
    for layer in range(_count(params, "blocks")):
        x = _block(params, f"blocks.{layer}", x, causal=False)
    logits = _dense(params, "head", _layer_norm(params, "norm", x)[:, 0])
    return _cross_entropy(logits, batch["label"]), stats


def _convolution(
    params: Tree, name: str, x: Array, *, stride: int = 1, padding: int | None = None
) -> Array:
    kernel = params[f"{name}.kernel"].astype(x.dtype)
    pad = kernel.shape[0] // 2 if padding is None else padding
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class _BatchNorm:
    """Batch normalisation, and the running statistics that it leaves."""

    def __init__(self, params: Tree, stats: Tree) -> None:
        self._params, self._stats = params, stats
        self.after: Tree = {}

    def __call__(self, name: str, x: Array) -> Array:
        wide = x.astype(F32)
        mean = wide.mean((0, 1, 2))
        variance = jnp.maximum(jnp.square(wide).mean((0, 1, 2)) - jnp.square(mean), 0.0)
        for kind, value in (("mean", mean), ("var", variance)):
            key = f"{name}.{kind}"
            self.after[key] = 0.9 * self._stats[key] + 0.1 * value
        scale = lax.rsqrt(variance + 1e-5) * self._params[f"{name}.scale"]
        # Keras's form: flax's (x - mean) * scale + bias overflows libtpu 0.0.21's stack on v6e.
        shift = self._params[f"{name}.bias"] - mean * scale
        return (wide * scale + shift).astype(x.dtype)


_WIDTHS = (64, 128, 256, 512)
_BLOCKS = (3, 4, 6, 3)


def _bottlenecks(layers: int) -> list[tuple[str, int, int, int]]:
    """Name, channels that come in, width and stride of every block."""
    blocks, channels = [], 64
    for stage, (width, count) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
        for block in range(min(count, layers)):
            stride = 2 if stage and not block else 1
            blocks.append((f"blocks.{stage}_{block}", channels, width, stride))
            channels = 4 * width
    return blocks


def _resnet_shapes(layers: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    kernels: list[tuple[str, Shape]] = [("stem", (7, 7, 3, 64))]
    for name, channels, width, _ in _bottlenecks(layers):
        kernels += [
            (f"{name}.0", (1, 1, channels, width)),
            (f"{name}.1", (3, 3, width, width)),
            (f"{name}.2", (1, 1, width, 4 * width)),
        ]
        if name.endswith("_0"):
            kernels.append((f"{name}.short", (1, 1, channels, 4 * width)))
    shapes: dict[str, Shape] = {f"{name}.kernel": shape for name, shape in kernels}
    stats: dict[str, Shape] = {}
    for name, shape in kernels:
        shapes |= _norm_shapes(name, shape[-1])
        stats |= {f"{name}.{kind}": shape[-1:] for kind in ("mean", "var")}
    return {**shapes, **_dense_shapes("head", 2048, 1000)}, stats


def _resnet(params: Tree, stats: Tree, batch: Tree) -> tuple[Array, Tree]:
    norm = _BatchNorm(params, stats)

    def layer(name: str, x: Array, stride: int = 1) -> Array:
        return norm(name, _convolution(params, name, x, stride=stride))

    x = jax.nn.relu(layer("stem", batch["image"].astype(BF16), 2))
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    for name, _, _, stride in _bottlenecks(max(_BLOCKS)):
        if f"{name}.0.kernel" not in params:
            continue
        y = jax.nn.relu(layer(f"{name}.0", x))
        y = jax.nn.relu(layer(f"{name}.1", y, stride))
        y = layer(f"{name}.2", y)
        if f"{name}.short.kernel" in params:
            x = layer(f"{name}.short", x, stride)
        x = jax.nn.relu(x + y)
    logits = _dense(params, "head", x.mean((1, 2)))
    return _cross_entropy(logits, batch["label"]), norm.after


def _llama_shapes(layers: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    shapes: dict[str, Shape] = {"norm.scale": (2048,)}
    dense = {
        "query": (2048, 2048),
        "key": (2048, 512),
        "value": (2048, 512),
        "out": (2048, 2048),
        "gate": (2048, 8192),
        "up": (2048, 8192),
        "down": (8192, 2048),
    }
    for layer in range(layers):
        name = f"blocks.{layer}"
        shapes |= {f"{name}.norm1.scale": (2048,), f"{name}.norm2.scale": (2048,)}
        for part, (inner, outer) in dense.items():
            shapes |= _dense_shapes(f"{name}.{part}", inner, outer, bias=False)
    return shapes, {}


def _llama(params: Tree, stats: Tree, batch: Tree) -> tuple[Array, Tree]:
    x = batch["hidden"]
    rates = ROTARY_BASE ** (-jnp.arange(32) / 32)
    angles = jnp.outer(jnp.arange(TOKENS), rates)[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    for layer in range(_count(params, "blocks")):
        name = f"blocks.{layer}"
        normed = _rms_norm(params, f"{name}.norm1", x)
        query = _rotated(_split(_dense(params, f"{name}.query", normed), 32), cos, sin)
        key = _rotated(_split(_dense(params, f"{name}.key", normed), 8), cos, sin)
        value = _split(_dense(params, f"{name}.value", normed), 8)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + _dense(params, f"{name}.out", mixed.reshape(x.shape))
        normed = _rms_norm(params, f"{name}.norm2", x)
        gate = jax.nn.silu(_dense(params, f"{name}.gate", normed))
        x = x + _dense(params, f"{name}.down", gate * _dense(params, f"{name}.up", normed))
    difference = _rms_norm(params, "norm", x).astype(F32) - batch["wanted"]
    return jnp.square(difference).mean(), stats


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, first * sin + second * cos), axis=-1)
    return turned.astype(x.dtype)


def _described(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _images() -> dict[str, jax.ShapeDtypeStruct]:
    return {"image": _described((128, 224, 224, 3), F32), "label": _described((128,), jnp.int32)}


def _gpt_of(batch: int) -> Twin:
    numbers = _described((batch, TOKENS), jnp.int32)
    return Twin(_gpt_shapes, {"tokens": numbers, "target": numbers}, _gpt, _ADAMW)


_ADAMW = optax.adamw(1e-3, weight_decay=0.1)
_SGD = optax.sgd(0.1, momentum=0.9)
_HIDDEN = (2, TOKENS, 2048)
TWINS = {
    "gpt2_small_8": _gpt_of(8),
    "gpt2_small_16": _gpt_of(16),
    "resnet50": Twin(_resnet_shapes, _images(), _resnet, _SGD),
    "vit_b16": Twin(_vit_shapes, _images(), _vit, _ADAMW),
    "llama_1b": Twin(
        _llama_shapes,
        {"hidden": _described(_HIDDEN, BF16), "wanted": _described(_HIDDEN, F32)},
        _llama,
        _SGD,
    ),
}
