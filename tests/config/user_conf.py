"""A folder of configuration such as a user writes, for `--config-dir`."""

from __future__ import annotations

import pathlib

from runner.cli.app import conf_folder
from runner.config.compose import Composer

JOB = """\
# @package _global_
defaults:
  - override /data: mine
  - override /optim: adam
job: {name: mine, entry: "jobs.mlp:Mlp", about: A job of the tests, batch_size: 8}
model: {depth: 18, width: 1.5, flag: true, sizes: [1, 2], open: null, norm: {kind: batch}}
steps: 40
optim: {lr: 0.05}
schedule: {warmup_fraction: 0.1}
"""
DATA = """\
name: mine
entry: jobs.images:digits
options: {image_size: 28}
"""


def write_conf(folder: pathlib.Path, *, job: str = JOB, data: str = DATA) -> pathlib.Path:
    """A new configuration folder with one job and one data source, both `mine`."""
    for group, text in (("job", job), ("data", data)):
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / "mine.yaml").write_text(text)
    return folder


def composer(folder: pathlib.Path, *, trusted: tuple[str, ...] = ("jobs",)) -> Composer:
    """A composer over the runner's own configuration and `folder`."""
    return Composer(conf_folder(), extra=folder, trusted=frozenset(trusted))
