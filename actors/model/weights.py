"""List the tensors that each layer group needs: `check` looks for them, `show` counts them, hosts read them.

This module does not import torch, so that a graph is checked in a tenth of a second; for quantised checkpoints it does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ..checkpoint.bounds import MOST_SIZE
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import LAYER_OF, ModelConfig
from ..checkpoint.quantised import Quantised
from ..checkpoint.tensors import TensorEntry
from ..component.kinds import BUILT_IN, Kind
from ..errors import CheckpointError
from . import seq2seq_weights
from .slots import Need, Slot


def embedding(config: ModelConfig) -> Iterator[Slot]:
    gpt2 = config.family == "gpt2"
    yield Slot("embedding", ((_embedding(config), config.vocab),), config.hidden)
    if config.learned_positions:
        yield Slot("positions", (("transformer.wpe.weight" if gpt2 else "", config.context),), config.hidden)


def head(config: ModelConfig) -> Iterator[Slot]:
    """Yield the tensors of the head; a tied head reads the embedding's tensor, so both ends hold it."""
    yield from final_norm(config)
    yield Slot("head", ((_embedding(config) if config.tied else "lm_head.weight", config.vocab),), config.hidden)


def final_norm(config: ModelConfig) -> Iterator[Slot]:
    yield from _norm(config, "norm", "transformer.ln_f" if config.family == "gpt2" else "model.norm")


def block(config: ModelConfig, layer: int) -> Iterator[Slot]:
    """Yield the tensors of one layer; q, k and v share one matrix, gate and up share another."""
    if config.family == "gpt2":
        yield from _gpt2_block(config, f"transformer.h.{layer}.")
        return
    prefix, hidden, inner = f"model.layers.{layer}.", config.hidden, config.intermediate
    query, value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv = (("self_attn.q_proj", query), ("self_attn.k_proj", value), ("self_attn.v_proj", value))
    up = (("mlp.gate_proj", inner), ("mlp.up_proj", inner))
    yield from _norm(config, "norm_in", prefix + "input_layernorm")
    yield from _linear(prefix, "qkv", qkv, hidden, config.qkv_bias)
    if config.head_norms:
        yield Slot("norm_query", ((prefix + "self_attn.q_norm.weight", config.head_dim),))
        yield Slot("norm_key", ((prefix + "self_attn.k_norm.weight", config.head_dim),))
    yield from _linear(prefix, "out", (("self_attn.o_proj", hidden),), query, config.out_bias)
    if config.post_norms:
        yield from _norm(config, "norm_attended", prefix + "post_attention_layernorm")
        yield from _norm(config, "norm_mid", prefix + "pre_feedforward_layernorm")
        yield from _norm(config, "norm_out", prefix + "post_feedforward_layernorm")
    else:
        yield from _norm(config, "norm_mid", prefix + "post_attention_layernorm")
    if config.experts:
        return  # experts run in other actors
    yield from _linear(prefix, "up", up, hidden, config.mlp_bias)
    yield from _linear(prefix, "down", (("mlp.down_proj", hidden),), inner, config.mlp_bias)


def gate(config: ModelConfig, layer: int) -> Slot:
    """Return the slot of the router of one layer."""
    name = "block_sparse_moe" if config.family == "mixtral" else "mlp"
    return Slot("gate", ((f"model.layers.{layer}.{name}.gate.weight", config.experts),), config.hidden)


def expert(config: ModelConfig, layer: int, number: int) -> Iterator[Slot]:
    """Yield the tensors of the feed-forward part of one expert."""
    if config.family == "mixtral":
        prefix, (one, two, down) = f"model.layers.{layer}.block_sparse_moe.experts.{number}.", ("w1", "w3", "w2")
    else:
        prefix, (one, two, down) = f"model.layers.{layer}.mlp.experts.{number}.", ("gate_proj", "up_proj", "down_proj")
    yield from _linear(prefix, "up", ((one, config.intermediate), (two, config.intermediate)), config.hidden, False)
    yield from _linear(prefix, "down", ((down, config.hidden),), config.intermediate, False)


def shared_expert(config: ModelConfig, layer: int) -> Iterator[Slot]:
    """Yield the tensors of the expert that every token passes through, and of its gate."""
    if config.shared_expert:
        prefix, width = f"model.layers.{layer}.mlp.", config.shared_expert
        up = (("shared_expert.gate_proj", width), ("shared_expert.up_proj", width))
        yield from _linear(prefix, "up", up, config.hidden, False)
        yield from _linear(prefix, "down", (("shared_expert.down_proj", config.hidden),), width, False)
        yield from _linear(prefix, "gate", (("shared_expert_gate", 1),), config.hidden, False)


