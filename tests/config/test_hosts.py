"""Which host of a job a machine is, by what tells it."""

from __future__ import annotations

import dataclasses
import http.server
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.hosts import COORDINATOR, COUNT, INDEX, PORT, Host, this_host
from runner.config.parallel import Mesh
from runner.config.schema import Config, HardwareConfig, Mode, ParallelConfig
from runner.record.errors import ConfigError, DeviceError
from tests.config.test_hardware import tpu_vm
from tests.config.user_conf import composer, write_conf

TOLD = {INDEX: "2", COUNT: "4", COORDINATOR: "10.0.0.1:9000"}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "pod-0.tpu,pod-1.tpu"}
SLICE = {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}


@pytest.fixture
def meshed(tmp_path: pathlib.Path) -> Config:
    """A job over all chips of what it runs on."""
    config = composer(write_conf(tmp_path / "conf")).config(["job=mine"])
    everything = ParallelConfig(name="data"), HardwareConfig("auto")
    return dataclasses.replace(config, parallel=everything[0], hardware=everything[1])


@pytest.fixture
def metadata() -> Iterator[dict[str, Any]]:
    """A metadata server of a TPU VM: its address, and what it was asked."""
    answers = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8,a:b:10.0.0.9,a:b:10.0.0.10",
    }
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            key = self.path.rpartition("/")[2]
            known = self.headers["Metadata-Flavor"] == "Google" and key in answers
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(key, "").encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {
            "variables": {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_address[1]}"},
            "answers": answers,
            "asked": asked,
        }
        server.shutdown()
        thread.join()


def test_our_own_variables_come_first(tmp_path: pathlib.Path, meshed: Config) -> None:
    machine = tpu_vm(tmp_path / "vm", 4)
    host = this_host(meshed, machine=machine, environment={**TOLD, **GKE})
    assert host == Host(2, 4, "10.0.0.1:9000")
    assert not host.first
    assert host.environment() == TOLD
    assert Host.told(host.environment()) == host


def test_gke_tells_by_variables(tmp_path: pathlib.Path, meshed: Config) -> None:
    machine = tpu_vm(tmp_path / "vm", 4)
    assert this_host(meshed, machine=machine, environment=GKE) == Host(1, 2, f"pod-0.tpu:{PORT}")


@pytest.mark.parametrize("number", ["", "one", "2", "-1"])
def test_a_platform_that_makes_no_sense_is_told(
    tmp_path: pathlib.Path, meshed: Config, number: str
) -> None:
    told = {**GKE, "TPU_WORKER_ID": number}
    with pytest.raises(ConfigError, match="TPU_WORKER_ID must be a host's number"):
        this_host(meshed, machine=tpu_vm(tmp_path / "vm", 4), environment=told)


def test_a_tpu_vm_is_told_by_its_metadata_server(
    tmp_path: pathlib.Path, meshed: Config, metadata: dict[str, Any]
) -> None:
    machine = tpu_vm(tmp_path / "vm", 4, **SLICE)
    host = this_host(meshed, machine=machine, environment=metadata["variables"])
    assert host == Host(3, 4, f"10.0.0.7:{PORT}")


def test_a_slice_of_one_host_is_one_host(
    tmp_path: pathlib.Path, meshed: Config, metadata: dict[str, Any]
) -> None:
    metadata["answers"] |= {"agent-worker-number": "0", "worker-network-endpoints": "a:b:10.0.0.7"}
    host = this_host(meshed, machine=tpu_vm(tmp_path, 4), environment=metadata["variables"])
    assert host == Host()
    assert host.first


def test_a_worker_of_a_job_alone_is_told_so_whatever_the_shell_says() -> None:
    assert Host.told({**TOLD, **Host().environment()}) == Host()


def test_a_host_of_a_slice_that_nothing_tells_of_is_no_host_alone(
    tmp_path: pathlib.Path, meshed: Config
) -> None:
    """Its devices would wait for the others' for ever."""
    machine = tpu_vm(tmp_path / "vm", 4, **SLICE)
    with pytest.raises(DeviceError, match="v5e-16 has 4 hosts, and nothing tells which one"):
        this_host(meshed, machine=machine, environment={"TPU_SKIP_MDS_QUERY": "1"})


def test_jobs_of_one_chip_and_preflights_ask_nobody(
    tmp_path: pathlib.Path, meshed: Config, metadata: dict[str, Any]
) -> None:
    machine = tpu_vm(tmp_path / "vm", 4, **SLICE)
    single = dataclasses.replace(meshed, parallel=ParallelConfig())
    preflight = dataclasses.replace(meshed, mode=Mode.preflight)
    one_chip = dataclasses.replace(meshed, hardware=HardwareConfig("auto", devices=1))
    on_cpu = dataclasses.replace(meshed, hardware=HardwareConfig("cpu", devices=4))
    for config in (single, preflight, one_chip, on_cpu):
        found = this_host(config, machine=machine, environment=metadata["variables"])
        assert found == Host(), config
    assert metadata["asked"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {INDEX: "4"},
        {INDEX: "-1"},
        {INDEX: "first"},
        {COORDINATOR: "10.0.0.1"},
        {COORDINATOR: ":9000"},
        {COUNT: None},
        {COORDINATOR: None},
    ],
)
def test_variables_that_make_no_sense_are_told(changes: dict[str, str | None]) -> None:
    told = {name: value for name, value in {**TOLD, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match="must be set together"):
        Host.told(told)


@given(
    axes=st.sampled_from(
        [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}]
    ),
    owners=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_hosts_read_every_part_of_a_batch_between_them(
    axes: dict[str, int], owners: list[int]
) -> None:
    """Whatever device belongs to whom: each host has just the parts that its devices take."""
    mesh = Mesh(axes)
    by_device = [device // axes.get("tensor", 1) for device in range(8)]
    read = set()
    for host in set(owners):
        own = [device for device in range(8) if owners[device] == host]
        parts = mesh.batch_parts_on(own)
        assert set(parts) == {by_device[device] for device in own}
        assert list(parts) == sorted(set(parts))
        read |= set(parts)
    assert read == set(range(mesh.batch_parts))
