"""Every job and every data source that ships composes, builds, and takes a step of learning."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from jobs.tokenize import tokenize
from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.record.errors import ConfigError, DataError
from runner.train.build import build, example_batch
from runner.train.input import evaluation_batches
from tests.jobs import folders, test_imagefolder, test_shards, test_table

Write = Callable[[pathlib.Path], object]
SMALL = {
    "resnet": [],
    "mlp": [],
    "vit": ["model.depth=1"],
    "gpt": ["model.depth=1", "data.options.seq_len=16"],
    "llama": ["model.depth=1", "data.options.seq_len=16"],
    "bert": ["model.depth=1", "data.options.seq_len=16"],
    "bert_classifier": ["model.depth=1", "data.options.seq_len=16"],
}


def write_images(root: pathlib.Path) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            for number in range(4):
                path = root / part / name / f"{number}.png"
                test_imagefolder.save_image(path, number, width=40, height=40)


def write_shards(root: pathlib.Path) -> None:
    samples = {str(n): (test_shards.image_bytes(n), n % 2) for n in range(8)}
    for part in ("train", "val"):
        test_shards.write_shard(root / f"{part}.tar", samples)


def write_text(root: pathlib.Path) -> None:
    root.mkdir()
    (root / "a.txt").write_text("the cat sat on the mat. " * 100)


def write_csv(root: pathlib.Path) -> None:
    root.mkdir()
    test_table.write(root / "train.csv", test_table.ROWS)


def write_tokens(root: pathlib.Path) -> None:
    plain, bpe = root.with_name("plain"), root.with_name("bpe")
    write_text(plain)
    folders.write_tokenizer(bpe)
    tokenize([plain], out=root, tokenizer=str(bpe), field="text", heldout=0.2)


#: Job, data and what writes the data: every job with its own data, and each data of the user's.
PAIRS: list[tuple[str, str | None, Write | None]] = [
    ("resnet", None, None),
    ("resnet", "synthetic", None),
    ("mlp", None, None),
    ("vit", None, None),
    ("vit", "imagefolder", write_images),
    ("vit", "shards", write_shards),
    ("gpt", None, None),
    ("gpt", "text", write_text),
    ("gpt", "tokens", write_tokens),
    ("llama", None, None),
    ("llama", "tokens", write_tokens),
    ("bert", None, None),
    ("bert", "tokens", write_tokens),
    ("bert", "text", write_text),
    ("bert_classifier", None, write_csv),
]


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(conf_folder(), extra=None, trusted=frozenset({"jobs"}))


def test_every_file_in_conf_is_in_the_table() -> None:
    def names(group: str) -> set[str]:
        return {path.stem for path in (conf_folder() / group).glob("*.yaml")}

    own = {"digits", "prose", "csv"}  # the data that a job above brings along
    assert {job for job, _, _ in PAIRS} == names("job") == set(SMALL)
    assert {data for _, data, _ in PAIRS if data} | own == names("data")


@pytest.mark.parametrize(("job", "data", "write"), PAIRS)
def test_a_job_takes_a_step_and_is_evaluated(
    job: str, data: str | None, write: Write | None, composer: Composer, tmp_path: pathlib.Path
) -> None:
    overrides = [f"job={job}", "job.batch_size=4", "job.eval_batch_size=4", *SMALL[job]]
    if data is not None:
        overrides.append(f"data={data}")
    if data in ("imagefolder", "shards"):
        overrides.append("data.options.image_size=24")
    if write is not None:
        write(tmp_path / "data")
        overrides.append(f"data.root={tmp_path / 'data'}")
    config = composer.config(overrides)
    built = build(config)
    recipe = built.recipe
    recipe.loss(recipe.model.train(), example_batch(built, config)).backward()
    optimizer = recipe.make_optimizer(recipe.model)
    optimizer.step()
    if built.data.heldout is None:
        assert data == "synthetic"
        return
    batch, _ = next(evaluation_batches(built.data.heldout, 4))
    with torch.no_grad():
        metrics = recipe.evaluate(recipe.model.eval(), batch)
    predicted = metrics.pop("predicted")
    assert len(predicted) == 4
    assert metrics
    assert all(m.shape == (4,) and m.isfinite().all() for m in metrics.values())


@pytest.mark.parametrize("job", ["gpt", "llama", "bert", "bert_classifier", "vit", "mlp"])
def test_data_of_another_kind_is_a_configuration_error(job: str, composer: Composer) -> None:
    other = "prose" if job in ("vit", "mlp") else "digits"
    with pytest.raises(ConfigError, match="data must "):
        build(composer.config([f"job={job}", f"data={other}"]))


@pytest.mark.parametrize("data", ["imagefolder", "shards", "text", "tokens", "csv"])
def test_data_without_a_root_says_how_to_set_it(data: str, composer: Composer) -> None:
    with pytest.raises(DataError, match=rf"data={data} needs .*set data\.root="):
        build(composer.config(["job=gpt", f"data={data}"]))


def test_tokens_count_towards_throughput(composer: Composer) -> None:
    built = build(composer.config(["job=gpt", "model.depth=1", "data.options.seq_len=48"]))
    assert built.job.tokens_per_example() == 48
    assert example_batch(built, composer.config(["job=gpt"]))["tokens"].shape == (16, 48)
    assert np.unique(example_batch(built, composer.config(["job=gpt"]))["tokens"]).size > 5
