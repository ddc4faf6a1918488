"""The models of `scripts/bench tpu_program` in PyTorch, as anybody writes them, without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.gpt import GPT, Shape
from jobs.language import next_token_loss
from runner.backends.base import Recipe
from runner.config.schema import PassesConfig

Batch = Mapping[str, Tensor]

VOCABULARY, TOKENS = 50257, 1024
ROTARY_BASE = 500_000.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the benchmark.

    Attributes:
        build: The module with so many layers.
        batch: A batch of its size.
        loss: Its mean loss.
        optimizer: Plain `torch.optim`.
    """

    build: Callable[[int], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]

    def recipe(self, layers: int, passes: PassesConfig) -> Recipe:
        """One training step in bf16, its model described only."""
        with torch.device("meta"):
            module = self.build(layers)
        return Recipe(
            module,
            self.loss,
            _unused,
            self.optimizer,
            autocast=torch.bfloat16,
            passes=passes,
        )


def _unused(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    raise NotImplementedError


class LlamaBlock(nn.Module):
    """RMS norm, rotary grouped attention, SwiGLU; no biases."""

    def __init__(self, width: int, heads: int, shared: int, inner: int) -> None:
        super().__init__()
        self.heads, self.shared, size = heads, shared, width // heads
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, shared * size, bias=False)
        self.value = nn.Linear(width, shared * size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The residual stream after this block, [batch, tokens, width]."""
        normed = self.norm1(x)
        query = _rotated(_heads(self.query(normed), self.heads), cos, sin)
        key = _rotated(_heads(self.key(normed), self.shared), cos, sin)
        value = _heads(self.value(normed), self.shared)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        normed = self.norm2(x)
        changed: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return changed


class LlamaStack(nn.Module):
    """Blocks of the size of Llama 3.2 1B's on [batch, tokens, width]: 61 million numbers each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LlamaBlock(2048, 32, 8, 8192) for _ in range(layers))
        self.norm = nn.RMSNorm(2048, eps=1e-5)
        rates = ROTARY_BASE ** (-torch.arange(32) / 32)
        angles = torch.outer(torch.arange(TOKENS), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The last norm's output."""
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        normed: Tensor = self.norm(x)
        return normed


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.type_as(x)


def _resnet(layers: int) -> nn.Module:
    """ResNet-50 has stages of 3, 4, 6 and 3 blocks; so many blocks of them at most."""
    stages = [min(blocks, layers) for blocks in (3, 4, 6, 3)]
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, stages)


def _vit(layers: int) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=layers, num_heads=12, hidden_dim=768, mlp_dim=3072
    )


def _gpt(layers: int) -> nn.Module:
    return GPT(Shape(VOCABULARY, TOKENS, layers, 768, 12, 0.0, "learned"))


def _images() -> dict[str, Tensor]:
    return {"image": described(128, 3, 224, 224), "label": described(128, whole=True)}


def _text(batch: int) -> dict[str, Tensor]:
    numbers = described(batch, TOKENS, whole=True)
    return {"tokens": numbers, "target": numbers}


def described(*shape: int, whole: bool = False) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=torch.int64 if whole else torch.float32, device="meta")


def _classification(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]).float(), batch["label"])


def _prediction(model: nn.Module, batch: Batch) -> Tensor:
    return next_token_loss(model(batch["tokens"]), batch["target"])


def _regression(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["hidden"]).float() - batch["wanted"]).square().mean()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as language models take it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def _gpt_of(batch: int) -> Model:
    return Model(_gpt, lambda: _text(batch), _prediction, adamw)


def _hidden() -> dict[str, Tensor]:
    shape = (2, TOKENS, 2048)
    return {"hidden": described(*shape).to(torch.bfloat16), "wanted": described(*shape)}


MODELS = {
    "gpt2_small_8": _gpt_of(8),
    "gpt2_small_16": _gpt_of(16),
    "resnet50": Model(_resnet, _images, _classification, _sgd),
    "vit_b16": Model(_vit, _images, _classification, adamw),
    # Momentum SGD: with AdamW's state a v5e's memory would hold nothing else.
    "llama_1b": Model(LlamaStack, _hidden, _regression, _sgd),
}
