"""Activations that lie as the batch does, while a step over a mesh is traced."""

from __future__ import annotations

from torch import Tensor

from runner.config.parallel import Mesh
from runner.xla.pin import pin


class Activations:
    """Where the activations of a step lie.

    Args:
        mesh: The devices.

    Attributes:
        examples: How many examples are computed together; to be told before layers run.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.examples = 0

    def lie(self, x: Tensor) -> Tensor:
        """`x`, which lies as the batch does if its first dimension is the example."""
        parts = self._mesh.batch_parts
        if parts == 1 or x.dim() == 0 or x.shape[0] != self.examples or x.shape[0] % parts:
            return x
        return pin(x, self._mesh.batch_axes)
