"""Verdicts recalled without tracing, by the files that the tracing has read.

A verdict belongs to a program (`runner.preflight.cache`), and to know which program a configuration
becomes it must be traced. Like ccache's direct mode, this remembers what it became together with
every file that was read on the way: sources, data, a model's own settings. While the configuration,
the environment, the installed packages and all of these are as they were, it is believed. Not seen
are files that C++ code opens (weights, mostly, which no program depends on) and files that were
looked for and were not there; `preflight.cache=false` asks anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import stat
import sys
import sysconfig
import threading
from collections.abc import Iterator
from typing import Any

from runner.config.codec import config_to_json
from runner.config.schema import Config
from runner.preflight.cache import VerdictCache, cache_folder
from runner.record.files import write_atomic
from runner.record.preflight import PreflightReport

#: Variables that differ from shell to shell and that no program depends on.
_VOLATILE = ("COLUMNS", "LINES", "OLDPWD", "SHLVL", "_")
#: Of this process as it was started: torch and the TPU's library add variables of their own.
_BEGUN_WITH = (
    sys.version,
    list(sys.path),
    {name: value for name, value in os.environ.items() if name not in _VOLATILE},
)
#: Made by torch in a temporary folder of every process.
_GENERATED = "_remote_module_non_scriptable"
#: Packages whose files are looked at wherever they are installed.
_OWN = ("jobs", "runner")
#: What running leaves in the folder that it was started in.
_LEFT_BEHIND = ("__pycache__", "multirun", "outputs")
_NO_FILES = ("/dev/", "/proc/", "/sys/")


@dataclasses.dataclass(frozen=True)
class Recall:
    """What a configuration became when it was traced last.

    Attributes:
        config: The configuration.
        folder: Where it is remembered, beside the verdicts.
    """

    config: Config
    folder: pathlib.Path = dataclasses.field(default_factory=cache_folder)

    def find(self) -> PreflightReport | None:
        """The verdict, if nothing that it depends on has changed."""
        try:
            held = json.loads(self._path().read_text())
            if all(_stamp(path) == stamp for path, stamp in held["files"].items()):
                return VerdictCache(self.folder).find(held["verdict"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None

    def keep(self, verdict: str, read: set[str]) -> None:
        """Remember the verdict's key and the files that were read to find it."""
        files = {path: _stamp(path) for path in sorted(read | _sources())}
        with contextlib.suppress(OSError):
            write_atomic(self._path(), json.dumps({"verdict": verdict, "files": files}))

    def _path(self) -> pathlib.Path:
        found = [config_to_json(self.config), os.getcwd(), _installed(), *_BEGUN_WITH]
        text = json.dumps(found, sort_keys=True)
        return self.folder / f"recall-{hashlib.sha256(text.encode()).hexdigest()}.json"


def recalled(config: Config) -> PreflightReport | None:
    """The verdict that is all a preflight is asked for, if it is remembered."""
    asked = config.preflight
    if not asked.cache or asked.dump or asked.find is not None:
        return None
    report = Recall(config).find()
    return report if report is not None and report.fits else None


class _Watch:
    """The audit hook of this process: Python has no way to take one off."""

    def __init__(self) -> None:
        self._installed = False
        self._read: set[str] | None = None

    def start(self) -> set[str]:
        """Files and folders that are opened for reading from now on."""
        if not self._installed:
            self._installed = True
            sys.addaudithook(self._hear)
        read: set[str] = set()
        self._read = read
        return read

    def stop(self) -> None:
        """No more."""
        self._read = None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        read = self._read
        if read is None or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        name = os.path.abspath(os.fsdecode(path))
        if not writes and not name.startswith(_NO_FILES) and not _is_packaged(name):
            read.add(name)


_WATCH = _Watch()
_LOCK = threading.Lock()


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """The files that this process opens for reading meanwhile."""
    with _LOCK:
        read = _WATCH.start()
        try:
            yield read
        finally:
            _WATCH.stop()


def _folders(*names: str) -> tuple[str, ...]:
    found = (sysconfig.get_path(name) for name in names)
    return tuple(f"{os.path.realpath(path)}{os.sep}" for path in found if path)


_PACKAGED = _folders("stdlib", "platstdlib", "purelib", "platlib")


def _is_packaged(name: str) -> bool:
    """Whether a file is Python's or an installed package's, which its version tells of."""
    return "__pycache__" in name or os.path.realpath(name).startswith(_PACKAGED)


def _installed() -> list[str]:
    """Installed packages with their versions, as their folders are called."""
    names = (name for path in _folders("purelib", "platlib") for name in os.listdir(path))
    return sorted({name for name in names if name.endswith(".dist-info")})


def _sources() -> set[str]:
    """Sources of the modules that are loaded: an import may have read their bytecode alone."""
    modules = list(sys.modules.items())  # a lazy module that is asked may load others
    loaded = {name: getattr(module, "__file__", None) for name, module in modules}
    return {
        os.path.abspath(file)
        for name, file in loaded.items()
        if file is not None
        and (name.partition(".")[0] in _OWN or not _is_packaged(file))
        and name != _GENERATED
        and os.path.isfile(file)  # torch has modules that claim to be of files
    }


def _stamp(path: str) -> list[int | str] | None:
    """When a file was changed, and its size; of a folder the names in it. None: it is not there."""
    try:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return [found.st_mtime_ns, found.st_size]
        names = sorted(name for name in os.listdir(path) if name not in _LEFT_BEHIND)
    except OSError:
        return None
    return [hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()]
