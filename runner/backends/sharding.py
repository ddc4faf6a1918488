"""Where each tensor of a step lies on a mesh: the rules, without a device.

A partition says for every dimension of a tensor over which axes of the mesh it is cut; over the
other axes the tensor is repeated. Training places tensors by it, preflight describes them by it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from runner.config.parallel import Mesh
from runner.record.errors import ConfigError

#: For each dimension the axes that cut it, outermost first.
Partition = tuple[tuple[str, ...], ...]
#: Pattern of a parameter's name -> for each dimension an axis or None: see `jobs.base.Job`.
Rules = Mapping[str, Sequence[str | None]]

FSDP = "fsdp"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The partitions of a step's tensors.

    Attributes:
        mesh: The devices.
        rules: The job's, for its parameters.
    """

    mesh: Mesh
    rules: Rules = dataclasses.field(default_factory=dict)

    def carried(
        self, names: Sequence[tuple[str, str]], shapes: Sequence[Sequence[int]]
    ) -> list[Partition]:
        """The partitions of the state that a step carries.

        Args:
            names: Group and name of every tensor: see `runner.backends.state.TrainState`.
            shapes: Their whole shapes.

        Raises:
            ConfigError: A rule of the job does not fit its parameter.
        """
        parameters = {
            name: (tuple(shape), self.parameter(name, shape))
            for (group, name), shape in zip(names, shapes, strict=True)
            if group == "params"
        }
        found = []
        for (group, name), shape in zip(names, shapes, strict=True):
            if group == "params":
                found.append(parameters[name][1])
            elif group == "optimizer":
                like, partition = parameters[name.rpartition("/")[0]]
                found.append(_as_parameter(shape, like=like, partition=partition))
            else:
                found.append(whole(shape))
        return found

    def parameter(self, name: str, shape: Sequence[int]) -> Partition:
        """The partition of a parameter.

        An axis that does not divide its dimension does not cut it. A parameter that no rule cuts
        over "fsdp" is cut there along its longest dimension that divides, so that no device
        holds more than its share.

        Raises:
            ConfigError: The job's rule does not fit it.
        """
        axes = [
            axis if axis is not None and self._divides(size, axis) else None
            for axis, size in zip(self._rule(name, shape), shape, strict=True)
        ]
        if FSDP in self.mesh.axes and FSDP not in axes:
            free = [d for d, a in enumerate(axes) if a is None and self._divides(shape[d], FSDP)]
            if free:
                axes[max(free, key=lambda d: shape[d])] = FSDP
        return tuple((axis,) if axis else () for axis in axes)

    def batch(self, shape: Sequence[int]) -> Partition:
        """The partition of a tensor whose first dimension is the example."""
        return (self.mesh.batch_axes, *(() for _ in shape[1:])) if shape else ()

    def parts(self, partition: Partition) -> int:
        """In how many parts a tensor is cut."""
        return math.prod(self.mesh.axes[axis] for axes in partition for axis in axes)

    def _divides(self, size: int, axis: str) -> bool:
        return axis in self.mesh.axes and size % self.mesh.axes[axis] == 0

    def _rule(self, name: str, shape: Sequence[int]) -> Sequence[str | None]:
        for pattern, axes in self.rules.items():
            if re.search(pattern, name):
                if len(axes) != len(shape):
                    raise ConfigError(
                        f"the job's sharding rule {pattern!r} must have an entry for each dimension"
                        f" of {name}, which has shape {list(shape)}; got {tuple(axes)}"
                    )
                return axes
        return (None,) * len(shape)


#: Everything on one device.
ONE_DEVICE = Sharding(Mesh({}))


def whole(shape: Sequence[int]) -> Partition:
    """The partition of a tensor that every device holds all of."""
    return ((),) * len(shape)


def is_cut(partition: Partition) -> bool:
    """Whether devices hold different parts of a tensor."""
    return any(partition)


def _as_parameter(shape: Sequence[int], *, like: Sequence[int], partition: Partition) -> Partition:
    """The partition of a parameter's state: cut as it is, where it has the same dimensions."""
    if len(shape) != len(like):
        return whole(shape)
    return tuple(
        axes if size == own else () for size, own, axes in zip(shape, like, partition, strict=True)
    )
