"""Llama on text: transformers' model from a preset, random, or from a local folder.

The model's own forward is not called: it makes masks whose shape hangs on tensors' values. Its
parts are run in the same order instead, the layers through `run_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jobs import hf
from jobs.base import Batch, SettingError, Sharding, fraction, weight_decay_groups
from jobs.language import TextShown, check_unmasked, next_token_loss, next_token_metrics
from jobs.stack import run_layers

#: "1b" and "8b" have the sizes of Llama 3.2 1B and Llama 3.1 8B (their published config.json),
#: without the stretching of positions for long contexts.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128_256,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
}

FAMILY = hf.Family(
    kind="llama",
    sizes={
        "vocabulary": "vocab_size",
        "depth": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "mlp_width": "intermediate_size",
    },
    presets=PRESETS,
)


class Llama(TextShown):
    """A Llama that predicts the next token.

    Settings: `preset`, a name in `PRESETS` for random weights, or a folder in Hugging Face
    format (config.json, *.safetensors) for its sizes and weights; `vocabulary`, `depth`, `width`,
    `heads`, `kv_heads`, `mlp_width`, each null for the preset's; `dropout` of attention.

    Raises:
        DataError: The folder has no readable config.json.
    """

    sharding: ClassVar[Sharding] = {
        r"(embed_tokens|lm_head|[qkv]_proj|gate_proj|up_proj)\.weight": ("tensor", "fsdp"),
        r"(o_proj|down_proj)\.weight": ("fsdp", "tensor"),
    }

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        check_unmasked(self)
        self.dropout = fraction(settings, "dropout")
        self.chosen = FAMILY.chosen(self)
        heads, width = (self.chosen.config[key] for key in ("num_attention_heads", "hidden_size"))
        if width // heads % 2:
            raise SettingError(
                f"model.width must be a multiple of 2 * model.heads = {2 * heads}: each head "
                f"turns pairs; got {width}"
            )
        groups = self.chosen.config.get("num_key_value_heads", heads)
        if heads % groups:
            raise SettingError(
                f"model.kv_heads must be a divisor of model.heads, {heads}; got {groups}"
            )

    def build(self) -> nn.Module:
        """The network for tokens of shape [batch, seq_len].

        Raises:
            DataError: The folder's weights are missing or broken.
            SettingError: transformers is not installed.
        """
        return self.chosen.build("LlamaForCausalLM", changes={"attention_dropout": self.dropout})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the next token, in nats."""
        return next_token_loss(logits(model, batch["tokens"]), batch["target"])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, and the same in bits for each byte of text."""
        found = logits(model, batch["tokens"])
        return next_token_metrics(found, batch["target"], facts=self.facts)

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Weight decay for matrices, none for norms."""
        return weight_decay_groups(model)

    def tokens_per_example(self) -> int:
        """The sequence length."""
        return self.fact("seq_len")


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the token after each: [batch, length, vocabulary].

    Args:
        model: A LlamaForCausalLM of transformers.
        tokens: int64 [batch, length], without padding.
    """
    inner = model.model
    x = inner.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    cos, sin = inner.rotary_emb(x, places)
    x = run_layers(inner.layers, x, cos, sin, call=_call)
    found: Tensor = model.lm_head(inner.norm(x))
    return found


def _call(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    # Without a mask, PyTorch's attention makes the causal one itself.
    return layer(x, attention_mask=None, position_embeddings=(cos, sin))
