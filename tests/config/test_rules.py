"""Rules on values: each broken one is told with key, rule, reason and value."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
from omegaconf import DictConfig, OmegaConf

from runner.config.mistakes import Mistake
from runner.config.reference import reference_of
from runner.config.schema import Config
from runner.config.validate import validate
from tests.config.user_conf import composer, write_conf

CONF = pathlib.Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    config = composer(write_conf(tmp_path_factory.mktemp("conf"))).config(["job=mine"])
    return OmegaConf.create(dataclasses.asdict(config))


def _validated(base: DictConfig, values: list[str], *trusted: str) -> Config:
    cfg = OmegaConf.merge(base, OmegaConf.from_dotlist(values))
    assert isinstance(cfg, DictConfig)
    return validate(cfg, reference=reference_of(base), trusted=frozenset({"jobs", *trusted}))


BROKEN = [
    (["steps=0"], "steps must be >= 1; got 0"),
    (["seed=-1"], "seed must be >= 0; got -1"),
    (["seed=9223372036854775808"], "seed must be below"),
    (["log_every=0"], "log_every must be >= 1"),
    (["eval_every=-1"], "eval_every must be >= 0"),
    (["grad_clip_norm=0"], "grad_clip_norm must be a finite number above 0"),
    (["job.batch_size=0"], "job.batch_size must be >= 1"),
    (["data.workers=0"], "data.workers must be >= 1"),
    (["accumulate_steps=3"], "got 3 and 8; the nearest batch sizes are 6 and 9"),
    (["accumulate_steps=9"], "the nearest batch sizes are 9"),
    (["remat=layer"], "remat must be one of none, layers; got .layer. .did you mean .layers."),
    (["scan_layers=true"], "scan_layers must be false without remat=layers: .*remat='none'"),
    (["remat=layers", "backend.name=lazy"], "remat must be none with backend=lazy: .*'layers'"),
    (["optim.lr=0"], "optim.lr must be a finite number above 0; got 0.0"),
    (["optim.lr=.nan"], "optim.lr must be a finite number above 0; got nan"),
    (["optim.lr=.inf"], "optim.lr must be a finite number above 0; got inf"),
    (["optim.name=adamw"], "optim.name must be one of .*did you mean 'AdamW'"),
    (["optim.name=LBFGS"], "optim.name must not be LBFGS: .*closure"),
    (["optim.name=SparseAdam"], "optim.name must not be SparseAdam: .*sparse"),
    (["optim.name=SGD"], "optim.options.betas is not an option of torch.optim.SGD"),
    (["optim.options.beta=1"], r"\(did you mean 'betas'\?\)"),
    (["optim.options.fused=true"], "optim.options.fused must go"),
    (["optim.options.lr=1"], "optim.options.lr must go: .*optim.lr"),
    (["optim.options.amsgrad=3"], "optim.options.amsgrad must be true or false"),
    (["schedule.warmup_fraction=1"], r"schedule.warmup_fraction must be in \[0, 1\)"),
    (["schedule.final_fraction=2"], r"schedule.final_fraction must be in \[0, 1\]"),
    (["schedule.name=constant"], "schedule.final_fraction must be 1"),
    (["schedule.name=cosin"], "schedule.name must be one of .*'cosine'"),
    (["backend.name=openxl"], "backend.name must be one of .*'openxla'"),
    (["backend.name=openxla_eval"], "no backward pass.*mode=evaluate"),
    (["backend.steps_per_call=0"], "backend.steps_per_call must be >= 1"),
    (
        ["backend.name=lazy", "backend.passes.attention=false"],
        "backend.passes.attention must be true, its default, with backend=lazy",
    ),
    (
        ["backend.name=lazy", "backend.passes.flash_attention=true"],
        "backend.passes.flash_attention must be false, its default, with backend=lazy",
    ),
    (
        ["hardware.name=cpu", "backend.passes.flash_attention=true"],
        "backend.passes.flash_attention must be false with hardware=cpu.* on TPUs only",
    ),
    (
        ["hardware.name=v5e-8", "parallel.name=data", "backend.passes.flash_attention=true"],
        "backend.passes.flash_attention must be false with parallel=data.*parallel=single",
    ),
    (
        ["mode=preflight", "hardware.name=v5e-8", "parallel.name=fsdp", "job.batch_size=12"],
        "job.batch_size must be a multiple of 8.* got 12; the nearest are 8 and 16",
    ),
    (
        ["mode=preflight", "hardware.name=cpu", "parallel.name=data"],
        "hardware.name must be a TPU slice with mode=preflight",
    ),
    (
        [
            "backend.name=openxla_step",
            "backend.steps_per_call=2",
            "parallel.name=data",
            "hardware.devices=2",
            "steps=4",
        ],
        "backend.steps_per_call must be 1 with parallel=data",
    ),
    (
        ["backend.name=lazy", "backend.steps_per_call=2"],
        "backend.steps_per_call must be 1 with backend=lazy",
    ),
    (
        ["backend.name=openxla_step", "backend.steps_per_call=10", "steps=105"],
        "must divide steps: .*got 10 and 105; the nearest steps are 100 and 110",
    ),
    (
        ["backend.name=openxla_step", "backend.steps_per_call=10", "eval_every=4", "steps=100"],
        "must divide eval_every: .*the nearest eval_every are 10",
    ),
    (
        ["profile.steps=[5]"],
        r"profile.steps must be \[first, last\], two updates from 2 .*to steps=40",
    ),
    (["profile.steps=[1,3]", "steps=9"], "profile.steps must be .*two updates from 2 "),
    (["profile.steps=[5,4]", "steps=9"], "profile.steps must be "),
    (["profile.steps=[5,10]", "steps=9"], "to steps=9; got"),
    (["profile.steps=[2,true]", "steps=9"], "profile.steps must be "),
    (["profile.steps=[2,3]", "steps=9", "mode=evaluate"], "profile.steps must be null with mode="),
    (["profile.steps=[2,3]", "steps=9", "backend.name=eager"], "with backend=eager: the trace is"),
    (["backend.name=eager", "hardware.name=tpu"], "hardware.name must be auto or cpu"),
    (["hardware.name=gpu"], "hardware.name must be one of auto, cpu, tpu, v4-8.*got 'gpu'"),
    (["hardware.devices=0"], "hardware.devices must be >= 1"),
    (["hardware.peak_flops_per_s=-1"], "hardware.peak_flops_per_s must be"),
    (["job.name=../x"], "job.name must be 1 to 100"),
    (["job.name=/x"], "job.name must be 1 to 100"),
    (["job.name=.x"], "job.name must be 1 to 100"),
    (["job.name=''"], "job.name must be 1 to 100"),
    (["job.name='a b'"], "job.name must be 1 to 100"),
    ([f"job.name={'x' * 101}"], "job.name must be 1 to 100"),
    (["job.entry='jobs.resnet'"], "job.entry must look like package.module:Name"),
    (["job.entry='jobs.x:a.b'"], "job.entry must look like package.module:Name"),
    (["job.entry='os:system'"], "package 'os', which is not trusted.*RUNNER_TRUST=os"),
    (["data.entry='shutil:rmtree'"], "data.entry names code in the package 'shutil'"),
    (["job.entry='jobsx.a:B'"], "package 'jobsx', which is not trusted"),
]


@pytest.mark.parametrize(("values", "said"), BROKEN, ids=[" ".join(lines) for lines, _ in BROKEN])
def test_a_broken_rule_is_told(base: DictConfig, values: list[str], said: str) -> None:
    with pytest.raises(Mistake, match=said) as caught:
        _validated(base, values)
    assert caught.value.key in str(caught.value)


KEPT = [
    ["backend.name=openxla_eval", "mode=evaluate"],
    ["mode=evaluate", "steps=1"],
    ["schedule.name=constant", "schedule.final_fraction=1.0"],
    ["accumulate_steps=8"],
    ["schedule.warmup_fraction=0.9"],
    ["job.name=a.b-C_1"],
    ["grad_clip_norm=1", "hardware.devices=1"],
]


@pytest.mark.parametrize("values", KEPT, ids=" ".join)
def test_what_keeps_the_rules_passes(base: DictConfig, values: list[str]) -> None:
    _validated(base, values)


def test_every_optimizer_file_is_valid(base: DictConfig) -> None:
    files = sorted((CONF / "optim").glob("*.yaml"))
    assert len(files) >= 10
    for file in files:
        cfg = base.copy()
        cfg.optim = OmegaConf.load(file)
        config = validate(cfg, reference=reference_of(cfg), trusted=frozenset({"jobs"}))
        assert config.optim.name.lower() == file.stem


def test_a_package_is_trusted_by_name(base: DictConfig) -> None:
    trusted = _validated(base, ["job.entry='mylib.a:B'"], "mylib")
    assert trusted.job.entry == "mylib.a:B"
    with pytest.raises(Mistake, match="RUNNER_TRUST=mylib,other"):
        _validated(base, ["job.entry='other.a:B'"], "mylib")
