"""A configuration is composed in a fixed order, and every mistake is told with key and rule."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from runner.config.compose import Composer
from runner.config.schema import Config, Mode, Precision
from runner.config.typed import known_keys
from runner.record.errors import ConfigError
from tests.config.user_conf import DATA, JOB, composer, write_conf


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    return composer(write_conf(tmp_path_factory.mktemp("conf")))


def test_the_command_line_beats_the_job_which_beats_its_groups(mine: Composer) -> None:
    plain = mine.config(["job=mine"])
    assert (plain.optim.name, plain.optim.lr, plain.steps) == ("Adam", 0.05, 40)
    assert (plain.data.name, plain.schedule.name, plain.seed) == ("mine", "cosine", 0)
    assert plain.job.eval_batch_size == 100
    changed = mine.config(["job=mine", "optim=sgd", "optim.lr=1", "backend=eager", "seed=7"])
    assert (changed.optim.name, changed.optim.lr, changed.seed) == ("SGD", 1.0, 7)
    assert changed.backend.name == "eager"


def test_values_have_the_types_of_the_schema(mine: Composer) -> None:
    config = mine.config(["job=mine", "mode=evaluate", "precision=bf16", "optim.lr=1"])
    assert config.mode is Mode.evaluate
    assert config.precision is Precision.bf16
    assert isinstance(config.optim.lr, float)
    assert config.model["norm"] == {"kind": "batch"}


def test_every_key_can_be_set_without_a_plus(mine: Composer) -> None:
    config = mine.config(["job=mine"])
    lines = ["job=mine"]
    for key in known_keys(Config):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, (bool, int, float, str, type(None))):
            value = getattr(value, "value", value)
            lines.append(f"{key}={'null' if value is None else json.dumps(value)}")
    assert len(lines) > 25
    assert mine.config(lines) == config


MISTAKES = [
    ("stepz=4", ["no key 'stepz'", "'steps'"]),
    ("+job.stepz=4", ["no key 'job.stepz'", "job.batch_size"]),
    ("++job.batchsize=4", ["no key 'job.batchsize'", "'job.batch_size'"]),
    ("lr=0.1", ["no key 'lr'", "'optim.lr'"]),
    ("train.steps=4", ["no key 'train.steps'", "did you mean 'steps'"]),
    ("batch_size=4", ["'job.batch_size'"]),
    ("bakend=lazy", ["no key 'bakend'", "'backend'"]),
    ("model.dpeth=50", ["no key 'model.dpeth'", "'model.depth'"]),
    ("+model.dpeth=50", ["no key 'model.dpeth'", "'model.depth'"]),
    ("model.depth=abc", ["model.depth must be a whole number", "'abc'", "model.depth=abc"]),
    ("model.depth=18.0", ["model.depth must be a whole number"]),
    ("model.flag=1", ["model.flag must be true or false"]),
    ("model.sizes=3", ["model.sizes must be a list"]),
    ("model.sizes=[1,x]", ["model.sizes[1] must be a whole number"]),
    ("model.norm.kind=3", ["model.norm.kind must be text"]),
    ("+model.norm.kid=a", ["no key 'model.norm.kid'", "'model.norm.kind'"]),
    ("~model.depth", ["model.depth must be given"]),
    ("model=3", ["model must be a section"]),
    ("data.options.image_size=big", ["data.options.image_size must be a whole number"]),
    ("+data.options.imagesize=3", ["'data.options.image_size'"]),
    ("steps=true", ["steps must be a whole number", "True"]),
    ("steps='4'", ["steps must be a whole number", "the text '4'"]),
    ("optim.lr=abc", ["optim.lr must be a number", "'abc'"]),
    ("strict=1", ["strict must be true or false"]),
    ("job.about=3", ["job.about must be text"]),
    ("optim={lr:abc}", ["optim.lr must be a number"]),
    ("~optim.lr", ["optim.lr must be given"]),
    ("mode=trian", ["mode must be one of train, evaluate", "'train'"]),
    ("precision=fp16", ["precision must be one of float32, bf16"]),
    ("optim=adm", ["no 'adm' in the group 'optim'", "'adam'", "sgd"]),
    ("job=mien", ["no 'mien' in the group 'job'", "'mine'"]),
    ("data=mien", ["no 'mien' in the group 'data'", "'mine'"]),
    ("optim/foo=bar", ["optim/foo=bar"]),
    ("model.depth=[", ["model.depth=[: cannot be read as key=value"]),
    ("steps", ["steps: cannot be read as key=value"]),
    ("seed=0,1", ["seed=0,1: several values", "add -m"]),
    ("optim=sgd,adam", ["several values", "add -m"]),
    ("data.root=${oc.env:NO_SUCH_VARIABLE_HERE}", ["data.root", "NO_SUCH_VARIABLE_HERE"]),
    ("data.root=${nope}", ["data.root", "nope"]),
    ("+model.x._target_=os.system", ["_target_", "job.entry"]),
    ("+model={x:{_target_:os.system}}", ["model.x._target_ must go"]),
    ("+hydra.callbacks.x._target_=os.getcwd", ["hydra.callbacks.x._target_", "plugin"]),
    ("hydra.launcher._target_=os.system", ["hydra.launcher._target_", "'os.system'"]),
    ("+hydra.job.env_set.LD_PRELOAD=x", ["hydra.job.env_set must be empty", "LD_PRELOAD"]),
    ("+hydra.job_logging.handlers.x.class=os.x", ["hydra.job_logging.handlers.x.class"]),
]


@pytest.mark.parametrize(("override", "said"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_told(
    mine: Composer, override: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        mine.config(["job=mine", override])
    for part in said:
        assert part in str(caught.value)


def test_a_missing_job_lists_the_jobs(mine: Composer) -> None:
    with pytest.raises(ConfigError, match=r"job must be given, as job=NAME.*mine"):
        mine.config(["seed=1"])


FILES = [
    (JOB + "stepz: 4\n", DATA, ["stepz is not a key", "'steps'", "job/mine.yaml"]),
    (JOB.replace("lr: 0.05", "lr: fast"), DATA, ["optim.lr must be a number", "job/mine.yaml"]),
    (JOB.replace("batch_size", "batchsize"), DATA, ["'job.batch_size'", "job/mine.yaml"]),
    (JOB, DATA + "foo: 1\n", ["data.foo is not a key", "data/mine.yaml"]),
    (JOB.replace("optim: adam", "optim: adagrod"), DATA, ["'adagrod'", "'adagrad'"]),
    (JOB + "model: {", DATA, ["YAML", "mine.yaml", "line"]),
    (JOB.replace("steps: 40", "steps: 40\nx: {_target_: a.b}"), DATA, ["x._target_ must go"]),
    (JOB + "hydra: {job: {env_set: {A: b}}}\n", DATA, ["hydra.job.env_set"]),
    ("- a\n- b\n", DATA, ["job/mine"]),
]


@pytest.mark.parametrize(("job", "data", "said"), FILES)
def test_a_mistake_in_a_file_names_the_file(
    tmp_path: pathlib.Path, job: str, data: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        composer(write_conf(tmp_path, job=job, data=data)).config(["job=mine"])
    for part in said:
        assert part in str(caught.value)


def test_a_key_that_the_file_leaves_open_takes_anything(mine: Composer) -> None:
    assert mine.config(["job=mine", "model.open=[1,a]"]).model["open"] == [1, "a"]
    assert mine.config(["job=mine", "model.width=2"]).model["width"] == 2


def test_a_required_value_of_a_free_section_comes_from_the_command_line(
    tmp_path: pathlib.Path,
) -> None:
    job = JOB.replace("depth: 18", 'depth: "???"')
    made = composer(write_conf(tmp_path, job=job))
    with pytest.raises(ConfigError, match=r"model\.depth"):
        made.config(["job=mine"])
    assert made.config(["job=mine", "model.depth=3"]).model["depth"] == 3


def test_an_optimizer_option_that_no_file_lists_can_be_added(mine: Composer) -> None:
    config = mine.config(["job=mine", "+optim.options.amsgrad=true"])
    assert config.optim.options["amsgrad"] is True
    with pytest.raises(ConfigError, match=r"\+optim\.options\.amsgrad=true"):
        mine.config(["job=mine", "optim.options.amsgrad=true"])
