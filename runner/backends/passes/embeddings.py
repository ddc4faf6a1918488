"""Embeddings under autocast: what is looked up comes in the autocast type.

The residual stream of a transformer begins here, and has the type of its beginning. Not exact:
it is rounded to the precision asked for, as everything else that goes into a matrix product.
The table stays float32, and so does the sum of its gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type


class Embeddings(Rewrite):
    """`torch.embedding`, behind `F.embedding` and `nn.Embedding`."""

    calls = (torch.embedding,)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        rows = proceed(*args, **kwargs)
        target = autocast_type(rows)
        if target is None or rows.dtype != torch.float32:
            return rows
        self.count += 1
        return rows.to(target)
