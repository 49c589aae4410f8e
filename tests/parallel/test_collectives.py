"""Collectives read off a program's text, and warnings of axes that waste."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.parallel import AXES, MeshConfig, make_mesh
from moejax.parallel.axis_warnings import (
    Facts,
    Parameter,
    axis_warnings,
    gathered_parameter,
)
from moejax.parallel.collectives import Collective, collectives_of, collectives_on, summed

SIZES = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


def axes(groups):
    line = f"  %x = f32[8,4]{{1,0}} all-gather(%y), channel_id=1, {groups}, dimensions={{0}}"
    found = collectives_of(f"ENTRY %main (p: f32[4,4]) -> f32[8,4] {{\n{line}\n}}", SIZES)
    return found[0].axes if found else None


# Devices 0 to 7 are (data, fsdp, tensor) = 000, 001, 010, ... 111.
@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("replica_groups={{0,1,4,5},{2,3,6,7}}", ("data", "tensor")),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=8] {'a'}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'context'=1,'tensor'=2] {'data','tensor'}",
         ("data", "tensor")),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'context'=1,'tensor'=2] {'context'}", None),
        # A part of an axis: the last two of eight, after a factor of four.
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        # Devices in an order of their own.
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(1,0,2)) {'a'}", ("fsdp",)),
    ],
)  # fmt: skip
def test_groups_are_axes_of_the_mesh(groups, wanted):
    assert axes(groups) == wanted


def test_pairs_are_axes_of_the_mesh():
    of = lambda pairs: collectives_of(
        "ENTRY %m () -> f32[2] {\n  %p = f32[2]{0} collective-permute(%x), channel_id=3, "
        f"source_target_pairs={{{pairs}}}, metadata={{}}\n}}", SIZES,
    )  # fmt: skip
    assert of("{0,4},{1,5},{4,0},{5,1}")[0].axes == ("data",)
    assert of("{0,1},{1,0}")[0].axes == ("tensor",)
    assert of("{0,0},{1,1}") == []


PROGRAM = """HloModule jit_step

%inner (a: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%add
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = f32[4]{0} call(%x), to_apply=%inner
  %g = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %d = bf16[8]{0} all-gather-done(%g)
}

