"""From a configuration to a job that can be trained: the job, its data, its recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import jobs.base
from jobs.base import DataRequest, Dataset, Job
from runner.backends.base import Recipe
from runner.config.schema import Config, Precision
from runner.record.errors import ConfigError, DataError
from runner.train.flops import on_meta
from runner.train.input import read


@dataclasses.dataclass(frozen=True)
class Built:
    """A job with its data, ready for a backend."""

    job: Job
    data: Dataset
    recipe: Recipe


def build(config: Config) -> Built:
    """Build the job that the configuration names.

    Raises:
        ConfigError: A setting breaks a rule that only the job knows.
        DataError: The data is missing or broken.
    """
    with user_errors():
        job, data = _job_and_data(config)
        torch.manual_seed(config.seed)
        model = job.build()
    return Built(job=job, data=data, recipe=_recipe(config, job=job, model=model))


def describe(config: Config) -> Built:
    """The same, but the model's tensors have names, shapes and types only: no data, no memory.

    A model whose making depends on the values of tensors is made for real and then described.

    Raises:
        ConfigError: As `build`.
        DataError: As `build`.
    """
    with user_errors():
        job, data = _job_and_data(config)
        try:
            with torch.device("meta"):
                model = job.build()
        except (NotImplementedError, RuntimeError):
            model = on_meta(job.build())
    return Built(job=job, data=data, recipe=_recipe(config, job=job, model=model))


def _job_and_data(config: Config) -> tuple[Job, Dataset]:
    data = resolve(config.data.entry)(
        DataRequest(
            root=config.data.root,
            options=config.data.options,
            workers=config.data.workers,
            seed=config.seed,
        )
    )
    return resolve(config.job.entry)(config.model, data.facts), data


def _recipe(config: Config, *, job: Job, model: nn.Module) -> Recipe:
    def make_optimizer(module: nn.Module) -> Optimizer:
        groups = [dict(group) for group in job.parameter_groups(module)]
        for group in groups:
            group.setdefault("lr_scale", 1.0)
        cls = getattr(torch.optim, config.optim.name)
        try:
            optimizer: Optimizer = cls(groups, lr=config.optim.lr, **config.optim.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optim.options must suit {config.optim.name}: {error}") from error
        return optimizer

    return Recipe(
        model=model,
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=make_optimizer,
        autocast=torch.bfloat16 if config.precision is Precision.bf16 else None,
        clip_norm=config.grad_clip_norm,
        accumulate=config.accumulate_steps,
        remat=config.remat == "layers",
        scan_layers=config.scan_layers,
        seed=config.seed,
        passes=config.backend.passes,
    )


def example_batch(built: Built, config: Config) -> dict[str, Tensor]:
    """A host batch of the training data, for its names, shapes and types.

    Raises:
        DataError: The first example cannot be read.
    """
    first = np.zeros(config.job.batch_size, dtype=np.int64)
    return read(built.data.train, first, rng=np.random.default_rng(0))


def described_batch(built: Built, size: int) -> dict[str, Tensor]:
    """A batch of the training data without data: one example is read for its shape.

    Raises:
        DataError: The first example cannot be read.
    """
    one = read(built.data.train, np.zeros(1, dtype=np.int64), rng=np.random.default_rng(0))
    return {
        name: torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
        for name, tensor in one.items()
    }


def resolve(entry: str) -> Any:
    """The object that a `module:name` entry names; trust was checked before.

    Raises:
        ConfigError: There is no such module, or no such name in it.
    """
    module_name, _, name = entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(
            f"entry {entry!r} must name a module on the Python path; {error.name!r} is not there "
            "(set PYTHONPATH, or start from the folder that holds it)"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"entry {entry!r}: module {module_name} has no {name!r}") from error


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that a job may raise into those that the runner knows."""
    try:
        yield
    except jobs.base.DataError as error:
        raise DataError(str(error)) from error
    except jobs.base.SettingError as error:
        raise ConfigError(str(error)) from error
