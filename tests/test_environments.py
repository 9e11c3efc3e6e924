"""`--distributed`: two real processes find each other by the variables that SLURM's and Open MPI's launchers set."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
from pvm_jax import distributed
with distributed.join(detect=True, start_limit=60) as cluster:
    print(cluster.exchange("names", f"process {cluster.index} of {cluster.count}"))
"""
# JAX derives the coordinator's port from the job's number: 61440 + number modulo 4096.
FIRST_PORT, PORTS = 61440, 4096


def slurm(job: int, process: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def open_mpi(job: int, process: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
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


@pytest.mark.parametrize("describe", [slurm, open_mpi])
def test_launchers_variables_are_enough(describe):
    job = free_job()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | describe(job, i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == "['process 0 of 2', 'process 1 of 2']"
