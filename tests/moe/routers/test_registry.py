"""What every router in the registry has to pass.

A router is run inside an MoE layer, with all that it may look at, by one compiled program that
gives the decisions in training and in evaluation, the outputs and every gradient; the tests call
it with other values. What a router needs is read from its options. What it does not promise stands
in the tables below, each with the reason.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routed
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from routed import CHANGED, EXPERTS, LENGTH, QUICK, ROWS, VALID, WIDTH, Case, changed_tokens

from moejax.config import ConfigError
from moejax.moe.exchange import BATCH_AXES
from moejax.moe.layer import MoELayer
from moejax.moe.routers import REGISTRY, RouterInputs
from moejax.moe.routers.base import TokenRows
from moejax.parallel import MeshConfig, make_mesh
from moejax.parallel.mesh import RULES

MEASURING = {"force_balanced", "trace"}
NO_PAPER = {
    **dict.fromkeys(MEASURING, "measures speed"),
    "top_k": "composed of those of the others",
    "random": "everybody's baseline",
    "quantile": "described without a paper",
    "llama4": "published as code",
}
SIGNED_GATES = {"mixture_of_depths": "the depth's weight is a factor of its own, as in the paper"}
FIXED_EXPERTS = {
    "hash": "the id names the experts",
    "random": "drawn by index",
    "dselect_k": "codes belong to an index",
    **dict.fromkeys(MEASURING, "loads belong to an index"),
}
# Statistics that are measured in the experts' outputs, which are of the compute type.
OF_EXPERTS = {"loss_coupling", "output_sum"}


@pytest.fixture(scope="module", params=REGISTRY)
def case(request, recorded, unoptimised):
    name = request.param
    settings = {"path": recorded} if name == "trace" else {}
    config = routed.layer_config(REGISTRY[name].Options(**settings))
    inputs, run = routed.make_inputs(config.router), routed.program(config)
    params = {"params": tiny.draw(routed.shapes(config, inputs))["params"]}
    *eager, state = routed.route(config, params, inputs, begin=True)
    variables = first = {**params, **state}
    if state:
        router = MoELayer.make_router(config, parent=None)
        stats = run(first, inputs)["train"][1].stats
        moved = router.update(first["router_state"]["router"], stats)
        variables = {**first, "router_state": {"router": moved}}
    out = run(variables, inputs)
    return Case(name, config, first, variables, inputs, jax.device_get(eager), run, out)


def decisions(case):
    return {mode: case.out[mode][1] for mode in ("train", "evaluation")}.items()


def of_tokens(routing) -> bool:
    """Whether a decision has a row for each token."""
    return isinstance(routing.rows, TokenRows)


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_shapes_and_types(case):
    for mode, routing in decisions(case):
        expert, gate = routing.expert, routing.gate
        assert expert.shape == gate.shape and expert.dtype == np.int32, mode
        assert gate.dtype == routing.aux_loss.dtype == np.float32 and routing.aux_loss.shape == ()
        assert routing.stats["load"].shape == routing.stats["gate_mass"].shape == (EXPERTS,)
        assert all(values.dtype == np.float32 for values in routing.stats.values())
        assert routing.logits.shape == (ROWS, LENGTH, case.options.num_choices(EXPERTS))
        if of_tokens(routing):
            assert len(expert) == ROWS * LENGTH
        if routing.bypass is not None:
            assert routing.bypass.shape == (ROWS, LENGTH, WIDTH)


def test_gates_are_finite_and_not_negative_and_a_rows_experts_differ(case):
    for _, routing in decisions(case):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routing))
        assert np.all(routing.gate >= 0) or case.name in SIGNED_GATES
        assert routing.expert.min() >= 0 and routing.expert.max() <= EXPERTS
        assert np.all(routing.gate[routing.expert == EXPERTS] == 0)
        for row in routing.expert:
            chosen = row[row < EXPERTS]
            assert len(set(chosen)) == len(chosen)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(case.out))


def test_statistics_are_the_counts(case):
    for mode, routing in decisions(case):
        stats = routing.stats
        load = np.bincount(routing.expert.reshape(-1), minlength=EXPERTS + 1)[:EXPERTS]
        np.testing.assert_array_equal(stats["load"], load)
        np.testing.assert_allclose(stats["gate_mass"].sum(), routing.gate.sum(), rtol=1e-4)
        assert stats["tokens"] == VALID.sum() and stats["assignments"] == load.sum() > 0
        if of_tokens(routing):
            reached = np.any(routing.expert < EXPERTS, axis=1).reshape(VALID.shape)
            assert stats["unrouted"] == (VALID & ~reached).sum(), mode


def test_padding_is_neither_routed_nor_counted_and_gets_no_gradient(case):
    for mode, routing in decisions(case):
        assert not np.any(case.out[mode][0].y[~VALID]), mode
        if of_tokens(routing):
            assert np.all(routing.expert[~VALID.reshape(-1)] == EXPERTS)
    assert not np.any(case.out["gradients"][1][~VALID])
    changed = changed_tokens(case, ~VALID)
    for mode, _ in decisions(case):
        for got, wanted in zip(changed[mode], case.out[mode], strict=True):
            assert_equal((got.aux_loss, got.stats), (wanted.aux_loss, wanted.stats))
        assert_equal(changed[mode][0].y, case.out[mode][0].y)
    assert_equal(changed["gradients"], case.out["gradients"])


def test_evaluation_is_deterministic_and_noise_is_drawn_from_the_stream(case):
    again, other = case.run(case.variables, case.inputs), case.run(case.variables, case.inputs, 1)
    assert_equal(again, case.out)
    assert_equal(other["evaluation"], case.out["evaluation"])


def test_gradient_reaches_the_router(case):
    router = case.out["gradients"][0].get("router", {})
    for path, leaf in jax.tree.leaves_with_path(router):
        name = jax.tree_util.keystr(path, simple=True)
        assert np.any(leaf), name
    # Every token that an expert computes gets a gradient.
    routing = case.out["train"][1]
    if of_tokens(routing):
        reached = np.any(routing.expert < EXPERTS, axis=1).reshape(VALID.shape)
        assert np.all(np.any(case.out["gradients"][1][reached], axis=-1))


def test_parameters_are_those_counted_in_training_and_in_evaluation(case):
    in_training, in_use = (
        routed.shapes(case.config, case.inputs.replace(train=train)) for train in (True, False)
    )
    assert in_training == in_use
    router = case.first["params"].get("router", {})
    counts = case.options.counts(WIDTH, EXPERTS, case.config.top_k)
    assert counts.params == sum(leaf.size for leaf in jax.tree.leaves(router))
    assert counts.flops_per_token >= 0 and 0 < counts.expected_experts <= EXPERTS
    if not counts.measured:
        assert counts.expected_experts == case.config.top_k
        routing = case.out["evaluation"][1]
        assert routing.stats["assignments"] == VALID.sum() * case.config.top_k


def test_parameters_name_their_axes_for_the_mesh(case):
    params = routed.shapes(case.config, case.inputs)["params"].get("router", {})
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_box):
        name = jax.tree_util.keystr(path, simple=True)
        assert is_box(leaf), f"{name} lacks nn.with_logical_partitioning"
        assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= {None, *RULES}, name


def test_one_expert_a_token_with_renormalised_gates_is_refused(case):
    fields = {field.name for field in dataclasses.fields(case.options)}
    if "normalize_gates" not in fields:
        return
    learned = {"learned_gate": True} if "learned_gate" in fields else {}
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(case.options, normalize_gates=True, **learned).check(EXPERTS, 1)
    assert error.value.field == "router.normalize_gates" or not routed.fits(case.options, 1)


def outputs_before(out, mode):
    """Outputs of the first row's tokens before ``CHANGED``, and of all other rows."""
    y = out[mode][0].y
    return y[0, :CHANGED], y[1:]


