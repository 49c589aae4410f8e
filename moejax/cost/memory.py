"""Bytes on one device while training: an estimate from the config, the layout and the chip.

Parameters, gradients and moments are float32 and cut as the mesh cuts them. Activations follow from
what a layer's backward pass needs again, which the tests hold against the traced model's residuals;
what a compiler keeps beyond that, and fragmentation, are not in it. XLA's CPU backend, compiling
Llama-3.1-8B, OLMoE and DeepSeek-V3 for 16 and 64 devices, takes the counted state within 0.1 % and
1.2 to 1.5 times the gradients, activations and working memory (``moejax plan --lower``).
"""

import collections
import dataclasses
import functools

from moejax.cost import counts, reach
from moejax.cost import hardware as chips
from moejax.cost.attention_counts import attention_counts
from moejax.models.model_config import ModelConfig, is_moe

ADAM_BYTES = 8  # two FP32 moments of a parameter
# A GPU's memory that a program may fill: JAX's XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 unless set.
USABLE = 0.9
# Heads that cuDNN's attention takes (moejax.models.attend); others have their scores in memory.
CUDNN_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many parts the mesh cuts things into; see ``moejax.parallel.MeshConfig``.

    Attributes:
      data: copies of the model.
      fsdp: parts of every parameter.
      expert: parts of the experts.
      context: parts of every row's length.
      tensor: parts of heads, widths and the vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.rows * self.context * self.tensor

    @property
    def rows(self) -> int:
        """Parts that the rows of a batch are spread over."""
        return self.data * self.fsdp * self.expert


@dataclasses.dataclass(frozen=True)
class Placement:
    """What one device has of a training step.

    Attributes:
      layout: sizes of the mesh.
      rows: of a micro-batch on one device.
      micro_batches: parts of a step; from two on their gradients are added up in a second copy.
      optimizer_bytes: bytes of optimizer state for each parameter.
    """

    layout: Layout = Layout()
    rows: int = 1
    micro_batches: int = 1
    optimizer_bytes: float = ADAM_BYTES


def memory_parts(
    c: ModelConfig, *, hardware: str, seq_len: int, placement: Placement = Placement()
) -> dict[str, float]:
    """Bytes on one device, by what they hold.

    Args:
      c: the model.
      hardware: a chip's name.
      seq_len: positions of a row.
      placement: what the device has of a step.

    Returns:
      ``weights``, ``gradients``, ``optimizer``; ``activations``, kept from the forward pass for the
      backward; ``working``, what exists for one layer or one chunk of the loss at a time: a layer's
      weights gathered over ``fsdp`` with their gradient, a rematerialised layer's inside, scores
      where attention is not cuDNN's, logits.
    """
    layout, tokens = placement.layout, placement.rows * seq_len / placement.layout.context
    held = _held(c, layout)
    item = _item(c, hardware)
    layers, repeated = _layers(c, layout, item, hardware, seq_len)
    kept = c.remat if c.remat != "none" else "all"
    activations = sum(n * bytes_[kept] for n, bytes_ in layers)
    activations += 10 * c.d_model * (1 + c.mtp_depth)  # around the head, 4 + 4 + 2 bytes a value
    # The inputs of MTP modules: two norms in float32, and what they are joined to.
    activations += c.mtp_depth * (16 + 2 * item) * c.d_model
    working = 0.0 if c.remat == "none" else repeated["all"] - repeated[kept]
    if c.remat == "none":
        working = repeated["scores"]
    chunk = min(1.0, c.loss_chunk / seq_len) if c.loss_chunk else 1.0
    logits = 2 * 4 * c.vocab_size / layout.tensor * chunk
    copies = item * held if c.remat == "none" and item < 4 else 0.0
    return {
        "weights": 4 * held,
        "gradients": 4 * held * min(2, placement.micro_batches),
        "optimizer": placement.optimizer_bytes * held,
        "activations": tokens * activations + copies,
        "working": tokens * (working + logits + _whole_keys(c, layout, item))
        + _gathered(c, layout, item),
    }


