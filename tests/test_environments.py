"""`--distributed`: two real processes find each other by what SLURM, Open MPI, GKE and Cloud TPU tell of a job."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

PROGRAM = """
import os
from jax._src.clusters import cloud_tpu_cluster
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from pvm_jax import distributed
# JAX takes a machine for a TPU's if libtpu is installed and finds chips, and else asks no metadata server.
cloud_tpu_cluster.running_in_cloud_tpu_vm = "ON_A_TPU" in os.environ
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]
with distributed.join(detect=True, start_limit=60) as cluster:
    devices = CUDA_VISIBLE_DEVICES.value
    print(cluster.exchange("names", f"process {cluster.index} of {cluster.count}, devices {devices}"))
"""
# JAX derives the coordinator's port from the job's number: 61440 + number modulo 4096.
FIRST_PORT, PORTS = 61440, 4096


def slurm(job: int, process: int, hosts: int) -> dict[str, str]:
    """Of two processes on one host or on two."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": str(hosts),
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process if hosts == 1 else 0),
    }


def open_mpi(job: int, process: int, hosts: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process if hosts == 1 else 0),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(2 // hosts),
    }


@contextlib.contextmanager
def metadata_of_cloud_tpu() -> Iterator[str]:
    """The address of a server that answers as Cloud TPU's metadata server does, under /I for host I of two."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host, attribute = self.path.split("/")[1], self.path.rpartition("/")[2]
            answers = {
                "agent-worker-number": host,
                "worker-network-endpoints": "unknown:0:127.0.0.1,unknown:1:127.0.0.1",
                "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '0'\n",
            }
            self.send_response(200 if attribute in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(attribute, "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def gke_slices(process: int) -> dict[str, str]:
    """Two slices of one host each."""
    return {
        "ON_A_TPU": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(process),
    }


def free_job() -> int:
    """A job number whose port nobody listens on."""
    for job in range(os.getpid() % PORTS, 2 * PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", FIRST_PORT + job % PORTS))
            except OSError:
                continue
            return job
    raise AssertionError("no free port")


def join_two(*environments: dict[str, str], devices: tuple[str, str] = ("all", "all")) -> None:
    """Runs PROGRAM once in each environment; each must see both, and that many of its host's GPUs."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == str([f"process {i} of 2, devices {devices[i]}" for i in range(2)])


@pytest.mark.parametrize("describe", [slurm, open_mpi])
@pytest.mark.parametrize(("hosts", "devices"), [(1, ("0", "1")), (2, ("all", "all"))])
def test_launchers_variables_are_enough(describe, hosts, devices):
    """Two processes on one host take a GPU each, one that is alone takes all."""
    job = free_job()
    join_two(describe(job, 0, hosts), describe(job, 1, hosts), devices=devices)


def test_gke_with_two_slices():
    join_two(gke_slices(0), gke_slices(1))


def test_cloud_tpu_by_its_metadata_server():
    with metadata_of_cloud_tpu() as address:
        join_two(*({"ON_A_TPU": "1", "GCE_METADATA_IP": f"{address}/{i}", "NO_PROXY": "*"} for i in range(2)))
