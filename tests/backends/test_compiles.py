"""What is compiled leaves a record, and a recompile is counted, explained, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runner.record.errors import BackendError
from runner.record.events import GraphRecord
from runner.xla import counters
from runner.xla.device import open_device, to_host
from tests.backends import problems


def test_openxla_records_forward_backward_and_optimizer_once() -> None:
    records: list[GraphRecord] = []
    backend = problems.start("openxla", problems.recipe(), records=records)
    for step in range(6):  # a batch size of its own: what another test compiled costs nothing
        backend.train_step(backend.place(problems.batch(step, size=9)), step=step, lr=0.1)
    assert [record.role for record in records] == ["forward", "backward", "optimizer"]
    forward = records[0]
    assert forward.nodes > 5
    assert forward.xla_s > 0
    assert len(forward.hash) == 16
    assert forward.cause == "first call"
    assert not any(record.recompile for record in records)


@pytest.mark.parametrize(("name", "programs"), [("lazy", 1), ("openxla", 3), ("openxla_step", 1)])
def test_a_step_starts_a_known_number_of_programs_and_never_blocks(
    name: str, programs: int
) -> None:
    backend = problems.start(name, problems.recipe())
    problems.losses(backend, 2)
    started, blocked = backend.programs(), counters.blocking_syncs()
    problems.losses(backend, 5, first=2)
    assert backend.programs() - started == 5 * programs
    assert counters.blocking_syncs() == blocked


@pytest.mark.parametrize("name", ["lazy", "openxla", "openxla_step"])
def test_a_new_learning_rate_never_recompiles(name: str) -> None:
    records: list[GraphRecord] = []
    backend = problems.start(name, problems.recipe(), records=records)
    for step, lr in enumerate([0.1, 0.5, 1.0, 2.0, 1.0, 0.001]):
        backend.train_step(backend.place(problems.batch(step)), step=step, lr=lr)
    assert not any(record.recompile for record in records)


@pytest.mark.parametrize("name", ["lazy", "openxla", "openxla_step"])
def test_a_new_batch_shape_is_a_recompile_that_names_the_shapes(name: str) -> None:
    records: list[GraphRecord] = []
    backend = problems.start(name, problems.recipe(), records=records)
    problems.losses(backend, 2)
    backend.train_step(backend.place(problems.batch(0, size=4)), step=2, lr=0.1)
    recompiles = [record for record in records if record.recompile]
    assert recompiles
    assert "[8, 3, 8, 8] -> float32[4, 3, 8, 8]" in recompiles[0].cause


def test_strict_refuses_a_recompile_and_says_what_changed() -> None:
    backend = problems.start("openxla", problems.recipe(), strict=True)
    problems.losses(backend, 2)
    with pytest.raises(BackendError, match=r"strict allows no recompile.*\[4, 3, 8, 8\]"):
        backend.train_step(backend.place(problems.batch(0, size=4)), step=2, lr=0.1)


def test_the_backends_are_registered_with_dynamo_under_names_of_their_own() -> None:
    import runner.backends.openxla  # noqa: F401

    assert {"runner_openxla", "runner_openxla_eval"} <= set(torch._dynamo.list_backends(()))


@torch.no_grad()
def test_autocast_ends_in_an_evaluated_graph_where_it_ends_in_the_code() -> None:
    import runner.backends.openxla  # noqa: F401

    def products(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("xla", torch.bfloat16):
            before = x @ x
            with torch.autocast("xla", enabled=False):
                exact = before.float() @ x
            after = exact @ x
        return before, exact, after

    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(open_device())
    found = torch.compile(products, backend="runner_openxla_eval", dynamic=False)(x)
    assert not torch.is_autocast_enabled("xla")
    for one, expected in zip(to_host(found), to_host(products(x)), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
