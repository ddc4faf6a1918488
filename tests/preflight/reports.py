"""Configurations and reports for tests that need no compiler."""

from __future__ import annotations

from runner.config.schema import (
    BackendConfig,
    Config,
    DataConfig,
    HardwareConfig,
    JobConfig,
    Mode,
    OptimConfig,
    ScheduleConfig,
)
from runner.record.preflight import (
    Allocation,
    CollectiveSum,
    Estimate,
    Hbm,
    ModuleCost,
    OperationCost,
    PreflightReport,
    Roof,
    Seconds,
)


def config() -> Config:
    """The smallest job, to be judged."""
    return Config(
        job=JobConfig(name="mlp", entry="jobs.mlp:MLP"),
        data=DataConfig(name="digits", entry="jobs.images:digits"),
        backend=BackendConfig(name="openxla_step"),
        optim=OptimConfig(name="SGD", lr=0.1),
        schedule=ScheduleConfig(),
        hardware=HardwareConfig(name="v5e-1"),
        mode=Mode.preflight,
        model={"width": 64, "depth": 1, "dropout": 0.0},
    )


def report(*, fits: bool = True, total: int = 3 << 30, capacity: int = 16 << 30) -> PreflightReport:
    """A report with something in every part."""
    return PreflightReport(
        fits=fits,
        reason="fits" if fits else "does not fit",
        hardware="v5e-8",
        chip="v5e:2x4",
        chips=8,
        mesh={"data": 8},
        batch_size=64,
        parameters=1_500_000_000,
        nodes=1234,
        arguments_bytes=total // 2,
        model_flops=3e15,
        flops=4e14,
        hbm_bytes=5e9,
        seconds=Seconds(1.0, 0.5, 60.0),
        hbm=Hbm(total // 2, total // 2, total // 2, total // 2, 0, total, capacity),
        largest=[Allocation("argument", 1 << 30, "f32[16384,16384]", "params/a.weight")],
        collectives=[CollectiveSum("all-reduce", 12, 1 << 30, 1.75e9)],
        roof=Roof(0.002, 0.006, 0.001, "hbm", 0.006, 10_666.0, 0.0, 0.33),
        estimate=Estimate(
            cycles=15_000_000,
            step_s=0.01,
            modules=[
                ModuleCost("layers.0.a", 1000, 2000, 0, 1e15),
                ModuleCost("layers.0.b", 100, 200, 0, 1e15),
                ModuleCost("layers.1.a", 10, 20, 0, 1e15),
                ModuleCost("(optimizer)", 0, 0, 500, 0.0),
            ],
            operations=[OperationCost("fusion.7", "fusion", "backward", "layers.0.a", 2000)],
            without={"copy-start": 7},
        ),
        unmodelled=["the host"],
        versions={"libtpu": "0.0.21"},
    )
