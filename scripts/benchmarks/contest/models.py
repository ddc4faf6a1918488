"""The models of `scripts/bench step` in PyTorch: weights, batches, loss, optimizer.

Everything is a function of the model's name, so that every process builds the same. Run as a
program it writes weights and batches to a file for those who do not speak PyTorch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.resnet import ResNet

Batch = dict[str, Tensor]

#: Batches that the steps go round: no fewer than the updates of the longest call.
BATCHES = 10
CLASSES = 10
VOCABULARY = 256
ADAMW_LR = 1e-4
# Batch normalisation over small batches amplifies rounding; a low rate keeps losses comparable.
SGD_LR = 1e-3


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the benchmark.

    Attributes:
        build: The module on the host.
        batch: A random batch on the host: "input" and "target".
        optimizer: Plain `torch.optim` over the module's parameters.
        lr: Its learning rate.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    lr: float


class Residual(nn.Module):
    """x + MLP(norm(x)) on [batch, width]: layer norm, two linear layers, GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The input with the block's change added."""
        changed: Tensor = x + self.second(F.gelu(self.first(self.norm(x))))
        return changed


class Block(nn.Module):
    """A pre-norm transformer block on [batch, tokens, width], attention causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        changed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return changed


class GPT(nn.Module):
    """A small GPT on token numbers [batch, tokens], the head tied to the embedding."""

    def __init__(self, *, layers: int, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits of shape [batch, tokens, vocabulary]."""
        x = self.token(numbers) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy, over examples or tokens."""
    return F.cross_entropy(model(batch["input"]).flatten(0, -2), batch["target"].flatten())


def make(name: str) -> tuple[Entry, nn.Module, list[Batch]]:
    """The named model with its weights, and the batches, always the same."""
    entry = MODELS[name]
    torch.manual_seed(0)
    module = entry.build().train()
    return entry, module, [entry.batch() for _ in range(BATCHES)]


def parameter_count(module: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in module.parameters())


def _resnet() -> nn.Module:
    settings = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
    return ResNet(settings, {"classes": CLASSES, "channels": 3}).build()


def _mlp(width: int = 256, blocks: int = 12) -> nn.Module:
    inner = (Residual(width) for _ in range(blocks))
    return nn.Sequential(nn.Linear(width, width), *inner, nn.Linear(width, CLASSES))


def _classified(*shape: int) -> Batch:
    return {"input": torch.randn(shape), "target": torch.randint(0, CLASSES, shape[:1])}


def _text(batch: int, tokens: int) -> Batch:
    numbers = torch.randint(0, VOCABULARY, (batch, tokens + 1))
    return {"input": numbers[:, :-1].contiguous(), "target": numbers[:, 1:].contiguous()}


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=SGD_LR, momentum=0.9)


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=ADAMW_LR)


def _gpt(*, layers: int, width: int, tokens: int, batch: int) -> Entry:
    return Entry(
        build=lambda: GPT(layers=layers, width=width, heads=4, tokens=tokens),
        batch=lambda: _text(batch, tokens),
        optimizer=_adamw,
        lr=ADAMW_LR,
    )


MODELS = {
    "resnet18": Entry(_resnet, lambda: _classified(32, 3, 24, 24), _sgd, SGD_LR),
    "mlp": Entry(_mlp, lambda: _classified(64, 256), _adamw, ADAMW_LR),
    "gpt": _gpt(layers=4, width=64, tokens=64, batch=4),
    "gpt_128": _gpt(layers=4, width=128, tokens=128, batch=8),
}


def export(name: str, path: str) -> None:
    """Write the model's parameters, buffers and batches as arrays, by name."""
    _, module, batches = make(name)
    arrays = {f"parameter/{key}": value.detach() for key, value in module.named_parameters()}
    arrays |= {f"buffer/{key}": value for key, value in module.named_buffers()}
    for number, batch in enumerate(batches):
        arrays |= {f"batch/{number}/{key}": value for key, value in batch.items()}
    np.savez(path, **{key: value.numpy() for key, value in arrays.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2])
