"""The gradients, and each kind of parameter update, traced once and spliced together.

Most of a step's traced ops are the same update repeated for every parameter. Where an optimizer
updates each parameter alone, parameters of one shape share one trace; where it treats every
element alike, all parameters of a group share one, and small ones are updated side by side, as one,
the others as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from runner.backends.step.elementwise import is_elementwise
from runner.backends.step.layout import is_small, lay, lying_order, standing_order
from runner.backends.step.sharing import GraphBuilder
from runner.backends.step.trace import trace_unwritten

if TYPE_CHECKING:
    from runner.backends.step.function import StepFunction

aten = torch.ops.aten
GraphModule = torch.fx.GraphModule
Node = torch.fx.Node


class _Update(NamedTuple):
    """How a parameter is updated, and whether that treats each element alone, and all alike."""

    graph: GraphModule
    elementwise: bool


class Updates:
    """A step in parts.

    Args:
        traced: The step; its optimizer updates parameters independently of each other.
        inputs: Example inputs in its order.
    """

    def __init__(self, traced: StepFunction, inputs: Sequence[Tensor]) -> None:
        self._traced, self._inputs = traced, inputs
        self._kinds: dict[object, _Update] = {}
        self._held, self._carried = len(traced.names), len(traced.initial)
        self._groups = traced.groups_of
        self._own = [[index] for index in range(traced.trainable)]
        for offset, slot in enumerate(traced.functional.slots):
            self._own[slot.parameter].append(self._held + offset)
        self._gradients = trace_unwritten(
            traced.gradients, self._of_gradients(inputs), decomposed=traced.decomposed
        )

    def _of_gradients(self, flat: Sequence[Any]) -> list[Any]:
        """The inputs of the gradients: model and batch."""
        return [*flat[: self._held], *flat[self._carried + self._traced.groups :]]

    def splice(self, builder: GraphBuilder, places: Sequence[Node]) -> list[Any]:
        """Appends gradients and all updates.

        Args:
            builder: Has a node for every input.
            places: These nodes.

        Returns:
            The nodes of the step's outputs.
        """
        outputs = builder.append(self._gradients, self._of_gradients(places))
        fixed = self._held - self._traced.trainable
        loss, norm, model_rest = outputs[0], outputs[1], outputs[2 : 2 + fixed]
        gradients, new = outputs[2 + fixed :], list(places)
        for indices in self._together(gradients, places):
            self._append(builder, indices, gradients=gradients, new=new)
        parameters = new[: self._traced.trainable]
        return [loss, norm, *parameters, *model_rest, *new[self._held : self._carried]]

    def _together(self, gradients: Sequence[Any], places: Sequence[Node]) -> list[list[int]]:
        """The parameters that have a gradient; those that are updated as one in one list."""
        alike: dict[object, list[int]] = {}
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                alike.setdefault(self._alike(index, places), []).append(index)
        return list(alike.values())

    def _alike(self, index: int, places: Sequence[Node]) -> object:
        """Equal for parameters that may be updated as one: their scalars are the same nodes."""
        value, *state = (self._inputs[i] for i in self._own[index])
        small = all(is_small(tensor) for tensor in (value, *state))
        if value.dim() == 0 or not small or not self._loose(index):
            return index
        scalars = [places[i] for i in self._own[index] if self._inputs[i].dim() == 0]
        return self._groups[index], value.dtype, *(t.dtype for t in state), *scalars

    def _loose(self, index: int) -> bool:
        """Whether a parameter's elements may be updated in any order and company."""
        value, *state = (self._inputs[i] for i in self._own[index])
        if not self._traced.pack or not {t.shape for t in state} <= {value.shape, torch.Size(())}:
            return False
        return self._update([index], self._examples([index])).elementwise

    def _append(
        self,
        builder: GraphBuilder,
        indices: Sequence[int],
        *,
        gradients: Sequence[Node],
        new: list[Any],
    ) -> None:
        """Appends the update of some parameters, and puts its nodes into `new`."""
        rate = new[self._carried + self._groups[indices[0]]]
        shapes = [self._inputs[index].shape for index in indices]
        columns = list(zip(*(self._own[index] for index in indices), strict=True))
        value, *state = ([new[i] for i in column] for column in columns)
        parts = [value, [gradients[index] for index in indices], [rate], *state]
        nodes = [_join(builder, part) for part in parts]
        lying = len(indices) == 1 and len(shapes[0]) >= 4 and self._loose(indices[0])
        if lying:
            dims = [tensor.dim() for tensor in self._examples(indices)]
            nodes = [
                _turn(builder, node, lying_order(n)) for node, n in zip(nodes, dims, strict=True)
            ]
        examples = self._examples(indices, lying=lying)
        update = self._update(indices, examples)
        shape = examples[0].shape if update.elementwise else None
        updated = builder.append(update.graph, nodes, shape=shape)
        for column, node in zip(columns, updated, strict=True):
            dim = self._inputs[column[0]].dim()
            node = _turn(builder, node, standing_order(dim)) if lying else node
            pieces = _part(builder, node, shapes=shapes) if dim else [node] * len(column)
            for position, piece in zip(column, pieces, strict=True):
                new[position] = piece

    def _examples(self, indices: Sequence[int], *, lying: bool = False) -> list[Tensor]:
        """Tensors like `step_one`'s inputs: for a parameter, or several side by side, or lying."""
        first = indices[0]
        value, *state = (self._inputs[i] for i in self._own[first])
        tensors = [value, value, self._inputs[self._carried + self._groups[first]], *state]
        if lying:
            return [t.new_empty(lay(t).shape) for t in tensors]
        if len(indices) == 1:
            return tensors
        size = sum(self._inputs[index].numel() for index in indices)
        return [t if t.dim() == 0 else t.new_empty(size) for t in tensors]

    def _update(self, indices: Sequence[int], examples: Sequence[Tensor]) -> _Update:
        """`step_one` for such inputs; if it is elementwise, as it was traced for some shape.

        No optimizer of torch.optim whose update is elementwise for one shape has another for
        the next.
        """
        first, shape = indices[0], examples[0].shape
        group = self._groups[first]
        own = (group, tuple((tuple(t.shape), t.stride(), t.dtype) for t in examples))
        plain = all(t.shape in (shape, ()) and t.is_contiguous() for t in examples)
        shared = (group, tuple((t.dim() == 0, t.dtype) for t in examples)) if plain else own
        update = self._kinds.get(shared) or self._kinds.get(own)
        if update is None:
            graph = trace_unwritten(
                lambda *flat: self._traced.functional.step_one(first, flat), examples
            )
            update = _Update(graph, elementwise=is_elementwise(graph, shape))
            self._kinds[shared if update.elementwise else own] = update
        return update


def _join(builder: GraphBuilder, nodes: Sequence[Node]) -> Node:
    """Tensors side by side in one dimension; one tensor, or one scalar of all, as it is."""
    if len(set(nodes)) == 1:
        return nodes[0]
    flat = [builder.call(aten.reshape.default, node, [-1]) for node in nodes]
    return builder.call(aten.cat.default, flat)


def _turn(builder: GraphBuilder, node: Node, order: Sequence[int] | None) -> Node:
    return builder.call(aten.permute.default, node, list(order)) if order else node


def _part(builder: GraphBuilder, node: Node, *, shapes: Sequence[torch.Size]) -> list[Node]:
    if len(shapes) == 1:
        return [node]
    ends, pieces = 0, []
    for shape in shapes:
        start, ends = ends, ends + shape.numel()
        piece = builder.call(aten.slice.Tensor, node, 0, start, ends)
        pieces.append(builder.call(aten.reshape.default, piece, list(shape)))
    return pieces
