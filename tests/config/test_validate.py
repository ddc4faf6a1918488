"""What is derived from a whole configuration: its hash, and a text without secrets."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from omegaconf import OmegaConf

from runner.config.trust import trusted_packages
from runner.config.validate import config_hash, shown_yaml
from tests.config.user_conf import composer, write_conf


def test_the_hash_depends_on_values_and_not_on_how_they_were_written(
    tmp_path: pathlib.Path,
) -> None:
    made = composer(write_conf(tmp_path))
    plain = config_hash(made.config(["job=mine"]))
    assert plain == config_hash(made.config(["seed=0", "job=mine", "optim.lr=5e-2"]))
    assert plain != config_hash(made.config(["job=mine", "seed=1"]))
    assert plain != config_hash(made.config(["job=mine", "model.depth=19"]))
    assert len(plain) == 64


def test_the_shown_text_resolves_everything_but_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    cfg = OmegaConf.create(
        {
            "plain": "${other}",
            "other": 3,
            "none": None,
            "direct": "${oc.env:A_SECRET}",
            "within": "token-${oc.env:A_SECRET}",
            "default": "${oc.env:NO_SUCH_VARIABLE,x}",
            "copied": "${direct}",
            "decoded": "${oc.decode:${oc.env:A_SECRET}}",
            "section": {"items": ["${within}", "${other}", "${section.items.0}"]},
            "whole": "${section}",
            "values": "${oc.dict.values:section}",
        }
    )
    text = shown_yaml(cfg)
    assert "hunter2" not in text
    shown = yaml.safe_load(text)
    assert shown["plain"] == 3
    assert shown["none"] is None
    assert shown["direct"] == "${oc.env:A_SECRET}"
    assert shown["copied"] == "${direct}"
    assert shown["section"]["items"][:2] == ["${within}", 3]
    assert shown["whole"]["items"][1] == 3
    assert cfg.direct == "hunter2", "the resolver is as it was"


def test_trust_comes_from_the_environment() -> None:
    assert trusted_packages({}) == {"jobs"}
    assert trusted_packages({"RUNNER_TRUST": "a, b,"}) == {"jobs", "a", "b"}
