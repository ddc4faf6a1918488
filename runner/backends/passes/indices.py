"""Look rows up by int32 numbers: a TPU has no int64 and computes each one as a pair.

Exact: a table has fewer than 2**31 rows.
"""

from __future__ import annotations

from typing import Any

import torch

from runner.backends.passes.rewrite import Function, Rewrite


class Indices(Rewrite):
    """`torch.embedding` by int64."""

    calls = (torch.embedding,)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        if len(args) < 2 or args[1].dtype != torch.int64:
            return proceed(*args, **kwargs)
        table, indices, *rest = args
        self.count += 1
        return proceed(table, indices.to(torch.int32), *rest, **kwargs)
