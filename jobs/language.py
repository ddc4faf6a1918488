"""Losses and held-out metrics of jobs that predict the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from jobs.base import Arrays, Decode, Job, SettingError

#: How much of each example is shown.
SHOWN_TOKENS = 96


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats.

    Args:
        logits: [batch, length, vocabulary].
        target: int64 [batch, length], the token that follows each.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def next_token_metrics(
    logits: Tensor, target: Tensor, *, facts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Cross entropy of each example, the same in bits a byte, and the likeliest tokens.

    Args:
        logits: [batch, length, vocabulary].
        target: int64 [batch, length].
        facts: The data's; its mean over all examples is exact, since the bytes a token stands
            for are averaged over the whole of the held-out text.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
    loss = losses.mean(dim=1)
    tokens_per_byte = facts["heldout_tokens"] / facts["heldout_bytes"]
    return {
        "loss": loss,
        "bits_per_byte": loss * (tokens_per_byte / math.log(2)),
        "predicted": logits.argmax(dim=2),
    }


class TextShown(Job):
    """A job that predicts tokens of text, and shows them beside the right ones."""

    def show(
        self, batch: Arrays, predicted: npt.NDArray[Any], *, decode: Decode | None
    ) -> Mapping[str, str]:
        """Each example's text, and below it what the model says of each of its tokens.

        Of masked text, what the model was asked for stands between: the rest is as it was.
        """
        blocks = []
        for place, target in enumerate(batch["target"][:, :SHOWN_TOKENS]):
            said = predicted[place, :SHOWN_TOKENS]
            lines = {"text": target}
            if "chosen" in batch:
                lines["asked"] = batch["tokens"][place, :SHOWN_TOKENS]
                said = np.where(batch["chosen"][place, :SHOWN_TOKENS], said, target)
            lines["model"] = said
            blocks += [f"    {name:5} | {plain_text(row, decode)}" for name, row in lines.items()]
            blocks.append("")
        return {"examples": "\n".join(blocks)}


def plain_text(tokens: npt.NDArray[np.int64], decode: Decode | None) -> str:
    """Tokens as one line, each character that would not show as a dot."""
    text = decode(tokens) if decode is not None else " ".join(map(str, tokens))
    return "".join(character if character.isprintable() else "·" for character in text)


def check_unmasked(job: Job) -> None:
    """The data's tokens must be whole, since the job predicts the next one.

    Raises:
        SettingError: Some of them are masked.
    """
    if job.facts.get("masked"):
        raise SettingError(
            f"data.options.mask_fraction must be 0: {type(job).__name__} predicts the next token, "
            f"not masked ones; got {job.facts['masked']} masked of {job.fact('seq_len')}"
        )
