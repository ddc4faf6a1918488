"""Which of the tensors that a graph reads is the seed of its random operations.

torch_xla 2.9.0 knows its seed by a number of its own, until somebody asks for the tensors that a
graph reads: then the seed is a tensor like the others, with a new number.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from runner.xla.binding import binding

_numbers: set[int] = set()


def is_seed(number: int) -> bool:
    """Whether a number, as torch_xla gives them to tensors, is a seed's."""
    return number == binding._get_seed_info_id() or number in _numbers


def still_seed(tensors: Iterable[Tensor]) -> None:
    """Tells of tensors that stand for a seed from now on."""
    _numbers.update(binding._xla_get_tensor_id(tensor) for tensor in tensors)


def read_by(results: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Numbers and values of the tensors on a device that some results are computed from."""
    ids, values = binding._get_tensors_xla_device_data_node(results)
    still_seed(value for number, value in zip(ids, values, strict=True) if is_seed(number))
    return list(ids), list(values)