def test_later_tokens_change_nothing_before_them(case):
    later = np.zeros(VALID.shape, bool)
    later[0, CHANGED:] = True
    changed = changed_tokens(case, later)
    for mode, routing in decisions(case):
        leaks = case.options.leaks and (mode == "train" or case.options.leaks_in_evaluation)
        if leaks:
            continue
        assert_equal(outputs_before(changed, mode), outputs_before(case.out, mode))
        if of_tokens(routing):
            before = ~later.reshape(-1)
            got = changed[mode][1]
            assert_equal(got.expert[before], routing.expert[before])
            assert_equal(got.gate[before], routing.gate[before])


def test_a_router_that_is_said_to_leak_does(case):
    if not case.options.leaks:
        return
    found = {"train": False, "evaluation": False}
    for seed in range(8):
        later = np.zeros(VALID.shape, bool)
        later[0, CHANGED:] = True
        changed = changed_tokens(case, later, seed)
        for mode in found:
            before = [out[mode][0].y[0, :CHANGED] for out in (changed, case.out)]
            found[mode] |= tiny.relative_error(*before) > 1e-4
    assert found == {"train": True, "evaluation": case.options.leaks_in_evaluation}


def test_compiled_equals_eager(case):
    layer, routing = case.run(case.first, case.inputs)["evaluation"]
    eager, wanted = case.eager
    np.testing.assert_array_equal(routing.expert, wanted.expert)
    tiny.assert_trees_close(
        (layer.y, layer.aux_loss, routing.gate, routing.stats),
        (eager.y, eager.aux_loss, wanted.gate, wanted.stats), 1e-5,
    )  # fmt: skip


