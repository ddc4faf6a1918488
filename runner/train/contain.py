"""Keeps what a job changes for its whole process from the next job of the process.

A warm process builds everything anew for each job; what is left are settings of Python and of
torch that a job's code may have touched. Modules stay loaded: what a job keeps in one of them
is the job's own affair (`batch.isolation=process` has none of it).
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Put things back at the end as they were at the start."""
    variables, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, precision = torch.get_default_dtype(), _matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        sys.path[:] = path
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        _forget_graphs()


def _matmul_precision() -> str:
    with warnings.catch_warnings():
        # torch 2.9 warns whoever asks by the name that jobs set it by.
        warnings.simplefilter("ignore", UserWarning)
        return torch.get_float32_matmul_precision()


def _forget_graphs() -> None:
    """Drop what dynamo knows, and with it the last references to the job's tensors."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
