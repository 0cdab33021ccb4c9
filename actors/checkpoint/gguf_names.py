"""Give the tensors of a GGUF file the names, shapes and order of rows that transformers' models have.

A `Layout` per architecture says how its file differs. The converters that write the files are llama.cpp's (`conversion/`);
the names are those of its `gguf-py/gguf/tensor_mapping.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import MOST_LAYERS
from .gguf_file import GGUFTensor
from .tensors import Entry, Interleaved, Stacked, TensorEntry

Found = Mapping[str, tuple[Path, GGUFTensor]]
"""Tensors of a GGUF model by their names, each with its file."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Describe the tensors of an architecture: their names in transformers, and what the converter did to them."""

    outer: Mapping[str, str]
    """Names outside the layers."""
    stacks: Mapping[str, tuple[str, Mapping[str, str]]]
    """Begin of the names of layers: their begin in transformers, and the names inside a layer."""
    turned: bool = False
    """True if the rows of q and k lie in pairs that the rotary embedding rotates together."""
    added: float = 0.0
    """What the converter added to the weights of norms."""
    transposed: tuple[str, ...] = ()
    """Matrices of a layer that transformers keeps transposed."""
    experts: str = ""
    """Name of an expert's tensors in a layer, with places for its number and its part."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Parts of an expert: gate, up, down."""
    by_head: Mapping[str, str] = field(default_factory=dict)
    """Matrices with a row for each head, where transformers has a vector for each."""
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Tensors of transformers that stack two of the file, expert by expert."""
    interleaved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of transformers whose columns are rows of one or several of the file in turn, expert by expert."""
    bare: Mapping[str, str] = field(default_factory=dict)
    """Names in a layer that do not end in `.weight` in transformers."""
    rows: tuple[str, ...] = ()
    """Vectors that are matrices of one row in transformers."""


