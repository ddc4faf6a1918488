"""What makes two configurations the same job, or jobs of the same graph.

Both are hashes of a configuration with some keys left out. They say nothing of code: a job
whose source has changed is still the same job.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.codec import config_to_json
from runner.config.schema import Config, Mode

#: Keys and sections that say how a job is run and not what it computes.
_OPERATION = (
    "batch",
    "checkpoint",
    "data.prefetch",
    "data.workers",
    "hardware",
    "job.about",
    "log_every",
    "parallel",
    "profile",
    "ray",
    "retries",
    "sinks",
    "timeouts",
)
#: Those that the compiled step depends on all the same: `profile` puts names into it.
_IN_GRAPH = ("hardware", "parallel", "profile")
#: Further keys that the compiled step takes as inputs, or never sees.
_NO_GRAPH = (
    "eval_every",
    "init_from",
    "optim.lr",
    "resume",
    "schedule",
    "seed",
    "steps",
    "strict",
)


def job_hash(config: Config) -> str:
    """SHA-256 of all that changes what a job computes; a verdict is about hardware, too."""
    judged = ("hardware", "parallel") if config.mode is Mode.preflight else ()
    return _hash(config, left_out=tuple(key for key in _OPERATION if key not in judged))


def graph_key(config: Config) -> str:
    """Equal for jobs whose step is the same graph, as far as the configuration can tell.

    Jobs that share a key share a process and its compiles. A key that is too coarse costs a
    compile, one that is too fine loses one: neither changes a number.
    """
    left_out = tuple(key for key in _OPERATION if key not in _IN_GRAPH)
    return _hash(config, left_out=(*left_out, *_NO_GRAPH))


def is_operational(key: str) -> bool:
    """Whether a dotted key says how a job is run and not what it computes."""
    return _within(key, _OPERATION) or _within(key, ("dry_run", "hydra"))


def _hash(config: Config, *, left_out: tuple[str, ...]) -> str:
    flat = dict(_flat(config_to_json(config), ""))
    kept = {key: value for key, value in flat.items() if not _within(key, left_out)}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1024)  # the jobs of a sweep have the same keys
def _within(key: str, sections: tuple[str, ...]) -> bool:
    if key in sections:
        return True
    parts = key.replace("/", ".").split(".")
    return any(".".join(parts[:count]) in sections for count in range(1, len(parts)))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
