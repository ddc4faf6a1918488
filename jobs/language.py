"""Losses and held-out metrics of jobs that predict the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from jobs.base import Job, SettingError


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
    """Cross entropy of each example, and the same in bits for each byte of the held-out text.

    Args:
        logits: [batch, length, vocabulary].
        target: int64 [batch, length].
        facts: The data's; its mean over all examples is exact, since the bytes a token stands
            for are averaged over the whole of the held-out text.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
    loss = losses.mean(dim=1)
    tokens_per_byte = facts["heldout_tokens"] / facts["heldout_bytes"]
    return {"loss": loss, "bits_per_byte": loss * (tokens_per_byte / math.log(2))}


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