def _whole_keys(c: ModelConfig, layout: Layout, item: int) -> float:
    """What one layer's attention has of the rows' other positions, for each token of a device's.

    Keys and values, and their gradients, of all that the rows are cut into over ``context``; of MLA
    those that the gathered latents make.
    """
    others = layout.context - 1
    if c.attention.kind == "mla":
        latents = c.attention.kv_lora_rank + c.attention.rope_head_dim
        return 2 * item * others * (_keys_and_values(c) / layout.tensor + latents)
    return 2 * item * others * _keys_and_values(c) / layout.tensor


def _keys_and_values(c: ModelConfig) -> int:
    """Numbers in the keys and values that all queries of a layer multiply with, of one token."""
    if c.attention.kind == "mla":
        return c.attention.num_heads * (c.head_dim + c.attention.v_head_dim)
    return 2 * c.attention.kv_heads * c.head_dim


def _held(c: ModelConfig, layout: Layout) -> float:
    """Parameters on one device, each cut as the table of ``moejax.parallel.mesh`` cuts it.

    What ``tensor`` does not cut is little of a model and much beside its share on many devices:
    maps into latents, routers, the projections of MTP modules; norms are whole everywhere.
    """
    routed, rest, parts = _sizes(c)
    routed_layers, narrow, inner, outer = counts.routed_layers(c), 0, 0, 0
    norms = parts["norms"]
    if c.attention.kind == "mla":
        a = c.attention
        narrow += (c.num_layers + c.mtp_depth) * c.d_model * (
            a.q_lora_rank + a.kv_lora_rank + a.rope_head_dim
        )  # fmt: skip
    if c.moe is not None and c.layers("moe"):
        narrow += parts["router"] // c.layers("moe") * routed_layers
        narrow += routed_layers * c.d_model * (2 * c.moe.latent_dim + c.moe.shared_gate)
        if c.moe.expert_bias:  # of the first product, which fsdp does not cut, and of the second
            inner = routed_layers * c.moe.num_experts * 2 * c.moe.d_expert
            outer = routed_layers * c.moe.num_experts * (c.moe.latent_dim or c.d_model)
    narrow += c.mtp_depth * 2 * c.d_model**2
    both = layout.fsdp * layout.tensor
    wide = rest - narrow - norms
    experts = (routed - inner - outer) / both + inner / layout.tensor + outer / layout.fsdp
    return experts / layout.expert + wide / both + narrow / layout.fsdp + norms


@functools.lru_cache(maxsize=64)
def _sizes(c: ModelConfig) -> tuple[int, int, dict[str, int]]:
    """Parameters of routed experts, all others, and all by component; a search asks again."""
    params, routed = counts.count(c, 1).params, counts.routed_params(c)
    return routed, params.total + params.mtp - routed, params.by_component


def _item(c: ModelConfig, hardware: str) -> int:
    """Bytes of a value in the compute type."""
    return 4 if c.dtype == "float32" or (c.dtype == "auto" and hardware == "cpu") else 2


def _gathered(c: ModelConfig, layout: Layout, item: int) -> float:
    """The head and the largest layer as their products see them.

    Over ``fsdp`` float32 parameters are gathered, cast, and their float32 gradient exists whole
    before it is scattered, as XLA's buffers of DeepSeek-V3's step show; else they are cast only.
    The head's gradient is added up chunk by chunk, and so exists beside those of the others.
    """
    _, _, parts = _sizes(c)
    whole = 4 + item + 4 if layout.fsdp > 1 else item if item < 4 else 0
    head = c.vocab_size * c.d_model / layout.tensor * max(whole, 4 + item)
    layer = parts["attention_projections"] / c.num_layers
    ffn = parts["dense_ffn"] / max(1, c.layers("dense"))
    if c.layers("moe"):
        routed = counts.expert_params(c).held * c.moe.num_experts / layout.expert
        ffn = max(ffn, routed + parts["shared_experts"] / c.layers("moe"))
    return whole * (layer + ffn) / layout.tensor + head


