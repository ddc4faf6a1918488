"""The static table of optimizers agrees with the installed torch.optim."""

from __future__ import annotations

import inspect

import torch

from runner.config import names


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name: item
        for name, item in vars(torch.optim).items()
        if inspect.isclass(item)
        and issubclass(item, torch.optim.Optimizer)
        and item is not torch.optim.Optimizer
    }


def test_the_table_has_every_optimizer_of_torch() -> None:
    assert set(names.OPTIMIZERS) | set(names.REFUSED_OPTIMIZERS) == set(_classes())
    assert not set(names.OPTIMIZERS) & set(names.REFUSED_OPTIMIZERS)


def test_the_table_has_every_option_with_its_type() -> None:
    for name, options in names.OPTIMIZERS.items():
        signature = inspect.signature(_classes()[name]).parameters
        assert set(options) == set(signature) - set(names.RUNNER_OPTIONS), name
        for option in options:
            default = signature[option].default
            example = names.option_example(name, option)
            if isinstance(default, tuple):
                assert isinstance(example, list), (name, option)
                assert len(example) == len(default), (name, option)
            elif default is None:
                annotation = str(signature[option].annotation)
                assert ("bool" in annotation) == isinstance(example, bool), (name, option)
            else:
                assert isinstance(default, bool) == isinstance(example, bool), (name, option)
                assert isinstance(example, (type(default), float)), (name, option)
