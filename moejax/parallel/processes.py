"""Starting as one of several processes: by flags, or under SLURM, Open MPI or Kubernetes.

``start`` has to be called before anything asks jax for its devices. jax.distributed finds the
coordinator of a cluster by itself; what is decided here is whether there are several processes at
all, since a process that waits for peers which nobody starts would wait for nothing.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moejax.config import UserError
from moejax.parallel.host_threads import enough_threads

# All processes have to be there after so long: a peer that never starts is told within a minute.
START_SECONDS = 50
# A peer that is silent for so long is taken for dead, and jax ends the others.
HEARTBEAT_SECONDS = 30
# How long a process that is done waits for the others to be done.
SHUTDOWN_SECONDS = 300
# How long one that failed waits for the others to fail likewise, before it leaves alone.
LEAVE_SECONDS = 5.0
FLAGS = "--coordinator, --process-id and --processes"


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in a job.

    Attributes:
      index: its number, from 0.
      count: processes of the job; 1 where nothing is to be initialised.
      found: what told: ``flags``, ``slurm``, ``ompi``, ``mpi4py``, ``kubernetes`` or ``alone``.
      arguments: what ``jax.distributed.initialize`` is given.
      note: a line for the user; empty for none.
    """

    index: int = 0
    count: int = 1
    found: str = "alone"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def place_of(
    coordinator: str | None,
    process_id: int | None,
    processes: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """Where this process stands, by its flags or else by what its cluster says.

    Args:
      coordinator: ``HOST:PORT``, where process 0 listens.
      process_id: this process's number.
      processes: how many there are; 1 alone asks for one process, whatever a cluster says.
      environment: variables of the process.

    Raises:
      UserError: some of the flags without the others, or flags that contradict one another.
    """
    given = [coordinator is not None, process_id is not None, processes is not None]
    if not any(given):
        return detect(environment)
    if processes == 1 and coordinator is None and process_id in (None, 0):
        return Place()
    if not all(given):
        missing = [name for name, there in zip(_NAMES, given, strict=True) if not there]
        raise UserError(f"{' and '.join(missing)} missing: give all of {FLAGS}, or none of them")
    assert coordinator is not None and process_id is not None and processes is not None
    if processes < 1:
        raise UserError(f"--processes = {processes}: must be above zero")
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process-id = {process_id}: must be from 0 to {processes - 1}, for --processes = "
            f"{processes}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator = {coordinator!r}: must be HOST:PORT, node-1:12345 say")
    told = {
        "coordinator_address": coordinator, "num_processes": processes, "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip
    return Place(process_id, processes, "flags", told) if processes > 1 else Place()


_NAMES = ("--coordinator", "--process-id", "--processes")


def detect(environment: Mapping[str, str]) -> Place:
    """A process's place by the variables that SLURM, Open MPI or Kubernetes gave it.

    Raises:
      UserError: a cluster of several processes whose coordinator jax cannot find here.
    """
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return _slurm(environment)
    if environment.get("OMPI_COMM_WORLD_SIZE"):
        return _open_mpi(environment)
    if environment.get("KUBERNETES_SERVICE_HOST") and "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes(environment)
    return Place()


def _slurm(environment: Mapping[str, str]) -> Place:
    """A task of a job step.

    The step's number of tasks counts, not the job's (SLURM_NTASKS, which jax reads): the shell of
    ``salloc --ntasks=8`` is a step of one task, and so is a batch script without ``srun``, which
    has no step's variables at all.
    """
    count, index = (
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        _number(environment, "SLURM_PROCID"),
    )
    if count <= 1:
        return Place()
    told: dict[str, Any] = {
        "num_processes": count, "process_id": index, "cluster_detection_method": "slurm",
    }  # fmt: skip
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return Place(index, count, "slurm", told)
    # jax shows each task the one GPU of its local number. A task that is alone on its node, or has
    # been given GPUs of its own, gets all that it sees.
    own = environment.get("SLURM_GPUS_PER_TASK") or _tasks_on_node(environment) == 1
    if own and (seen := visible_gpus(environment)):
        told["local_device_ids"] = list(range(seen))
    return Place(index, count, "slurm", told)


def _tasks_on_node(environment: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, from ``2(x3),1`` and the node's number; None if unknown."""
    counts: list[int] = []
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def visible_gpus(environment: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this process may use, without waking jax."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip()])
    with contextlib.suppress(OSError):
        return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    return 0


def _open_mpi(environment: Mapping[str, str]) -> Place:
    """A rank of ``mpirun``; Open MPI 5 no longer says where its first rank is."""
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    index = _number(environment, "OMPI_COMM_WORLD_RANK")
    if count <= 1:
        return Place()
    method = "ompi" if environment.get("OMPI_MCA_orte_hnp_uri") else "mpi4py"
    if method == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            "Open MPI 5 and later need mpi4py to find process 0: pip install mpi4py, or give "
            f"{FLAGS} ($OMPI_COMM_WORLD_RANK and $OMPI_COMM_WORLD_SIZE)"
        )
    told = {"num_processes": count, "process_id": index, "cluster_detection_method": method}
    return Place(index, count, method, told)


def _kubernetes(environment: Mapping[str, str]) -> Place:
    """A pod of an indexed Job: how many there are is known to Kubernetes' API alone."""
    index = _number(environment, "JOB_COMPLETION_INDEX")
    if importlib.util.find_spec("kubernetes") is None:
        note = (
            f"pod {index} of an indexed Job trains alone: without the package kubernetes its peers "
            f"are not known; give {FLAGS}, or --processes=1 to say so"
        )
        return Place(found="kubernetes", note=note)
    from kubernetes import client, config  # pyrefly: ignore[missing-import]

    try:
        config.load_incluster_config()
        with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
            namespace = file.read().strip()
        pod = client.CoreV1Api().read_namespaced_pod(socket.gethostname(), namespace)
        name = pod.metadata.labels["job-name"]
        job = client.BatchV1Api().read_namespaced_job(name, namespace)
        count = int(job.spec.parallelism or 1)
    except Exception as error:  # the package raises many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Kubernetes' API does not say how many pods the Job has ({first}); let the service "
            f"account read pods and jobs, or give {FLAGS}"
        ) from error
    told = {"num_processes": count, "process_id": index}
    return Place(index, count, "kubernetes", told) if count > 1 else Place()


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        shown = environment.get(name)
        raise UserError(f"{name} = {shown!r}: must be a number; give {FLAGS} instead") from None


def start(place: Place) -> None:
    """Joins the other processes, where there are any; ends this process where they do not come.

    After it, what libraries print to standard output goes to standard error; Python's own
    ``sys.stdout`` stays what it was.

    Raises:
      UserError: the coordinator's port is taken, or jax does not find what it needs.
    """
    enough_threads()
    if place.count == 1:
        if place.note:
            print(f"warning: {place.note}", file=sys.stderr, flush=True)
        return
    _keep_standard_output()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own handler of SIGTERM would take the signal from the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    where = place.arguments.get("coordinator_address", f"the coordinator ({place.found})")
    told = (
        f"process {place.index} of {place.count} waited {START_SECONDS} s at {where}, and not all "
        f"of them came; start all {place.count}, with the same coordinator"
    )
    if place.found == "flags" and place.index == 0:
        _check_free(place.arguments["coordinator_address"])
    with _deadline(START_SECONDS, told):
        try:
            jax.distributed.initialize(
                **place.arguments,
                initialization_timeout=2 * START_SECONDS,  # the deadline comes first
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (RuntimeError, ValueError, OSError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"process {place.index} of {place.count} cannot join at {where}: {first}"
            ) from error


def _check_free(coordinator: str) -> None:
    """Raises UserError where somebody listens at the coordinator's port already.

    jax would listen beside them, and its processes would wait for an answer from the wrong one; or
    crash in C++.
    """
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket() as wanted:
            wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wanted.bind(("", port))
    except OSError as error:
        raise UserError(
            f"--coordinator = {coordinator!r}: process 0 cannot listen at port {port} "
            f"({error.strerror}); choose another port"
        ) from None


@contextlib.contextmanager
def _deadline(seconds: float, text: str) -> Iterator[None]:
    """Ends this process with a line and status 1 where the block takes longer.

    jax would abort it in C++, with a stack trace.
    """
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            print(f"moejax train: {text}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="start deadline", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _keep_standard_output() -> None:
    """Sends what C++ prints to standard output (Gloo greets its peers there) to standard error."""
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(own, "w", buffering=1, encoding="utf-8", closefd=True)


def leave(status: int, failed: bool) -> int:
    """Ends this process's part in a job; returns the exit status.

    A process that is done waits for the others. One that failed waits a few seconds: where all of
    them failed alike they part in order, and else it ends itself here, so that its peers notice.
    """
    if not jax.distributed.is_initialized():
        return status
    ended = threading.Event()

    def shut_down() -> None:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        ended.set()

    threading.Thread(target=shut_down, name="shutdown", daemon=True).start()
    if not ended.wait(LEAVE_SECONDS if failed else SHUTDOWN_SECONDS):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 1)
    return status