%open_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"61"}}
  %v = (s32[], f32[4]) while(%t), condition=%cond, body=%open_body
  %two = (f32[3]{0}, s32[5]{0}) all-to-all(%a, %b), replica_groups=[4,2]<=[2,4]T(1,0)
  %q = f32[4]{0} conditional(%i, %x, %y), branch_computations={%inner, %inner}
}
"""


def test_loops_count_as_often_as_they_run():
    found = {(one.kind, one.open_loop): one for one in collectives_of(PROGRAM, SIZES)}
    reduced = found["all-reduce", False]
    # 61 passes, and both branches of the conditional.
    assert (reduced.count, reduced.bytes) == (63, 63 * 16)
    gathered = found["all-gather", False]
    assert (gathered.count, gathered.bytes, gathered.shape) == (61, 61 * 16, (8,))
    # Of the larger side: what goes into a reduce-scatter; of a loop of unknown length one pass.
    scattered = found["reduce-scatter", True]
    assert (scattered.count, scattered.bytes, scattered.axes) == (1, 4 * 8, ("fsdp", "tensor"))
    several = found["all-to-all", False]
    assert (several.bytes, several.axes) == (12 + 20, ("data",))
    rows = summed(collectives_of(PROGRAM, SIZES))
    assert [row["bytes"] for row in rows] == sorted((r["bytes"] for r in rows), reverse=True)
    assert [row for row in rows if row.get("open_loop")] == [
        {"kind": "reduce-scatter", "axes": ["fsdp", "tensor"], "count": 1, "bytes": 32.0,
         "open_loop": True}
    ]  # fmt: skip


@functools.cache
def summing(size_of, which):
    mesh = make_mesh(MeshConfig(**dict(size_of)))
    run = jax.shard_map(
        lambda x: jax.lax.all_gather(x, which, tiled=True), mesh=mesh, in_specs=P(which),
        out_specs=P(None), check_vma=False,
    )  # fmt: skip
    arg = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P(which)))
    return collectives_on(jax.jit(run).lower(arg).compile().as_text(), mesh)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.permutations(AXES), st.integers(1, 2))
def test_what_a_program_of_this_jax_says(order, number):
    # Three axes of two devices; gathers over one or two of them.
    sizes = {name: 2 for name in order[:3]}
    which = tuple(name for name in AXES if name in order[:number])
    found = summing(tuple(sorted(sizes.items())), which)
    assert [one.kind for one in found] == ["all-gather"]
    assert found[0].axes == which and found[0].bytes == 64 * 4 and found[0].count == 1


# Two experts' matrices (a stack of three layers), attention's, and a norm on the mesh of 8.
MESH = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}
EXPERTS = Parameter(
    "segment_0/layer_0/moe/experts/gate_up", (3, 8, 64, 2, 32), 4,
    ((), ("expert",), ("fsdp",), (), ("tensor",)),
)  # fmt: skip
QUERY = Parameter(
    "segment_0/layer_0/attention/query", (3, 64, 4, 16), 4, ((), ("fsdp",), ("tensor",), ())
)


def facts(mesh=None, parameters=(EXPERTS, QUERY), **changes):
    base = dict(
        mesh=mesh or MESH, parameters=parameters, state_bytes=3.0, tokens=1024, local_tokens=128,
        d_model_parts=64, experts=True,
    )  # fmt: skip
    return Facts(**{**base, **changes})


def gather(axes, shape, count=3, kind="all-gather"):
    return Collective(kind, axes, shape, count, 4.0 * np.prod(shape) * count)


def test_an_expert_axis_that_replicates():
    found = [gather(("fsdp",), (64, 4, 16)), gather(("expert",), (8, 64, 2, 32), 60)]
    assert gathered_parameter(found[0], facts()) == QUERY
    assert gathered_parameter(found[1], facts()) == EXPERTS
    (line,) = axis_warnings(found, facts())
    assert "gathered over mesh.expert = 4: 60 times and 7.86 MB a step" in line
    assert "moe.exchange='auto'" in line
    # A gather over an axis that cuts no parameter is of something else, and a small one no matter.
    assert gathered_parameter(gather(("data", "expert"), (8, 64, 2, 32)), facts()) is None
    assert axis_warnings([gather(("expert",), (8, 64, 2, 32), 6)], facts()) == []
    # Where tokens travel, only fsdp gathers them: each device its own two experts.
    assert axis_warnings([gather(("fsdp",), (2, 64, 2, 32))], facts()) == []


def test_copies_that_could_be_cut():
    mesh = {**MESH, "data": 4, "expert": 1}
    large = Parameter("head", (4096, 2**15), 4, (("fsdp",), ("tensor",)))
    told = facts(mesh, (large,), d_model_parts=4096, local_tokens=128)
    # 4096 · 2^15 values of 12 bytes, half of them on each device.
    (line,) = axis_warnings([gather(("data",), (2048, 2**15), 1, "all-reduce")], told)
    assert "mesh.data = 4 copies holds 805 MB" in line
    assert "mesh.fsdp=8 and mesh.data=1 would hold 201 MB" in line
    assert axis_warnings([], told) == []  # nothing says that these are copies
    small = facts(mesh, (QUERY,))
    assert axis_warnings([gather(("data",), (32, 4, 16), 1, "all-reduce")], small) == []


def test_an_expert_axis_without_experts():
    (line,) = axis_warnings([], facts(parameters=(QUERY,), experts=False))
    assert "mesh.expert = 4 cuts nothing" in line and "mesh.fsdp" in line


def test_tokens_brought_to_every_device():
    where = "jit(step)/segment_0/layer_0/moe/router/top_k"
    everyone = gather(("fsdp", "expert"), (1024, 64), 40)
    (line,) = axis_warnings([dataclasses.replace(everyone, where=where)], facts())
    told = "every token are gathered over fsdp and expert (router/top_k): 10.5 MB a step"
    assert told in line
    # Fewer bytes, or a small share of them all, or less than a number a token, need no word.
    assert axis_warnings([gather(("fsdp", "expert"), (1024, 8), 40)], facts()) == []
    rest = gather(("tensor",), (1024, 1024), 1000, "all-reduce")
    assert axis_warnings([everyone, rest], facts()) == []
    assert axis_warnings([gather(("fsdp", "expert"), (512,), 9999)], facts()) == []
    # Keys and values over context are attention's own.
    cut = facts({**MESH, "expert": 1, "context": 4})
    assert axis_warnings([gather(("context",), (4, 256, 2, 64), 400)], cut) == []


def test_a_batch_that_is_on_every_device():
    (line,) = axis_warnings([], facts(local_tokens=1024))
    assert "every token is computed 8 times" in line