def _gpt2_block(config: ModelConfig, prefix: str) -> Iterator[Slot]:
    hidden, inner = config.hidden, config.intermediate
    yield from _norm(config, "norm_in", prefix + "ln_1")
    yield from _linear(prefix, "qkv", (("attn.c_attn", 3 * hidden),), hidden, True, transposed=True)
    yield from _linear(prefix, "out", (("attn.c_proj", hidden),), hidden, True, transposed=True)
    yield from _norm(config, "norm_mid", prefix + "ln_2")
    yield from _linear(prefix, "up", (("mlp.c_fc", inner),), hidden, True, transposed=True)
    yield from _linear(prefix, "down", (("mlp.c_proj", hidden),), inner, True, transposed=True)


def _embedding(config: ModelConfig) -> str:
    return "transformer.wte.weight" if config.family == "gpt2" else "model.embed_tokens.weight"


def _norm(config: ModelConfig, name: str, tensor: str) -> Iterator[Slot]:
    yield Slot(name, ((tensor + ".weight", config.hidden),))
    if config.norm == "layer":
        yield Slot(name + "_bias", ((tensor + ".bias", config.hidden),))


def _linear(
    prefix: str, name: str, parts: tuple[tuple[str, int], ...], columns: int, bias: bool, transposed: bool = False
) -> Iterator[Slot]:
    yield Slot(name, tuple((f"{prefix}{part}.weight", rows) for part, rows in parts), columns, transposed)
    if bias:
        yield Slot(name + "_bias", tuple((f"{prefix}{part}.bias", rows) for part, rows in parts))


def slots(
    kind: Kind, config: ModelConfig, layers: tuple[int, int] | None, experts: tuple[int, int] | None = None
) -> Iterator[Slot]:
    """Yield every tensor that an actor of a built-in kind holds.

    `layers` and `experts` are the first and the last, both included.
    """
    if config.encoder is not None:
        yield from seq2seq_weights.slots(kind, config, layers)
        return
    if kind.keeps_nothing:
        return
    if kind.one_layer:
        assert layers is not None
        yield from _mixture(kind, config, layers[0], experts)
    if kind.uses_experts:
        return
    if kind.begins:
        yield from embedding(config)
    if layers is not None:
        for layer in range(layers[0], layers[1] + 1):
            yield from block(config, layer)
    if kind.ends and not (kind.whole and config.tied):
        yield from head(config)
    elif kind.whole:
        yield from final_norm(config)  # the embedding already yielded the tied matrix


def _mixture(kind: Kind, config: ModelConfig, layer: int, experts: tuple[int, int] | None) -> Iterator[Slot]:
    """Yield what an actor of one mixture-of-experts layer holds: some experts, or the gate with the shared expert."""
    if kind.uses_experts:
        assert experts is not None
        for number in range(experts[0], experts[1] + 1):
            yield from expert(config, layer, number)
    else:
        yield gate(config, layer)
        yield from shared_expert(config, layer)


def needs(
    kind: Kind, config: ModelConfig, layers: tuple[int, int] | None, experts: tuple[int, int] | None = None
) -> Iterator[Need]:
    """Yield names and shapes of the checkpoint's tensors for `slots`."""
    for slot in slots(kind, config, layers, experts):
        yield from slot.needs()


PACKABLE = ("qkv", "out", "up", "down", "head", "cross_query", "cross_kv", "cross_out")
"""Slots whose matrices the kernels can hold packed."""
BITS = {"bfloat16": 16.0, "int8": 8.5, "int4": 5.0}
"""Bits per packed weight, with its share of the scales and least values."""
AS_IT_IS = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}
"""The packed form that holds each of these GGUF types without rounding."""


def packed_as(slot: Slot, checkpoint: Checkpoint, precision: str) -> str:
    """Return the packed form of a matrix: bfloat16, int8 or int4.

    With the precision `stored`, GGUF's plain types (`AS_IT_IS`) keep their form, and its other types and mixed parts become
    int8. Matrices that other methods have quantised become int4 or int8 where these hold them without rounding. All others
    become bfloat16.
    """
    if precision != "stored":
        return "bfloat16" if precision == "dtype" else precision
    entries = [checkpoint.tensors[name] for name, _ in slot.parts]
    if any(isinstance(entry, Quantised) for entry in entries):
        tiles = {entry.tile if isinstance(entry, Quantised) else None for entry in entries}
        return "bfloat16" if None in tiles or slot.transposed else "int8" if "int8" in tiles else "int4"
    stored = {entry.stored for entry in entries}
    if not any(kind.isupper() for kind in stored):
        return "bfloat16"
    [kind] = {AS_IT_IS.get(kind, "int8") for kind in stored} if len(stored) == 1 else {"int8"}
    return kind


