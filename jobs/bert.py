"""BERT on text: transformers' model, masked tokens to be predicted or sentences classified.

The model's own forward is not called: it looks at its mask's values. Its parts are run in the
same order instead, the layers through `run_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs import hf
from jobs.base import (
    Arrays,
    Batch,
    Decode,
    Job,
    SettingError,
    Sharding,
    fraction,
    weight_decay_groups,
)
from jobs.classify import class_metrics, class_words
from jobs.language import SHOWN_TOKENS, TextShown, plain_text
from jobs.stack import run_layers

#: "base" has the sizes of BERT-base (its published config.json).
PRESETS: Mapping[str, Mapping[str, int]] = {
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "base": {
        "vocab_size": 30_522,
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}

FAMILY = hf.Family(
    kind="bert",
    sizes={
        "vocabulary": "vocab_size",
        "depth": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
    },
    presets=PRESETS,
)


class _Bert(Job):
    """What both jobs share.

    Settings: `preset`, a name in `PRESETS` for random weights, or a folder in Hugging Face
    format (config.json, *.safetensors) for its sizes and weights; `vocabulary`, `depth`, `width`,
    `heads`, `mlp_width`, each null for the preset's; `dropout`.

    Raises:
        DataError: The folder has no readable config.json.
    """

    sharding: ClassVar[Sharding] = {
        r"word_embeddings\.weight": ("tensor", "fsdp"),
        r"position_embeddings\.weight": (None, "fsdp"),
        r"(query|key|value|intermediate\.dense)\.weight": ("tensor", "fsdp"),
        r"(query|key|value|intermediate\.dense)\.bias": ("tensor",),
        r"layer\.\d+\.(attention\.)?output\.dense\.weight": ("fsdp", "tensor"),
    }

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        self.chosen = FAMILY.chosen(self)
        dropout = fraction(settings, "dropout")
        self.dropouts = {
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Weight decay for matrices, none for norms and biases."""
        return weight_decay_groups(model)

    def tokens_per_example(self) -> int:
        """The sequence length."""
        return self.fact("seq_len")


class MaskedBert(_Bert, TextShown):
    """A BERT that predicts masked tokens."""

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        if not self.facts.get("masked"):
            raise SettingError(
                "data must be text with data.options.mask_fraction > 0 for a job that predicts "
                "masked tokens; this data masks none"
            )

    def build(self) -> nn.Module:
        """The network for tokens of shape [batch, seq_len].

        Raises:
            DataError: The folder's weights are missing or broken.
            SettingError: transformers is not installed.
        """
        return self.chosen.build("BertForMaskedLM", changes=self.dropouts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy of the chosen tokens, in nats."""
        return self.evaluate(model, batch)["loss"].mean()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of the chosen tokens: the part that is told right, cross entropy, the likeliest."""
        found = masked_logits(model, batch["tokens"]).float()
        chosen, target = batch["chosen"].float(), batch["target"]
        losses = F.cross_entropy(found.transpose(1, 2), target, reduction="none")
        best = found.argmax(dim=2)
        right = (best == target).float()
        return {
            "accuracy": (right * chosen).sum(dim=1) / self.facts["masked"],
            "loss": (losses * chosen).sum(dim=1) / self.facts["masked"],
            "predicted": best,
        }


class BertClassifier(_Bert):
    """A BERT that classifies texts of up to `seq_len` tokens."""

    def build(self) -> nn.Module:
        """The network for tokens of shape [batch, seq_len]; its last layer is always new.

        Raises:
            DataError: The folder's weights are missing or broken.
            SettingError: transformers is not installed.
        """
        return self.chosen.build(
            "BertForSequenceClassification",
            changes={**self.dropouts, "num_labels": self.fact("classes")},
            new=("classifier.", "bert.pooler."),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(class_logits(model, batch).float(), batch["label"])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Whether the best class is the right one, and cross entropy."""
        return class_metrics(class_logits(model, batch), batch["label"])

    def show(
        self, batch: Arrays, predicted: npt.NDArray[Any], *, decode: Decode | None
    ) -> Mapping[str, str]:
        """Each text below its class and what the model took it for."""
        lines = []
        for tokens, length, label, said in zip(
            batch["tokens"], batch["length"], batch["label"], predicted, strict=True
        ):
            text = plain_text(tokens[: min(length, SHOWN_TOKENS)], decode)
            lines += [f"    {class_words(label, said)}", f"    {text}", ""]
        return {"examples": "\n".join(lines)}


def masked_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of each token: [batch, length, vocabulary].

    Args:
        model: A BertForMaskedLM of transformers.
        tokens: int64 [batch, length], without padding.
    """
    x = _embedded(model, tokens)
    found: Tensor = model.cls(run_layers(model.bert.encoder.layer, x, call=_call))
    return found


def class_logits(model: Any, batch: Batch) -> Tensor:
    """Logits of the classes: [batch, classes].

    Args:
        model: A BertForSequenceClassification of transformers.
        batch: "tokens", int64 [batch, length], and "length", int64 [batch]: how many of them
            are text.
    """
    tokens = batch["tokens"]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    present = (places < batch["length"][:, None])[:, None, None]
    x = _embedded(model, tokens)
    x = run_layers(model.bert.encoder.layer, x, present, call=_call)
    found: Tensor = model.classifier(model.dropout(model.bert.pooler(x)))
    return found


def _embedded(model: Any, tokens: Tensor) -> Tensor:
    # The numbers that the library keeps in buffers are made anew: as inputs of a graph whose
    # views are its outputs, they confuse torch_xla's bridge.
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    kinds = torch.zeros_like(tokens)
    found: Tensor = model.bert.embeddings(
        input_ids=tokens, position_ids=places, token_type_ids=kinds
    )
    return found


def _call(layer: nn.Module, x: Tensor, present: Tensor | None = None) -> Any:
    return layer(x, attention_mask=present)[0]
