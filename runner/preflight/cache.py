"""Verdicts that were reached before, by everything that decides them.

The key is the program itself, not the configuration that it was made of: two
configurations that give one program share a verdict. A file that cannot be read is no entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

from runner.preflight.tpu_compiler import Port, Topology
from runner.record.files import write_atomic
from runner.record.preflight import PreflightReport, report_from_json

#: Raised when the report says something else of the same program.
_FORMAT = 6
#: Variables that carry flags to the compiler.
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")


def cache_folder() -> pathlib.Path:
    """Where verdicts are kept: `XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "tpu-batch-runner" / "preflight"


@dataclasses.dataclass(frozen=True)
class Question:
    """Everything that a verdict depends on.

    Attributes:
        hlo: The traced program.
        names: What its operations and their source lines are called.
        ports: Its arguments and results, with shardings.
        hardware: The slice's name, which the report speaks of: a chip of v5e-1 is one of v5e-8's.
        topology: What it is compiled for.
        versions: Of compiler and tracer.
    """

    hlo: bytes
    names: str
    ports: tuple[Port, ...]
    hardware: str
    topology: Topology
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """SHA-256 of all of it, and of the flags in the environment."""
        rest = {
            "format": _FORMAT,
            "ports": [dataclasses.astuple(port) for port in self.ports],
            "hardware": self.hardware,
            "topology": [self.topology.name, dict(self.topology.options)],
            "versions": dict(self.versions),
            "flags": {name: os.environ.get(name, "") for name in _FLAGS},
        }
        digest = hashlib.sha256(self.hlo)
        digest.update(self.names.encode())
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()


class VerdictCache:
    """A folder of reports.

    Args:
        folder: Where they are; it is made when the first is kept.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def find(self, key: str) -> PreflightReport | None:
        """The report on the question with this key, if it was asked before."""
        try:
            plain = json.loads(self._path(key).read_text())
            return dataclasses.replace(report_from_json(plain), cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, question: Question, report: PreflightReport) -> None:
        """Remember a report. A cache that cannot be written is no reason to fail."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(question.key), json.dumps(report.to_json()))
        except OSError:
            return

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / f"{key}.json"
