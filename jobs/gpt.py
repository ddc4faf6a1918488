"""A decoder-only GPT on text: pre-norm, GELU, causal attention, embedding and head tied.

Source: Radford et al., "Language models are unsupervised multitask learners", 2019; rotary
positions from Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.base import (
    Batch,
    SettingError,
    Sharding,
    fraction,
    setting,
    weight_decay_groups,
    whole,
)
from jobs.language import TextShown, check_unmasked, next_token_loss, next_token_metrics
from jobs.stack import run_layers

INIT_STD = 0.02
ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a GPT; `positions` is "rotary" or "learned"."""

    vocabulary: int
    seq_len: int
    depth: int
    width: int
    heads: int
    dropout: float
    positions: str


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on [batch, length, width]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        """The input with the block's changes added.

        Args:
            x: [batch, length, width].
            *angles: Cosines and sines of rotary angles, [length, width / heads / 2] each; none
                where positions are learned.
        """
        x = x + self._drop(self.out(self._attend(self.attention_norm(x), angles)))
        return x + self._drop(self.down(F.gelu(self.up(self.mlp_norm(x)))))

    def _attend(self, x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
        batch, length, width = x.shape
        # Heads come first in the rows of `qkv`: cut over devices there, a head stays whole.
        parts = self.qkv(x).view(batch, length, self.heads, 3, width // self.heads)
        query, key, value = parts.transpose(1, 2).unbind(3)
        if angles:
            query, key = _turn(query, *angles), _turn(key, *angles)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return mixed.transpose(1, 2).reshape(batch, length, width)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """From tokens [batch, length] to logits [batch, length, vocabulary]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        learned = shape.positions == "learned"
        self.position = nn.Embedding(shape.seq_len, shape.width) if learned else None
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        half = shape.width // shape.heads // 2
        rates = ROTARY_BASE ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(shape.seq_len), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                scale = math.sqrt(2 * shape.depth) if residual else 1.0
                nn.init.normal_(parameter, std=INIT_STD / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each."""
        length = tokens.shape[1]
        x = self.embedding(tokens)
        angles: tuple[Tensor, ...] = (self.cos[:length], self.sin[:length])
        if self.position is not None:
            x, angles = x + self.position.weight[:length], ()
        x = F.dropout(x, self.dropout, self.training)
        x = run_layers(self.layers, x, *angles)
        return F.linear(self.norm(x), self.embedding.weight)


class GPTJob(TextShown):
    """A GPT that predicts the next token.

    Settings: `depth`, its blocks; `width`; `heads`, which divide the width into even parts;
    `dropout`; `positions`, "rotary" or "learned". The data tells vocabulary and length.
    """

    sharding: ClassVar[Sharding] = {
        r"embedding\.weight": ("tensor", "fsdp"),
        r"position\.weight": (None, "fsdp"),
        r"(qkv|up)\.weight": ("tensor", "fsdp"),
        r"(out|down)\.weight": ("fsdp", "tensor"),
    }

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        check_unmasked(self)
        self.shape = Shape(
            vocabulary=self.fact("vocabulary"),
            seq_len=self.fact("seq_len"),
            depth=whole(settings, "depth", least=1),
            width=whole(settings, "width", least=2),
            heads=whole(settings, "heads", least=1),
            dropout=fraction(settings, "dropout"),
            positions=setting(settings, "positions", ("rotary", "learned")),
        )
        if self.shape.width % (2 * self.shape.heads):
            raise SettingError(
                f"model.width must be a multiple of 2 * model.heads = {2 * self.shape.heads}: "
                f"each head turns pairs; got {self.shape.width}"
            )

    def build(self) -> nn.Module:
        """The network for tokens of shape [batch, seq_len]."""
        return GPT(self.shape)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the next token, in nats."""
        return next_token_loss(model(batch["tokens"]), batch["target"])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, and the same in bits for each byte of text."""
        return next_token_metrics(model(batch["tokens"]), batch["target"], facts=self.facts)

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Weight decay for matrices, none for norms."""
        return weight_decay_groups(model)

    def tokens_per_example(self) -> int:
        """The sequence length."""
        return self.shape.seq_len


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of each head of [batch, heads, length, 2 * half]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.type_as(x)