def test_eight_devices_give_what_one_gives(case):
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    put = lambda tree, at: jax.device_put(tree, NamedSharding(mesh, at))
    rows = jax.tree.map(lambda leaf: put(leaf, P(BATCH_AXES) if leaf.ndim else P()), case.inputs)
    variables = put(case.variables, P())
    params = {**variables["params"], "experts": put(variables["params"]["experts"], P("expert"))}

    run = functools.partial(routed.route, case.config)
    with jax.set_mesh(mesh):
        layer, routing = jax.jit(run, compiler_options=QUICK)(
            {**variables, "params": params}, rows.replace(train=True), jax.random.key(0)
        )
    wanted_layer, wanted = case.out["train"]
    np.testing.assert_array_equal(routing.expert, wanted.expert)
    tiny.assert_trees_close(
        (layer.y, layer.aux_loss, routing.gate, routing.stats),
        (wanted_layer.y, wanted.aux_loss, wanted.gate, wanted.stats), 1e-5,
    )  # fmt: skip


# Experts change places within the halves, so that those of a group stay together.
ORDER = np.array([2, 0, 3, 1, 5, 7, 4, 6])


def in_order(tree, choices):
    """Values whose axes of experts, or of all choices, are in the new order."""
    whole = np.concatenate([ORDER, np.arange(EXPERTS, choices)])

    def leaf(values):
        for axis, size in enumerate(values.shape):
            if size in (EXPERTS, choices):
                values = jnp.take(values, whole[:size], axis=axis)
        return values

    return jax.tree.map(leaf, tree)


def test_experts_that_change_places_change_nothing_else(case):
    if case.name in FIXED_EXPERTS:
        return
    choices, inputs = case.options.num_choices(EXPERTS), case.inputs
    params = case.variables["params"]
    variables = {
        **in_order({k: v for k, v in case.variables.items() if k != "params"}, choices),
        "params": {
            **params, "router": in_order(params.get("router", {}), choices),
            "experts": jax.tree.map(lambda leaf: leaf[ORDER], params["experts"]),
        },
    }  # fmt: skip
    if inputs.previous_logits is not None:
        rows = inputs.previous_logits.reshape(-1, choices)
        rows = in_order({"rows": rows}, choices)["rows"].reshape(inputs.previous_logits.shape)
        inputs = inputs.replace(previous_logits=rows)
    layer, routing = case.run(variables, inputs)["evaluation"]
    wanted_layer, wanted = case.out["evaluation"]
    tiny.assert_trees_close(
        (layer.y, layer.aux_loss, routing.stats["load"], routing.stats["gate_mass"]),
        (
            wanted_layer.y, wanted_layer.aux_loss, wanted.stats["load"][ORDER],
            wanted.stats["gate_mass"][ORDER],
        ), 1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dispatch", ["dense_loop", "blocks", "capacity"])
def test_every_dispatcher_gives_the_same(case, dispatch):
    layer, routing = case.out["train"]
    routing = dataclasses.replace(routing, stats={}, logits=None)
    variables = {"params": {"experts": case.variables["params"]["experts"]}}
    inputs = RouterInputs(case.inputs.x, case.inputs.valid)
    y, dropped = routed.dispatched(dispatch, case.config.gate_rank, variables, inputs, routing)
    assert float(dropped) == 0
    assert tiny.relative_error(y, layer.y) < 1e-5


def test_it_decides_in_float32_whatever_the_compute_type(case):
    got, wanted = case.out["bfloat16"], case.out["evaluation"][1]
    np.testing.assert_array_equal(got.expert, wanted.expert)
    kept = lambda stats: {name: v for name, v in stats.items() if name not in OF_EXPERTS}
    tiny.assert_trees_close((got.gate, kept(got.stats)), (wanted.gate, kept(wanted.stats)), 1e-5)
    assert got.gate.dtype == np.float32


def test_state_of_stacked_layers_is_updated_layer_by_layer(case):
    state = case.first.get("router_state", {}).get("router")
    if state is None:
        return
    router = MoELayer.make_router(case.config, parent=None)
    other = changed_tokens(case, VALID)
    stats = [jax.tree.map(jnp.asarray, out["train"][1].stats) for out in (case.out, other)]
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])
    layers = [state, case.variables["router_state"]["router"]]
    got = router.update(jax.tree.map(stack, *layers), jax.tree.map(stack, *stats))
    each = [router.update(*pair) for pair in zip(layers, stats, strict=True)]
    tiny.assert_trees_close(got, jax.tree.map(stack, *each), 1e-6)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert jax.tree.all(jax.tree.map(same, each[0], state))


@pytest.mark.parametrize("name", REGISTRY)
def test_it_is_described(name):
    kind = REGISTRY[name]
    assert kind.Options().name == name
    own = vars(kind)
    assert "card" in own and "Options" in own, "inherited from another router"
    assert kind.card.rule and kind.card.use
    assert not set("|\n") & set("".join(dataclasses.astuple(kind.card)))
    parents = [parent for parent in kind.__mro__ if parent in REGISTRY.values()]
    told = " ".join(parent.__doc__ for parent in parents)
    assert name in NO_PAPER or (
        kind.card.paper and re.search(r"arXiv \d{4}\.\d{4,5}|https?://", told)
    )


def test_exceptions_are_of_routers_that_there_are():
    for table in (NO_PAPER, SIGNED_GATES, FIXED_EXPERTS):
        assert table.keys() <= REGISTRY.keys()