def _layers(
    c: ModelConfig, layout: Layout, item: int, hardware: str, seq_len: int
) -> tuple[list[tuple[int, dict[str, float]]], dict[str, float]]:
    """Layers with what each keeps of a token, and the sum over the largest repeated pattern."""
    found, largest = [], collections.Counter()
    segments = [*c.layout, *[((c.mtp_kind,), 1)] * c.mtp_depth]
    for kinds, repeats in segments:
        inside = collections.Counter()
        for kind in kinds:
            kept = kept_bytes(c, kind, layout, item, hardware, seq_len)
            found.append((repeats, kept))
            inside.update(kept)
        if inside["all"] >= largest["all"]:
            largest = inside
    return found, largest


def kept_bytes(
    c: ModelConfig, kind: str, layout: Layout, item: int, hardware: str, seq_len: int
) -> dict[str, float]:
    """Bytes that one layer keeps of each token for its backward pass.

    Args:
      c: the model.
      kind: of the layer.
      layout: sizes of the mesh.
      item: bytes of a value in the compute type.
      hardware: a chip's name.
      seq_len: positions of a row.

    Returns:
      ``full``: the layer's input, ``dots``: also the outputs of products without a batch axis,
      ``all``: without rematerialisation, and ``scores``, the largest part of it.
    """
    attention, cut = attention_counts(c), layout.tensor
    # Each norm keeps its input and its result in float32, and its result in the compute type.
    norms = 2 * (2 * 4 + item) * c.d_model
    if c.attention.kind == "mla":
        norms += 2 * 4 * attention.norms
    scores = 0.0 if _flash(c, hardware) else c.attention.num_heads * seq_len * (4 + item) / cut
    inner = attention.outputs / cut
    dots = 2 * c.d_model + (attention.outputs - c.attention.num_heads * _value_width(c)) / cut
    everything = norms + item * inner + scores
    if c.attention.kind == "mla":
        # Made of gathered latents on every device along context, and kept there.
        everything += item * (layout.context - 1) * _keys_and_values(c) / cut
    if is_moe(kind):
        shared = c.moe.num_shared_experts * c.moe.d_expert / cut
        width = c.moe.latent_dim or c.d_model
        rows = _rows(c, layout)
        routed = item * (2 * c.moe.top_k * c.moe.d_expert / cut + rows * width)
        if c.moe.dispatch == "capacity":
            routed += item * c.moe.top_k * (4 * c.moe.d_expert / cut + 2 * width)
        logits = 4 * c.moe.num_experts
        return {
            "full": item * c.d_model,
            "dots": item * (dots + 2 * shared) + logits,
            "all": everything + 6 * item * shared + routed + logits + 4 * c.d_model,
            "scores": scores,
        }
    width = c.dense_width / cut
    return {
        "full": item * c.d_model,
        "dots": item * (dots + 2 * width),
        "all": everything + 6 * item * width,
        "scores": scores,
    }


def _value_width(c: ModelConfig) -> int:
    return c.attention.v_head_dim if c.attention.kind == "mla" else c.head_dim


def _flash(c: ModelConfig, hardware: str) -> bool:
    """Whether attention runs without its scores in memory: cuDNN's, or the CPU's own."""
    if hardware == "cpu":
        return True
    if hardware.startswith("tpu") or c.attention.implementation == "xla":
        return False
    return c.head_dim <= CUDNN_WIDTH and c.head_dim % 8 == 0 and not c.attention.sinks


def _rows(c: ModelConfig, layout: Layout) -> float:
    """Rows of experts' inputs that a device has for each of its own tokens."""
    if layout.expert == 1 or c.moe.exchange == "none":
        return 1.0
    return reach.expected_parts(c.moe, layout.expert) * c.moe.exchange_factor


def usable_bytes(hardware: str) -> float | None:
    """Bytes of a device's memory that a training program may fill; None where it is not its own."""
    memory = chips.lookup(hardware).memory_bytes
    return None if memory is None else USABLE * memory
