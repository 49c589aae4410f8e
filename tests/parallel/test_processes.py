"""Which process of how many this one is: flags, and the variables of clusters."""

import re
import socket
import subprocess
import sys

import pytest

from moejax.config import UserError
from moejax.launch.shares import free_port
from moejax.parallel.processes import Place, detect, place_of

SLURM = {
    "SLURM_JOB_ID": "123", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}  # fmt: skip


def test_flags_name_the_process_and_keep_clusters_out_of_it():
    place = place_of("node-1:12345", 1, 2, SLURM)
    assert (place.index, place.count, place.found) == (1, 2, "flags")
    assert place.arguments == {
        "coordinator_address": "node-1:12345", "num_processes": 2, "process_id": 1,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


@pytest.mark.parametrize("flags", [(None, None, 1), (None, 0, 1), ("h:1", 0, 1)])
def test_one_process_initialises_nothing_even_in_a_cluster(flags):
    assert place_of(*flags, SLURM) == Place()


BAD = {
    "coordinator missing": ((None, 0, 2), "--coordinator missing: give all of --coordinator"),
    "two missing": (("h:1", None, None), "--process-id and --processes missing"),
    "alone, but number 1": ((None, 1, 1), "--coordinator missing"),
    "number beyond": (("h:1", 2, 2), "--process-id = 2: must be from 0 to 1, for --processes = 2"),
    "below zero": (("h:1", -1, 2), "--process-id = -1"),
    "no processes": (("h:1", 0, 0), "--processes = 0: must be above zero"),
    "no port": (("node-1", 0, 2), "--coordinator = 'node-1': must be HOST:PORT"),
    "no such port": (("node-1:70000", 0, 2), "must be HOST:PORT"),
}


@pytest.mark.parametrize("name", BAD)
def test_partial_and_contradictory_flags_are_one_line(name):
    flags, said = BAD[name]
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        place_of(*flags, {})
    assert "\n" not in str(caught.value)


def test_slurm_tasks_of_a_step():
    place = detect(SLURM)
    assert (place.index, place.count, place.found) == (3, 4, "slurm")
    # Two tasks a node, four GPUs in sight: jax gives each the one of its local number.
    assert place.arguments == {
        "num_processes": 4, "process_id": 3, "cluster_detection_method": "slurm",
    }  # fmt: skip


@pytest.mark.parametrize(
    "more", [{"SLURM_STEP_TASKS_PER_NODE": "3,1"}, {"SLURM_GPUS_PER_TASK": "4"}]
)
def test_a_slurm_task_that_shares_no_gpu_sees_all_of_its_own(more):
    assert detect(SLURM | more).arguments["local_device_ids"] == [0, 1, 2, 3]
    named = SLURM | more | {"JAX_LOCAL_DEVICE_IDS": "2"}
    assert "local_device_ids" not in detect(named).arguments


def test_a_shell_inside_salloc_does_not_wait_for_tasks_that_nobody_starts():
    # salloc's shell is a step of one task, which keeps the job's SLURM_NTASKS.
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Place()
    # A batch script without srun has no step's variables.
    batch = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP_")}
    assert detect(batch) == Place()


def test_open_mpi_by_its_ranks():
    ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    place = detect(ranks | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"})
    assert (place.index, place.count) == (1, 2)
    assert place.arguments["cluster_detection_method"] == "ompi"
    assert detect({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) == Place()


def test_open_mpi_5_without_mpi4py_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mpi4py, or give --coordinator"):
        detect({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})


def test_a_pod_of_an_indexed_job_without_the_package_says_that_it_is_alone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    place = detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert place.count == 1 and "trains alone" in place.note
    assert detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == Place()  # a notebook, say


def test_numbers_that_are_none_are_named():
    with pytest.raises(UserError, match="SLURM_PROCID = None: must be a number"):
        detect({"SLURM_STEP_NUM_TASKS": "2"})


WAITS = """
import sys
from moejax.parallel import processes
processes.START_SECONDS = 2
processes.start(processes.place_of(sys.argv[1], int(sys.argv[2]), 2, {}))
"""


def test_a_missing_peer_is_one_line_in_time():
    # Process 0 waits for process 1, and process 1 for process 0: neither is ever started.
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, f"127.0.0.1:{free_port()}", str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    for number, process in enumerate(waiting):
        out, said = process.communicate(timeout=60)
        assert process.returncode == 1 and out == ""
        assert said.count("\n") == 1, said
        assert f"process {number} of 2 waited 2 s at 127.0.0.1:" in said
        assert "not all of them came; start all 2" in said


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", TAKEN, where], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"--coordinator = '{where}': process 0 cannot listen at port")
    assert "choose another port" in done.stdout


TAKEN = """
import os, sys
from moejax.config import UserError
from moejax.parallel import processes
try:
    processes.start(processes.place_of(sys.argv[1], 0, 2, {}))
except UserError as error:
    print(error, flush=True)
    os._exit(0)
"""
