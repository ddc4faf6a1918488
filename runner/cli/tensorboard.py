"""The command that starts TensorBoard on what there is."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys

from runner.batch.ledger import FILE_NAME
from runner.cli.catalog import PLACES, find, run_folders
from runner.record.errors import ConfigError, ExitCode

#: Seconds that TensorBoard may take to end before it is killed.
_GRACE_S = 10.0
#: More points than a tag has.
_ALL = 10**9


def add_tensorboard(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tensorboard`."""
    parser.add_argument("folder", nargs="?", help="default: the newest run or batch")
    parser.add_argument(
        "--port", type=_port, help="default: 6006, or the first free one after it; 0 takes any"
    )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535; got {port}")
    return port


def tensorboard(asked: argparse.Namespace) -> int:
    """Serve a folder on this machine alone until Ctrl-C.

    Raises:
        ConfigError: There are no runs.
    """
    folder = pathlib.Path(asked.folder) if asked.folder else _newest()
    if next(run_folders(folder), None) is None:
        raise ConfigError(f"tensorboard needs a folder with runs in it; got {str(folder)!r}")
    port = [] if asked.port is None else [f"--port={asked.port}"]
    print(f"{folder}; Ctrl-C ends it", flush=True)
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", *port]
    # A shell has what it starts in the background ignore the first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # All points of a tag, not 1,000 of them; 0, which means all to its data server, shows none.
    served = subprocess.Popen(
        [*command, "--host=localhost", f"--samples_per_plugin=scalars={_ALL}"]
    )
    try:
        return served.wait()
    except KeyboardInterrupt:
        return _end(served)


def _end(served: subprocess.Popen[bytes]) -> int:
    """A terminal sends Ctrl-C to TensorBoard too; others end this process alone."""
    served.send_signal(signal.SIGTERM)
    try:
        served.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        served.kill()
        served.wait()
    return ExitCode.DONE


def _newest() -> pathlib.Path:
    found = [one.path for place in PLACES for one in find(pathlib.Path(place))]
    if not found:
        raise ConfigError(f"tensorboard found no runs in {' or '.join(PLACES)}: give a folder")
    return max(found, key=_changed)


def _changed(path: pathlib.Path) -> float:
    """When a run or a batch last went forward: a finished file changes its folder's time."""
    times = [path, path / FILE_NAME]
    return max(os.stat(one).st_mtime for one in times if one.exists())