def forms(checkpoint: Checkpoint, precision: str, dtype: str) -> list[tuple[str, str, int]]:
    """Return how the matrices of a model are stored, how they are held in memory, and how many there are, each way once.

    Only those of layers and head count that this package's own blocks run.
    """
    config = checkpoint.config
    if not config.native:
        return []
    counted: Counter[tuple[str, str]] = Counter()
    for slot in _all_matrices(config):
        if slot.name in PACKABLE and all(name in checkpoint.tensors for name, _ in slot.parts):
            stored = "/".join(sorted({checkpoint.tensors[name].stored for name, _ in slot.parts}))
            held = packed_as(slot, checkpoint, precision) if precision != "dtype" and packs(slot) else dtype
            counted[stored, held] += 1
    return [(stored, held, count) for (stored, held), count in sorted(counted.items())]


def _all_matrices(config: ModelConfig) -> Iterator[Slot]:
    """Yield the slots of all layers and of the head, among others."""
    if config.encoder is None:
        yield from slots(BUILT_IN["model"], replace(config, tied=False), (0, config.layers - 1))
        return
    for kind, layers in (("encoder", config.encoder.layers), ("decoder", config.layers)):
        yield from slots(BUILT_IN[kind], config, (0, layers - 1))
    yield from seq2seq_weights.head(config)


MOST_QUERIES, MOST_WIDTH = 32, 512
"""Largest number of query heads per key-value head, and largest head, that the kernels support (attend.c)."""


def by_kernels(config: ModelConfig) -> bool:
    """Return whether the kernels can run the blocks of a model: not if its sizes or norms are such that they lack.

    Of a mixture of experts they run attention, and products alone for the experts, which are other actors.
    """
    return (
        (config.native or config.experts > 0) and config.encoder is None
        and not (config.norm == "layer" and (config.head_norms or config.post_norms))
        and config.head_dim % 32 == 0 and config.hidden % 32 == 0 and config.intermediate % 32 == 0
        and config.heads // config.kv_heads <= MOST_QUERIES and config.head_dim <= MOST_WIDTH
    )  # fmt: skip


def repeats(config: ModelConfig) -> bool:
    """Return whether the kernels can run a whole model, its head, too. Only they repeat products whatever is beside them.

    Torch computes the router of a mixture of experts.
    """
    return by_kernels(config) and not config.experts and config.vocab % 16 == 0


def packs(slot: Slot) -> bool:
    """Return whether the kernels can hold a matrix: its rows are a multiple of 16, its columns a multiple of 32."""
    return slot.name in PACKABLE and slot.shape[0] % 16 == 0 and (slot.columns or 1) % 32 == 0


def shares_packed(matrix: Slot, checkpoint: Checkpoint, precision: str) -> bool:
    """Return whether a tied model's embedding reads the head's packed matrix: it does if packing rounds nothing."""
    if not packs(matrix) or precision not in ("dtype", "stored"):
        return False
    stored = {checkpoint.tensors[name].stored for name, _ in matrix.parts}
    return packed_as(matrix, checkpoint, precision) == "bfloat16" or stored <= AS_IT_IS.keys()


def held_bytes(
    checkpoint: Checkpoint, kind: Kind, layers: tuple[int, int] | None, experts: tuple[int, int] | None,
    itemsize: int, precision: str, *, on_gpu: bool = False,
) -> int:  # fmt: skip
    """Return the bytes of the weights that an actor holds.

    On a GPU, the embedding of a tied model is plain, and shares its matrix with the head only if that is plain, too.
    """
    total = 0.0
    needed = list(slots(kind, checkpoint.config, layers, experts))
    if kind.whole and checkpoint.config.tied:
        [matrix] = [slot for slot in head(checkpoint.config) if slot.name == "head"]
        if on_gpu:
            needed += [matrix] if packed_as(matrix, checkpoint, precision) != "bfloat16" else []
        elif shares_packed(matrix, checkpoint, precision):
            needed = [matrix if slot.name == "embedding" else slot for slot in needed]
        elif precision != "dtype":
            needed.append(matrix)
    for slot in needed:
        held = packed_as(slot, checkpoint, precision) if precision != "dtype" and packs(slot) else None
        total += slot.elements * (BITS[held] / 8 if held is not None else itemsize)
    return int(total)


