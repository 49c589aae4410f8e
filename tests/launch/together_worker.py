"""What each of two processes does for test_together: one program, many questions.

Prints a line of JSON, the answers of this process, to standard error. Its folder is shared.
"""

import hashlib
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import UserError
from moejax.launch.child import end_with_parent
from moejax.parallel import MeshConfig, make_mesh, processes, sharding, together
from moejax.parallel.rows import LocalRows
from moejax.training.checkpoints import Checkpointer, CheckpointError


def fails_on(number: int) -> None:
    """Work that goes wrong on one process only."""
    if together.index() == number:
        raise UserError("no such corpus")


def outcome(work) -> str:
    """What a call came to, in words."""
    try:
        return str(work())
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def digests(state) -> dict[str, str]:
    """SHA-256 of every leaf as a whole."""
    whole = multihost_utils.process_allgather(state, tiled=True)
    leaf = lambda value: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return {name: leaf(value) for name, value in sorted(whole.items())}


def abstract(mesh, like):
    """Shapes of a saved state, cut over a mesh."""
    cut = {"matrix": PartitionSpec(("data", "fsdp"), "tensor"), "step": PartitionSpec()}
    return {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, cut[name])
        )
        for name, value in like.items()
    }


def rows_of(sizes: dict[str, int]) -> dict:
    """Which rows this process reads on a mesh, and whether the global array has them all right."""
    mesh = make_mesh(MeshConfig(**sizes))
    batch = np.arange(32, dtype=np.int32).reshape(8, 4)
    local = LocalRows(sharding(mesh, None, "batch", "length"), 2, 8, 4)
    placed = local.place(batch[local.numbers])
    whole = multihost_utils.process_allgather(placed, tiled=True)
    right = np.array_equal(whole, batch.reshape(2, 4, 4))
    return {"rows": local.numbers.tolist(), "right": right}


def vote(mine: tuple[str, str] | None, others: int) -> list:
    """Asks until all stop: how often, and why; ``mine`` is what one process has against it."""
    votes, asked, found = together.StopVote(), 0, None
    while found is None and asked < 20_000:
        found = votes.ask(mine if asked >= 3 and together.index() == others else None)
        asked += 1
        time.sleep(0.001)
    return [asked, found]


def busy() -> float:
    """Votes and exchanges beside steps in flight, whose reductions are of the same devices."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    where = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x - x.mean(axis=0, keepdims=True) + 1, out_shardings=where)
    x = jax.device_put(np.arange(4096, dtype=np.float32).reshape(2, 2048), where)
    votes = together.StopVote()
    for i in range(200):
        x = step(x)
        votes._vote_at = 0  # vote every time
        votes.ask(None)
        if i % 50 == 0:
            together.exchange({"step": i})
    return float(multihost_utils.process_allgather(x, tiled=True).mean())


def cost() -> dict[str, float]:
    """Milliseconds of a vote that is read a step later, and of an exchange."""
    votes = together.StopVote()
    began = time.perf_counter()
    for _ in range(100):
        votes._vote_at = 0  # vote every time
        votes.ask(None)
    each = (time.perf_counter() - began) * 10
    began = time.perf_counter()
    for _ in range(20):
        together.exchange({"step": 1})
    return {"vote_ms": each, "exchange_ms": (time.perf_counter() - began) * 50}


def main() -> None:
    """Joins the other process and answers."""
    end_with_parent(int(os.environ["MOEJAX_LAUNCHER"]))
    port, number, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
    processes.start(processes.place_of(f"127.0.0.1:{port}", number, 2, {}))
    print("this line is the job's standard output", flush=True)
    told = {
        "exchange": together.exchange({"number": number, "text": "x" * (5000 * number)}) == [
            {"number": 0, "text": ""}, {"number": 1, "text": "x" * 5000}
        ],
        "agreed": outcome(lambda: together.agreed(lambda: number)),
        "first fails": outcome(lambda: together.agreed(lambda: fails_on(0))),
        "second fails": outcome(lambda: together.agreed(lambda: fails_on(1))),
        "differ": outcome(
            lambda: together.agreed(lambda: number, lambda n: {"jax": "0.12", "corpus": n})
        ),
        "decide": together.decide(lambda: number + 10),
        "decide fails": outcome(lambda: together.decide(lambda: fails_on(0))),
        "rows": {
            name: rows_of(sizes)
            for name, sizes in {
                "data 4": {"data": 4}, "tensor 4": {"tensor": 4}, "fsdp 2, tensor 2": {
                    "fsdp": 2, "tensor": 2,
                },
            }.items()
        },
        "signal": vote(("interrupted", "SIGTERM"), 1),
        "budget": vote(("budget", "budget.max_flops is spent"), 0),
        "busy": busy(),
        "cost": cost(),
    }  # fmt: skip
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    like = {"matrix": np.zeros((8, 6), np.float32), "step": np.zeros((), np.int32)}
    with Checkpointer(folder / "one") as checkpoints:
        restored = checkpoints.restore(abstract(mesh, like))
    told["restored"] = [restored.step, restored.extra["n"], digests(restored.state)]
    told["messages"] = restored.messages
    with Checkpointer(folder / "two") as checkpoints:
        checkpoints.save(3, restored.state, {"n": 7}, wait=True)
        told["sealed"] = checkpoints.steps()
        again = checkpoints.restore(abstract(mesh, like))
        told["again"] = digests(again.state)
    # A folder that process 0 cannot make: the save failed on both.
    blocked = folder / "blocked"
    if number == 0:
        blocked.write_text("a file")
    multihost_utils.sync_global_devices("blocked")
    failures: list[str] = []
    with Checkpointer(blocked, on_error=lambda error: failures.append(str(error))) as checkpoints:
        told["blocked"] = [checkpoints.save(1, restored.state, {}), len(failures)]
    told["damaged"] = outcome_of_damage(folder, mesh, like)
    print("TOLD " + json.dumps(told), file=sys.stderr, flush=True)
    sys.exit(processes.leave(0, failed=False))


def outcome_of_damage(folder: pathlib.Path, mesh, like) -> str:
    """A flipped bit in the newest checkpoint: both processes go back to none, with one reason."""
    if together.index() == 0:
        files = [p for p in (folder / "two" / "3" / "state").rglob("*") if p.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    multihost_utils.sync_global_devices("damaged")
    try:
        with Checkpointer(folder / "two") as checkpoints:
            checkpoints.restore(abstract(mesh, like))
    except CheckpointError as error:
        return str(error)
    return "restored"


if __name__ == "__main__":
    main()
