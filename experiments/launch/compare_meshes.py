"""Loss curves over meshes of virtual CPU devices, against one device: a table, or JSON.

    python experiments/launch/compare_meshes.py [--meshes=all|mixed|"[{'data': 2}]"] [--json]

Every axis alone on 2, 4 and 8 devices and mixed meshes, 20 steps, 64 experts, 8 a token, float32;
see ``moejax.training.compare_meshes``. Exit status 1 where a mesh disagrees.
"""

import argparse
import ast
import dataclasses
import json
import os
import sys

DEVICES = 8


def main(arguments: list[str]) -> int:
    """Compares the meshes that the flags name; 0 where all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", default="all", help="all, alone, mixed, or a list of dicts")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()

    import jax

    from moejax.parallel import MeshConfig
    from moejax.training import compare_meshes as lib

    named = {"all": lib.ALONE + lib.MIXED, "alone": lib.ALONE, "mixed": lib.MIXED}
    if options.meshes in named:
        meshes = named[options.meshes]
    else:
        meshes = [MeshConfig(**sizes) for sizes in ast.literal_eval(options.meshes)]
    reference, rows = lib.Runner(MeshConfig()), []
    for mesh in meshes:
        rows += lib.compare([mesh], reference)
        print(line(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "jax": jax.__version__, "steps": lib.STEPS, "tolerance": lib.TOLERANCE, "meshes": rows,
        "agree": sum(row["agrees"] for row in rows), "of": len(rows),
        "config": dataclasses.asdict(lib.run_config(1e-3, MeshConfig()).train),
    }  # fmt: skip
    print(json.dumps(result) if options.json else "\n".join(table(rows)))
    return 0 if result["agree"] == result["of"] else 1


def line(row: dict) -> str:
    """A mesh on one line of a table in Markdown."""
    apart = row["apart_high"] or "none"
    return (
        f"| {row['mesh']} | {row['devices']} | {row['learned']:.1e} | {row['replayed']:.1e} | "
        f"{row['learned_high']:.1e} | {apart} |"
    )


def table(rows: list[dict]) -> list[str]:
    """All meshes, as a table in Markdown."""
    head = (
        "| mesh | devices | lr 1e-3 | lr 3e-3, routing replayed | lr 3e-3, routing its own | "
        "first token routed apart there |"
    )
    return [head, "|---|---|---|---|---|---|", *map(line, rows)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