def check(
    checkpoint: Checkpoint, kind: Kind, layers: tuple[int, int] | None, experts: tuple[int, int] | None = None
) -> int:
    """Check that the checkpoint has an actor's tensors, and return the number of their elements.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    if not checkpoint.config.runs(blocks=kind.holds_blocks):
        return _foreign_elements(checkpoint, kind, layers)
    elements = 0
    for name, shape in needs(kind, checkpoint.config, layers, experts):
        checkpoint.require(name, shape)
        elements += math.prod(shape)
    return elements


CHECKED_BYTES = 64 << 20
"""Bytes of scales and zeros that `check_whole` reads, which takes some tenths of a second; hosts check their own matrices."""
_HARMLESS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".k_scale", ".v_scale")
"""Ends of names of tensors that some checkpoints contain but no actor reads: tables and masks, which are computed, and
scales for a KV cache of eight bits."""


def check_whole(checkpoint: Checkpoint) -> list[str]:
    """Check that the file has the layers of its config and nothing that contradicts it, and return warnings.

    A tensor that the family has with another config, such as a bias, contradicts this one. Any other tensor that is not
    needed is only named in a warning, as in transformers.

    Raises:
        CheckpointError: the file has another number of layers, or tensors in a layer that the config excludes; or a scale
            is not finite.
    """
    config = checkpoint.config
    numbered = {name: int(found[1]) for name in checkpoint.tensors if (found := LAYER_OF.search(name)) is not None}
    if config.encoder is not None:
        return []  # encoder and decoder both number their layers from 0
    count = max(numbered.values(), default=-1) + 1
    # models that transformers runs may have more layers, which predict several tokens ahead; the library ignores them
    if numbered and (count < config.layers or (count > config.layers and config.native)):
        name = max(numbered, key=lambda name: numbered[name])
        raise CheckpointError(
            f"{checkpoint.path}: expected {config.layers} layers, as the config says, got {count} (tensor {name})"
        )
    left = CHECKED_BYTES
    for entry in checkpoint.tensors.values():
        if isinstance(entry, Quantised) and left > 0:
            entry.check()
            left -= entry.scale_bytes
    return _not_read(checkpoint) if config.native else []


def _not_read(checkpoint: Checkpoint) -> list[str]:
    """Return a warning if the file has tensors that no actor reads.

    Raises:
        CheckpointError: the family has such a tensor with another config.
    """
    config, whole = checkpoint.config, BUILT_IN["model"]
    layers = (0, config.layers - 1)
    needed = {name for name, _ in needs(whole, config, layers)}
    other = replace(config, qkv_bias=True, out_bias=True, mlp_bias=True, head_norms=True, post_norms=True)
    known = {name for name, _ in needs(whole, other, layers)}
    left = [
        name
        for name in sorted(checkpoint.tensors.keys() - needed)
        if not name.endswith(_HARMLESS) and name not in _READ and not (name in known and _is_zero(checkpoint, name))
    ]
    wrong = next((name for name in left if name in known), None)
    if wrong is not None:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {wrong} is in the file, but a {config.family} model with this config "
            "has no such tensor"
        )
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    named = ", ".join(left[:3])
    return [f"tensors that a {config.family} model does not have are not read: {named}{more}"] if left else []


_READ = ("lm_head.weight", "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""The head of a tied model, which is its embedding, and tables of GGUF, which the config has already."""


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor has only zeros; some packages that quantise write such biases."""
    entry = checkpoint.tensors[name]
    small = isinstance(entry, TensorEntry) and len(entry.shape) == 1 and entry.nbytes <= 8 * MOST_SIZE
    return small and isinstance(entry, TensorEntry) and not entry.read().strip(b"\0")


def _foreign_elements(checkpoint: Checkpoint, kind: Kind, layers: tuple[int, int] | None) -> int:
    """Count an actor's elements if transformers runs it: its layers' tensors and, at both ends, those in no layer."""
    outside = kind.begins or kind.ends
    elements = 0
    for name, entry in checkpoint.tensors.items():
        found = LAYER_OF.search(name)
        if outside if found is None else layers is not None and layers[0] <= int(found[1]) <= layers[1]:
            elements += math.prod(entry.shape)
    return elements
