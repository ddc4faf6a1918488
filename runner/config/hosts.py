"""The hosts of one job: which of them this machine is, and where it finds the others.

A slice of several hosts runs one job by the same command on each. Who they are is told by
variables of ours, by those of the platform (GKE sets them), or by the metadata server of a TPU VM.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from runner.config.chips import SLICES
from runner.config.hardware import Machine
from runner.config.schema import Config, Mode
from runner.record.errors import ConfigError, DeviceError

#: Set by whoever starts the hosts, if nothing else tells; a worker is told by them, too.
INDEX, COUNT, COORDINATOR = "RUNNER_HOST_INDEX", "RUNNER_HOST_COUNT", "RUNNER_COORDINATOR"
#: Where the first host listens for the others, unless `COORDINATOR` says otherwise.
PORT = 8476
#: Source: torch_xla 2.9.0, `_internal/tpu.py`.
_WORKER, _NAMES, _NO_METADATA = "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"
_METADATA_HOST = "GCE_METADATA_HOST"
_METADATA_TIMEOUT_S = 3.0


@dataclasses.dataclass(frozen=True)
class Host:
    """One of a job's hosts.

    Attributes:
        index: Which one, from 0; the first writes the run folder.
        count: How many there are.
        coordinator: Address and port at which the first listens; "" for a host alone.
    """

    index: int = 0
    count: int = 1
    coordinator: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what there is one of."""
        return self.index == 0

    def environment(self) -> dict[str, str]:
        """Variables by which a worker knows it, whatever those of this process say."""
        return {INDEX: str(self.index), COUNT: str(self.count), COORDINATOR: self.coordinator}

    @staticmethod
    def told(environment: Mapping[str, str] = os.environ) -> Host | None:
        """What our own variables say, or None where they say nothing.

        Raises:
            ConfigError: They contradict each other.
        """
        given = {
            name: environment[name] for name in (INDEX, COUNT, COORDINATOR) if name in environment
        }
        if not given:
            return None
        address, _, port = given.get(COORDINATOR, "").rpartition(":")
        try:
            host = Host(int(given[INDEX]), int(given[COUNT]), given.get(COORDINATOR, ""))
            sound = host == Host() or bool(address and port.isdigit())
        except (KeyError, ValueError):
            host, sound = Host(), False
        if not sound or not 0 <= host.index < host.count:
            raise ConfigError(
                f"{INDEX}, {COUNT} and {COORDINATOR} must be set together: a host's number from 0, "
                f"the number of hosts, and HOST:PORT of the first; got {given}"
            )
        return host


def this_host(
    config: Config,
    *,
    machine: Machine | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Host:
    """Which host of the job this machine is; alone unless the job's mesh may span several.

    Args:
        config: The job.
        machine: This machine's chips; looked for if None.
        environment: Variables of this process.

    Raises:
        ConfigError: The variables that tell make no sense.
        DeviceError: A slice of several hosts was asked for, and nothing tells which one this is.
    """
    if config.parallel.name == "single" or config.mode is Mode.preflight:
        return Host()
    machine = machine or Machine.look()
    whole = config.hardware.name != "cpu" and config.hardware.devices in (None, machine.chips)
    host = Host.told(environment)
    if host is None and machine.chips and whole:
        host = _platform(environment)
    named = SLICES.get(config.hardware.name) or SLICES.get(machine.slice)
    if host is None and named and named.hosts > 1 and 0 < machine.chips < named.chips and whole:
        raise DeviceError(
            f"{named.name} has {named.hosts} hosts, and nothing tells which one this is: looked "
            f"at {INDEX}, {_WORKER} with {_NAMES}, and the metadata server"
        )
    return host or Host()


def _platform(environment: Mapping[str, str]) -> Host | None:
    """What the platform says of a TPU VM's place in its slice, or None."""
    names = environment.get(_NAMES, "").split(",")
    number = environment.get(_WORKER)
    if number is None and not environment.get(_NO_METADATA):
        endpoints = _metadata("worker-network-endpoints", environment) or ""
        # "name:uid:address" of each, in order.
        names = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
        number = _metadata("agent-worker-number", environment)
    if number is None or len(names) == 1:
        return None
    if not number.isdigit() or int(number) >= len(names):
        raise ConfigError(
            f"{_WORKER} must be a host's number from 0, one for each of {_NAMES}; got {number!r} "
            f"for {len(names)} hosts. {INDEX}, {COUNT} and {COORDINATOR} say it instead"
        )
    return Host(int(number), len(names), f"{names[0]}:{PORT}")


def _metadata(key: str, environment: Mapping[str, str]) -> str | None:
    server = environment.get(_METADATA_HOST, "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT_S) as answer:
            text: str = answer.read().decode().strip()
    except (OSError, urllib.error.URLError):
        return None
    return text