def _decoder(block: Mapping[str, str], **more: Any) -> Layout:
    return Layout(_OUTER, {"blk": ("model.layers", block)}, **more)


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_LLAMA = {**_ATTENTION, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA = {**_LLAMA, **_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_QWEN_MOE = {
    **_ATTENTION, "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_GPT2 = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
_T5_OUTER = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm",
             "dec.output_norm": "decoder.final_layer_norm", "output": "lm_head"}  # fmt: skip
_T5_SELF = {
    "attn_norm": "layer.0.layer_norm", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    **{f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
}  # fmt: skip
_T5_CROSS = {
    "cross_attn_norm": "layer.1.layer_norm",
    **{f"cross_attn_{part}": f"layer.1.EncDecAttention.{part}" for part in "qkvo"},
}  # fmt: skip


def _t5(up: Mapping[str, str]) -> Layout:
    def feed(layer: int) -> dict[str, str]:
        begin = f"layer.{layer}."
        dense = {ours: f"{begin}DenseReluDense.{theirs}" for ours, theirs in {**up, "ffn_down": "wo"}.items()}
        return {"ffn_norm": f"{begin}layer_norm", **dense}

    return Layout(
        _T5_OUTER,
        {
            "enc.blk": ("encoder.block", {**_T5_SELF, **feed(1)}),
            "dec.blk": ("decoder.block", {**_T5_SELF, **_T5_CROSS, **feed(2)}),
        },
    )


_EACH = "mlp.experts.{}.{}"
LAYOUTS: Mapping[str, Layout] = {
    "llama": _decoder(_LLAMA, turned=True),
    "llama with experts": _decoder(
        {**_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"}, turned=True, experts="block_sparse_moe.experts.{}.{}",
        parts=("w1", "w3", "w2"),
    ),
    "qwen2": _decoder(_LLAMA),
    "qwen3": _decoder(_LLAMA),
    "qwen2moe": _decoder(_QWEN_MOE, experts=_EACH, rows=("ffn_gate_inp_shexp",)),
    "qwen3moe": _decoder(_QWEN_MOE, experts=_EACH),
    "gemma": _decoder(_LLAMA, added=1.0),
    "gemma2": _decoder(_GEMMA, added=1.0),
    "gemma3": _decoder(_GEMMA, added=1.0),
    "phi3": _decoder({**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "gpt2": Layout(
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
        {"blk": ("transformer.h", _GPT2)}, transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "granite": _decoder(_LLAMA, turned=True),
    "granitemoe": _decoder(
        {**_ATTENTION, "ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_down_exps": "block_sparse_moe.output_linear"},
        turned=True, joined={"block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps")},
    ),
    "gpt-oss": _decoder(
        {**_ATTENTION, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
        interleaved={"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)},
        bare={"attn_sinks": "self_attn.sinks"},
    ),
    "olmo": _decoder(_LLAMA, turned=True),
    "olmo2": _decoder({**_LLAMA, **_AFTER}),
    "olmoe": _decoder({**_ATTENTION, "ffn_gate_inp": "mlp.gate"}, experts=_EACH),
    "starcoder2": _decoder({**_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "stablelm": _decoder(
        _LLAMA,
        by_head={"attn_q_norm": "self_attn.q_layernorm.norms", "attn_k_norm": "self_attn.k_layernorm.norms"},
    ),
    "command-r": _decoder(_LLAMA),
    "cohere2": _decoder(_LLAMA),
    "smollm3": _decoder(_LLAMA, turned=True),
    "t5": _t5({"ffn_up": "wi"}),
    "t5 with gates": _t5({"ffn_gate": "wi_0", "ffn_up": "wi_1"}),
}  # fmt: skip
"""Layouts by architecture."""
AS_IT_IS = Layout({}, {})
"""A layout that knows no names."""
_PLAIN = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}
_EXPERT = ("ffn_gate", "ffn_up", "ffn_down")


def named(found: Found, layout: Layout, heads: tuple[int, int, int]) -> dict[str, Entry]:
    """Return the entries of a file's tensors by transformers' names.

    `heads` are the numbers of query heads and key-value heads, and the width of one. A tensor that the layout does not
    know keeps its name.
    """
    entries = {
        name: TensorEntry(
            name, file, _PLAIN.get(each.type, each.type), each.shape, each.offset, each.nbytes,
            factors=_factors(found, name.removesuffix(".weight") + ".scale") if name.endswith(".weight") else (),
        )
        for name, (file, each) in found.items()
        if not name.endswith((".scale", ".input_scale"))  # of weights, and of activations, which are not quantised here
    }  # fmt: skip
    made: dict[str, Entry] = {}
    for entry in entries.values():
        made |= {each.name: each for each in _renamed(entry, layout, heads)}
    return made | dict(_joined(entries, layout)) | dict(_interleaved(entries, layout))


def _factors(found: Found, name: str) -> tuple[float, ...]:
    """Return what multiplies the blocks of a tensor (NVFP4): nothing, one number, or one for each expert.

    Raises:
        CheckpointError: they are no vector of finite float32.
    """
    if name not in found:
        return ()
    path, scale = found[name]
    if scale.type != "F32" or len(scale.shape) != 1 or scale.shape[0] > MOST_LAYERS:
        raise CheckpointError(
            f"{path}: tensor {name}: expected float32[1] or float32[experts], got {scale.type}{scale.shape}"
        )
    factors = struct.unpack(
        f"<{scale.shape[0]}f", TensorEntry(name, path, "float32", scale.shape, scale.offset, scale.nbytes).read()
    )
    if not all(math.isfinite(factor) for factor in factors):
        raise CheckpointError(f"{path}: tensor {name}: expected finite numbers, got {factors!r:.80}")
    return factors


def _renamed(entry: TensorEntry, layout: Layout, heads: tuple[int, int, int]) -> Iterator[TensorEntry]:
    stem, _, end = entry.name.rpartition(".")
    if stem in layout.outer:
        yield replace(entry, name=f"{layout.outer[stem]}.{end}", added=layout.added if "norm" in stem else 0.0)
        return
    placed = _in_layer(stem, layout)
    if placed is None:
        yield entry
        return
    begin, leaf, names = placed
    if layout.experts and len(entry.shape) != 1:
        found = list(_of_experts(entry, begin, leaf, layout))
        if found:
            yield from found
            return
    yield from _of_block(entry, begin, leaf, end, names, layout, heads)


def _of_experts(entry: TensorEntry, begin: str, leaf: str, layout: Layout) -> Iterator[TensorEntry]:
    """Yield the experts of a tensor that has one or all of them; nothing if it has none."""
    short, _, number = leaf.rpartition(".")
    if leaf.endswith("_exps") and leaf.removesuffix("_exps") in _EXPERT and _stacks(entry, 3):
        for expert in range(entry.shape[0]):
            name = begin + _of_expert(layout, leaf.removesuffix("_exps"), expert)
            yield entry.part(name, expert, expert + 1, entry.shape[1:])
    elif short in _EXPERT and number.isdecimal():  # of older files: a tensor for each expert
        yield replace(entry, name=begin + _of_expert(layout, short, int(number[:6])))


def _of_block(
    entry: TensorEntry,
    begin: str,
    leaf: str,
    end: str,
    names: Mapping[str, str],
    layout: Layout,
    heads: tuple[int, int, int],
) -> Iterator[TensorEntry]:
    """Yield what a tensor of a layer is in transformers."""
    if leaf in layout.by_head and _stacks(entry, 2):
        for head in range(entry.shape[0]):
            yield entry.part(f"{begin}{layout.by_head[leaf]}.{head}.{end}", head, head + 1, entry.shape[1:])
    elif leaf in layout.bare:
        yield replace(entry, name=begin + layout.bare[leaf])
    elif leaf == "attn_qkv" and leaf not in names:
        yield from _apart(entry, begin, end, names, layout, heads)
    elif leaf in names:
        yield _of_layer(entry, f"{begin}{names[leaf]}.{end}", leaf, layout, heads)
    else:
        yield entry


def _in_layer(stem: str, layout: Layout) -> tuple[str, str, Mapping[str, str]] | None:
    """Return the begin of the layer's names, the name in the layer, and transformers' names; None if it is in no layer."""
    for ours, (theirs, names) in layout.stacks.items():
        number, _, leaf = stem.removeprefix(ours + ".").partition(".")
        if stem.startswith(ours + ".") and number.isdecimal():
            return f"{theirs}.{number}.", leaf, names
    return None


def _stacks(entry: TensorEntry, dims: int) -> bool:
    """Return whether a tensor has so many dimensions, and a number of entries in the first that a model can have."""
    return len(entry.shape) == dims and 0 < entry.shape[0] <= MOST_LAYERS


def _of_expert(layout: Layout, part: str, number: int) -> str:
    return layout.experts.format(number, layout.parts[_EXPERT.index(part)]) + ".weight"


def _of_layer(entry: TensorEntry, name: str, leaf: str, layout: Layout, heads: tuple[int, int, int]) -> TensorEntry:
    turned = {"attn_q": heads[0], "attn_k": heads[1]}.get(leaf, 0) if layout.turned else 0
    transposed = leaf in layout.transposed and len(entry.shape) == 2
    shape = entry.shape[::-1] if transposed else entry.shape
    if leaf in layout.rows and len(shape) == 1:
        shape = (1, *shape)
    added = layout.added if "norm" in leaf else 0.0
    return replace(entry, name=name, shape=shape, permuted_heads=turned, transposed=transposed, added=added)


def _apart(
    entry: TensorEntry, begin: str, end: str, names: Mapping[str, str], layout: Layout, heads: tuple[int, int, int]
) -> Iterator[TensorEntry]:
    """Yield q, k and v of a tensor that has them one after the other."""
    queries, keys, width = heads
    rows = [queries * width, keys * width, keys * width]
    if sum(rows) != entry.shape[0] or not {"attn_q", "attn_k", "attn_v"} <= names.keys():
        yield entry  # whoever needs the parts will miss them
        return
    start = 0
    for leaf, count in zip(("attn_q", "attn_k", "attn_v"), rows, strict=True):
        part = entry.part(entry.name, start, start + count)
        yield _of_layer(part, f"{begin}{names[leaf]}.{end}", leaf, layout, heads)
        start += count


def _joined(entries: Mapping[str, TensorEntry], layout: Layout) -> Iterator[tuple[str, Entry]]:
    for theirs, (one, other) in layout.joined.items():
        for name, first in entries.items():
            placed = _in_layer(name.removesuffix(".weight"), layout)
            second = entries.get(name.replace(one, other))
            if (
                placed is None
                or placed[1] != one
                or second is None
                or first.shape != second.shape
                or not _stacks(first, 3)
            ):
                continue
            parts = [each.part(name, n, n + 1) for n in range(first.shape[0]) for each in (first, second)]
            count, rows, columns = first.shape
            made = f"{placed[0]}{theirs}.weight"
            yield made, Stacked(made, (count, 2 * rows, columns), tuple(parts))


def _interleaved(entries: Mapping[str, TensorEntry], layout: Layout) -> Iterator[tuple[str, Entry]]:
    for theirs, leaves in layout.interleaved.items():
        for name, first in entries.items():
            stem, _, end = name.rpartition(".")
            placed = _in_layer(stem, layout)
            if placed is None or placed[1] != leaves[0] or not _stacks(first, 3 if end == "weight" else 2):
                continue
            parts = [entries.get(name.replace(leaves[0], leaf)) for leaf in leaves]
            found = [part for part in parts if part is not None and part.shape == first.shape]
            if len(found) < len(leaves):
                continue  # whoever needs the tensor will miss it
            made = f"{placed[0]}{theirs}{'_bias' if end == 'bias' else ''}"
            rows = first.shape[1] * len(leaves)
            shape = (first.shape[0], first.shape[2], rows) if end == "weight" else (first.shape[0], rows)
            yield made, Interleaved(made, shape, tuple(found))
