"""Multi-token prediction against Transformers' modules in PyTorch: hidden states and gradients.

Needs the extra ``parity``, in a version that has them; the recorded reasons are the only skips.
"""

import jax
import jax.numpy as jnp
import pytest
import tiny

from moejax.models import Transformer

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
layers = pytest.importorskip("transformers.modeling_layers", reason=WHY)
if not hasattr(layers, "MtpModel"):
    pytest.skip("this version of transformers has no MtpModel", allow_module_level=True)

from test_parity import OURS, SHARED, copy, parameters, to_numpy  # noqa: E402

DEPTH, LENGTH = 2, 9


@pytest.fixture(scope="module")
def llama():
    """A dense model of two layers and two MTP modules; PyTorch's embedding and head are shared."""
    config = transformers.LlamaConfig(**SHARED, intermediate_size=24, num_mtp_layers=DEPTH)
    main = parameters(transformers.LlamaForCausalLM(config), 0)
    return main, parameters_of_modules(layers.MtpModel(main, DEPTH))


def parameters_of_modules(modules):
    for k, layer in enumerate(modules.layers):
        parameters(layer, 1 + k)
    return modules


def forward(main, modules, text):
    """The main model's logits and those of each module, on the text itself."""
    tokens = text[:, :LENGTH]
    hidden = main.model(tokens, use_cache=False).last_hidden_state
    found = [main.lm_head(hidden)]
    for k in range(DEPTH):
        positions = torch.arange(LENGTH)[None] + k + 1
        following = text[:, k + 1 : k + 1 + LENGTH]
        hidden = modules.forward_layer(k, hidden, positions, None, input_ids=following)
        found.append(main.lm_head(hidden))
    return found


def tree(main, modules, value):
    """Our parameter tree, of ``value(parameter)``: values or gradients."""
    state = {name: value(p) for name, p in main.named_parameters()}
    params = copy(state, "dense")
    for k, layer in enumerate(modules.layers):
        named = {name: value(p) for name, p in layer.named_parameters()}
        block = {n.removeprefix("mtp_block."): p for n, p in named.items() if "mtp_block" in n}
        # ``copy`` takes models of two layers: the same one twice, of which one is used.
        twice = {f"model.layers.{i}.{name}": p for name, p in block.items() for i in range(2)}
        stacked = copy({**state, **twice}, "dense")["segment_0"]
        params[f"mtp_{k}_layer"] = jax.tree.map(lambda leaf: leaf[:1], stacked)
        params[f"mtp_{k}"] = {
            "hidden_norm": {"scale": jnp.asarray(named["hnorm.weight"])},
            "embedding_norm": {"scale": jnp.asarray(named["enorm.weight"])},
            "projection": {"kernel": jnp.asarray(named["eh_proj.weight"].T)},
            "final_norm": {"scale": jnp.asarray(named["post_norm.weight"])},
        }
    return params


def test_hidden_states_and_gradients(llama):
    main, modules = llama
    text = torch.randint(
        tiny.VOCAB, (2, LENGTH + DEPTH), generator=torch.Generator().manual_seed(5)
    )
    logits = forward(main, modules, text)
    loss = lambda k, n: -torch.log_softmax(logits[k][:, :n], -1).gather(
        -1, text[:, k + 1 : k + 1 + n, None]
    )  # fmt: skip
    # Of a row of LENGTH inputs and their targets, module k has LENGTH - k - 1 targets.
    ahead = sum(loss(k + 1, LENGTH - k - 1).mean() for k in range(DEPTH)) / DEPTH
    (loss(0, LENGTH).sum() + ahead).backward()
    config = tiny.dense_config(**OURS, mtp_depth=DEPTH, loss_chunk=4)
    params = tree(main, modules, to_numpy)
    ids = jnp.asarray(to_numpy(text), jnp.int32)
    batch = ids[:, :LENGTH], ids[:, 1 : LENGTH + 1]

    @jax.jit
    def run(params):
        def objective(params):
            out = Transformer(config).apply(
                {"params": params}, *batch, mtp=True, method=Transformer.loss
            )
            return out.nll + out.mtp.loss

        _, ahead = Transformer(config).apply(
            {"params": params}, *batch, method=Transformer.encode_ahead
        )
        return ahead.hidden, jax.grad(objective)(params)

    hidden, gradients = run(params)
    for k in range(DEPTH):
        end = LENGTH - k - 1
        wanted = to_numpy(logits[k + 1])[:, :end]
        assert tiny.relative_error(hidden[k, :, :end] @ params["head"], wanted) < 2e-5
    tiny.assert_trees_close(gradients, tree(main, modules, lambda p: p.grad.numpy()), 1e-4)
