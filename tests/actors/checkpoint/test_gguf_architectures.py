"""Test GGUF files of every architecture that is read here, written as llama.cpp's converters write them.

Tensors get their names from the gguf package. What the converters do to a tensor beside naming it (`conversion/` of llama.cpp)
is written down here once more: rows of q and k in pairs, norms plus one, transposed matrices, stacked experts.
The oracle is the transformers model that the file was written from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ranvier
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.actors.errors import CheckpointError
from ranvier.transport.format.header import Row

Tensors = Iterator[tuple[str, torch.Tensor]]
SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k from halves of a head to pairs, as `LlamaModel.permute`."""
    rows = tensor.shape[0]
    return tensor.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def turned(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((count for part, count in heads.items() if part in name), 0)
    yield name, in_pairs(tensor, count) if count else tensor


def plus_one(name: str, tensor: torch.Tensor, _: Any) -> Tensors:
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def transposed(name: str, tensor: torch.Tensor, _: Any) -> Tensors:
    yield name, tensor.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


def experts(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    """Split gate and up of stacked experts, of which transformers makes one tensor."""
    begin, _, end = name.partition(".experts.")
    layer = begin.split(".")[2] if end else ""
    if end == "gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        yield f"blk.{layer}.ffn_gate_exps.weight", gate
        yield f"blk.{layer}.ffn_up_exps.weight", up
    elif end == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", tensor
    elif name.endswith("router.weight"):
        yield f"blk.{name.split('.')[2]}.ffn_gate_inp.weight", tensor
    else:
        yield from turned(name, tensor, config) if config.model_type in ("mixtral", "granitemoe") else [(name, tensor)]


def in_turn(name: str, tensor: torch.Tensor, _: Any) -> Tensors:
    """Take gate and up apart, which gpt-oss has in turn, and transpose the experts."""
    end = name.partition(".experts.")[2]
    layer, kind = name.split(".")[2] if ".layers." in name else "", "bias" if name.endswith("_bias") else "weight"
    if end.startswith("gate_up"):
        yield f"blk.{layer}.ffn_gate_exps.{kind}", tensor[..., ::2].transpose(1, -1)
        yield f"blk.{layer}.ffn_up_exps.{kind}", tensor[..., 1::2].transpose(1, -1)
    elif end:
        yield f"blk.{layer}.ffn_down_exps.{kind}", tensor.transpose(1, -1)
    elif name.endswith("sinks"):
        yield f"blk.{layer}.attn_sinks.weight", tensor
    elif ".mlp.router." in name:
        yield f"blk.{layer}.ffn_gate_inp.{kind if '.bias' not in name else 'bias'}", tensor
    else:
        yield name, tensor


def by_head(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    """Stack the norms of heads; the first of them brings all."""
    if "layernorm.norms." not in name:
        yield name, tensor
    elif name.endswith("norms.0.weight"):
        layer, part = name.split(".")[2], "q" if "q_layernorm" in name else "k"
        yield f"blk.{layer}.attn_{part}_norm.weight", config.stacked[name]


Case = tuple[str, str, dict[str, Any], Callable[[str, torch.Tensor, Any], Tensors] | None]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
            "short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [1.0 + n for n in range(8)]}  # fmt: skip
CASES: dict[str, Case] = {
    "llama": ("llama", "llama", {}, turned),
    "llama with biases": ("llama", "llama", {"attention_bias": True, "tie_word_embeddings": True}, turned),
    "llama with yarn": ("llama", "llama", {"rope_parameters": YARN}, turned),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, experts),
    "qwen2": ("qwen2", "qwen2", {}, None),
    "qwen2 with yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}, None),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}, None),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                                           "shared_expert_intermediate_size": 80, "norm_topk_prob": False}, experts),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                                           "norm_topk_prob": True}, experts),
    "gemma": ("gemma", "gemma", {}, plus_one),
    "gemma2": ("gemma2", "gemma2", {"sliding_window": 12, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0,
                                    "final_logit_softcapping": 2.0}, plus_one),
    "gemma3": ("gemma3", "gemma3_text", {"num_hidden_layers": 7, "sliding_window": 12, "query_pre_attn_scalar": 16}, plus_one),
    "phi3": ("phi3", "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, None),
    "phi3 with longrope": ("phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, None),
    "gpt2": ("gpt2", "gpt2", {"n_positions": 128, "n_embd": 64, "n_layer": 4, "n_head": 4}, transposed),
    "granite": ("granite", "granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
                                       "logits_scaling": 2.0}, turned),
    "granitemoe": ("granitemoe", "granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0,
                                                "attention_multiplier": 0.2}, experts),
    "olmo": ("olmo", "olmo", {"clip_qkv": 0.5}, turned),
    "olmo2": ("olmo2", "olmo2", {}, None),
    "olmo3": ("olmo2", "olmo3", {"sliding_window": 12}, None),
    "olmoe": ("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}, experts),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}, None),
    "stablelm": ("stablelm", "stablelm", {"use_qkv_bias": True}, None),
    "stablelm with norms of heads": ("stablelm", "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, by_head),
    "command-r": ("command-r", "cohere", {"logit_scale": 0.3, "use_qk_norm": True}, None),
    "cohere2": ("cohere2", "cohere2", {"logit_scale": 0.3, "sliding_window": 12}, None),
    "smollm3": ("smollm3", "smollm3", {}, turned),
    "gpt-oss": ("gpt-oss", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12,
                                       "rope_parameters": {**YARN, "truncate": False}}, in_turn),
    "nemotron": ("nemotron", "nemotron", {}, plus_one),  # by the reader of transformers
}  # fmt: skip
"""By name: architecture, family of transformers, what its config has beside `SMALL`, what the converter does to tensors."""


def oracle_of(family: str, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {} if family == "gpt2" else SMALL
    config = AutoConfig.for_model(family, **{**sizes, "vocab_size": 96, "initializer_range": 0.2, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def metadata(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    """Write the metadata that llama.cpp's converter of the architecture writes."""

    def of(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    rope = dict(of("rope_parameters") or {})
    near = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    writer.add_block_count(of("num_hidden_layers"))
    writer.add_context_length(of("max_position_embeddings"))
    writer.add_embedding_length(of("hidden_size"))
    writer.add_feed_forward_length(of("intermediate_size") or 4 * config.hidden_size)
    writer.add_head_count(of("num_attention_heads"))
    if of("num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if epsilon := of("rms_norm_eps"):
        writer.add_layer_norm_rms_eps(epsilon)
    if epsilon := of("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") or (1e-5 if arch == "olmo" else None):
        writer.add_layer_norm_eps(epsilon)
    if of("head_dim") and arch not in ("phi3", "stablelm", "command-r", "cohere2", "olmo", "granite", "granitemoe"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope_keys(writer, rope, config, near)
    for add, names in (
        (writer.add_attn_logit_softcapping, ("attn_logit_softcapping",)), (writer.add_embedding_scale, ("embedding_multiplier",)),
        (writer.add_final_logit_softcapping, ("final_logit_softcapping",)), (writer.add_residual_scale, ("residual_multiplier",)),
        (writer.add_attention_scale, ("attention_multiplier",)), (writer.add_logit_scale, ("logits_scaling", "logit_scale")),
        (writer.add_clamp_kqv, ("clip_qkv",)), (writer.add_expert_count, ("num_local_experts", "num_experts")),
        (writer.add_expert_used_count, ("num_experts_per_tok",)), (writer.add_expert_feed_forward_length, ("moe_intermediate_size",)),
        (writer.add_expert_shared_feed_forward_length, ("shared_expert_intermediate_size",)),
    ):  # fmt: skip
        if of(*names) is not None:
            add(of(*names))
    own_keys(writer, arch, config)


def own_keys(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    """Write what only one or two families have."""
    if getattr(config, "sliding_window", None) and (
        arch.startswith("gemma") or config.model_type in ("olmo3", "cohere2", "gpt_oss")
    ):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "nemotron":
        writer.add_layer_norm_rms_eps(config.norm_eps)  # its converter writes both
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_rope_dimension_count(int(0.5 * 16))
        writer.add_vocab_size(config.vocab_size)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def rope_keys(writer: gguf.GGUFWriter, rope: dict[str, Any], config: Any, near: Any) -> None:
    if not rope or getattr(config, "model_type", "") == "stablelm":
        if config.model_type == "stablelm":
            writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 0.25) * 16))
        return
    writer.add_rope_freq_base(rope["rope_theta"])
    if near:
        writer.add_rope_freq_base_swa(near["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * 16))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        before = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / before
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(before)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def write(path: Path, name: str, oracle: Any, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """Write a model as GGUF; if `kind`, with matrices of whole blocks quantised, which also changes the model's weights."""
    arch, family, _, change = CASES[name]
    config = oracle.config
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch, config)
    number = next(number for number, named in gguf.MODEL_ARCH_NAMES.items() if named == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    state = oracle.state_dict()
    if family == "stablelm":
        config.stacked = {
            each: torch.stack([state[each.replace(".0.weight", f".{head}.weight")] for head in range(count)])
            for each in state
            if each.endswith("norms.0.weight")
            for count in [4 if "q_layernorm" in each else 2]
        }
    for hf_name, tensor in state.items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for changed, made in (change or (lambda n, t, _: [(n, t)]))(hf_name, tensor, config):
            stem, _, end = changed.rpartition(".")
            known = changed if changed.startswith("blk.") else f"{names.get_name(stem)}.{end}"
            array = made.contiguous().numpy()
            if kind is not None and array.ndim > 1 and array.shape[-1] % 32 == 0:
                writer.add_tensor(known, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(known, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scores(path: Path, tokens: torch.Tensor, cut: bool) -> torch.Tensor:
    """Return the log-probabilities of the tokens after the first, in this process: in one actor, or in two."""
    checkpoint = open_checkpoint(path)
    last = checkpoint.config.layers - 1
    plan = [("first_stage", (0, 1)), ("last_stage", (2, last))] if cut else [("model", (0, last))]
    info = ranvier.SessionInfo(session=1, epoch=1, capacity=128, log=tuple(tokens.tolist()), max_tokens=1, score=True)
    value, port = tokens, "token"
    for name, layers in plan:
        kind = BUILT_IN[name]
        implementation = kind.implementation if checkpoint.config.runs(blocks=True) else kind.foreign
        assert implementation is not None
        actor = load_class(implementation, None)()
        actor.load(Context("test", {}, lambda _: None, checkpoint, "float32", layers, 256))
        actor.open(info)
        made = actor.step(Batch((Row(1, 1, 0, len(tokens)),), {port: value}))
        value, port = made.get("hidden"), "hidden"
    return torch.as_tensor(made["scores"]["scores"])


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_an_architecture_gives_the_scores_of_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    """Give transformers' log-probabilities, in one actor and cut in two, past every window."""
    _, family, changes, _ = CASES[name]
    oracle = oracle_of(family, changes)
    path = write(tmp_path / "model.gguf", name, oracle)
    tokens = torch.tensor([(7 * n * n + 5 * n) % 93 + 3 for n in range(40)])
    expected = oracle(tokens[None]).logits[0].log_softmax(-1)[range(39), tokens[1:]]
    assert open_checkpoint(path).config.family == family
    for cut in (False, True):
        assert (scores(path, tokens, cut) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "granitemoe", "phi3"])
@torch.inference_mode()
def test_quantised_blocks_of_an_architecture(name: str, tmp_path: Path) -> None:
    """Read blocks of Q8_0 in the places where the architecture puts them: the file of plain numbers gives the same scores."""
    _, family, changes, _ = CASES[name]
    tokens = torch.tensor([(7 * n * n + 5 * n) % 93 + 3 for n in range(20)])
    oracle = oracle_of(family, changes)
    blocks = write(tmp_path / "blocks.gguf", name, oracle, gguf.GGMLQuantizationType.Q8_0)
    reader = gguf.GGUFReader(blocks)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q8_0", "F32"}
    # the same numbers, written as float32
    plain = gguf.GGUFWriter(tmp_path / "plain.gguf", CASES[name][0])
    metadata(plain, CASES[name][0], oracle.config)
    for tensor in reader.tensors:
        plain.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    plain.write_header_to_file()
    plain.write_kv_data_to_file()
    plain.write_tensors_to_file()
    plain.close()
    assert torch.equal(scores(blocks, tokens, False), scores(tmp_path / "plain.gguf", tokens, False))


def edited(path: Path, arch: str, keys: dict[str, Any], *, leave_out: str = "") -> Path:
    """Copy a file's tensors, with other metadata."""
    oracle = oracle_of("llama", {})
    name = "llama"
    original = write(path.with_name("original.gguf"), name, oracle)
    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(path, arch)
    for key, field in reader.fields.items():
        if key.startswith("llama.") and key != leave_out and key not in keys:
            value = field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
                key.replace("llama.", f"{arch}."), value
            )
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("keys", "leave_out", "words"),
    [
        ({"llama.attention.head_count": [4, 4, 4, 8]}, "", "llama.attention.head_count: expected the same value for all layers"),
        ({"llama.attention.head_count": 0}, "", "llama.attention.head_count: expected a positive integer, got 0"),
        ({}, "llama.block_count", "expected the metadata 'llama.block_count', which is missing"),
        ({"llama.rope.scaling.type": "spiral"}, "", "rope scaling 'spiral' is not built in; built in: none, linear, yarn"),
        ({"llama.rope.scaling.type": "yarn"}, "", "expected llama.rope.scaling.factor as a number over 0, got None"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -4.0}, "", "rope.scaling.factor as a number over 0"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.yarn_ext_factor": 0.5}, "",
         "llama.rope.scaling.yarn_ext_factor: expected 1, got 0.5"),
        ({"llama.expert_count": 4}, "", "expected the metadata 'llama.expert_used_count', which is missing"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be(keys: dict[str, Any], leave_out: str, words: str, tmp_path: Path) -> None:
    """Name the file and the field."""
    path = edited(tmp_path / "model.gguf", "llama", keys, leave_out=leave_out)
    with pytest.raises(CheckpointError, match="model.gguf: .*") as caught:
        open_checkpoint(path)
    assert words in str(caught.value)


def test_equal_values_for_all_layers_are_one_value(tmp_path: Path) -> None:
    """Read an array where a number is usual, if all its numbers are equal."""
    path = edited(tmp_path / "model.gguf", "llama", {"llama.attention.head_count_kv": [2, 2, 2, 2]})
    assert open_checkpoint(path).config.kv_heads == 2


def test_an_architecture_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """List the architectures that are built in."""
    path = edited(tmp_path / "model.gguf", "nobodys", {})
    with pytest.raises(CheckpointError, match="architecture 'nobodys' is not built in; built in: llama, qwen2"):
        open_checkpoint(path)


def test_a_padded_vocabulary_has_the_rows_of_the_embedding(tmp_path: Path) -> None:
    """Take the vocabulary from the embedding: metadata may count fewer tokens."""
    path = edited(tmp_path / "model.gguf", "llama", {"llama.vocab_size": 90})
    assert open_checkpoint(path).config.vocab == 96


@torch.inference_mode()
def test_q_k_and_v_in_one_tensor(tmp_path: Path) -> None:
    """Take apart q, k and v that a converter has left in one tensor."""
    oracle = oracle_of("llama", {})
    reader = gguf.GGUFReader(write(tmp_path / "apart.gguf", "llama", oracle))
    writer = gguf.GGUFWriter(tmp_path / "joined.gguf", "llama")
    metadata(writer, "llama", oracle.config)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for layer in range(4):
        parts = [tensors.pop(f"blk.{layer}.attn_{part}.weight") for part in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = torch.arange(5, 25)
    assert torch.equal(scores(tmp_path / "apart.gguf", tokens, False), scores(tmp_path / "joined.gguf", tokens, True))


@pytest.mark.parametrize("form", ["relu", "gated-gelu"])
def test_t5_is_the_model_that_it_was_written_from(form: str, tmp_path: Path) -> None:
    """Read config and tensors of an encoder–decoder model as from its own folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=80, num_layers=3, num_decoder_layers=2, num_heads=4, feed_forward_proj=form,
        decoder_start_token_id=0, relative_attention_num_buckets=8, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    oracle = T5ForConditionalGeneration(config)
    oracle.save_pretrained(tmp_path / "folder")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "t5")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(80)
    writer.add_block_count(3)
    writer.add_decoder_block_count(2)
    writer.add_head_count(4)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(8)
    writer.add_decoder_start_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 3)
    state = oracle.state_dict()
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        if name == "shared.weight" or ("embed_tokens" not in name and name != "lm_head.weight"):
            writer.add_tensor(f"{names.get_name(stem)}.{end}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made, original = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tmp_path / "folder")
    assert made.config == original.config
    for name in original.tensors:
        read = torch.empty_like(state[name])
        made.read_into(name, read)
        assert torch.equal(read, state[name]), name


@torch.inference_mode()
def test_scales_of_whole_tensors_multiply_them(tmp_path: Path) -> None:
    """Multiply a matrix by the scale beside it, and each expert of a stack by its own, as llama.cpp does for NVFP4."""
    oracle = oracle_of("mixtral", CASES["mixtral"][2])
    reader = gguf.GGUFReader(write(tmp_path / "plain.gguf", "mixtral", oracle))
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    metadata(writer, "llama", oracle.config)
    scales = {"blk.1.attn_q": [0.5], "blk.0.ffn_down_exps": [1.0, 2.0, 0.25, 3.0], "blk.2.attn_output": [1.5]}
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, factors in scales.items():
        writer.add_tensor(f"{name}.scale", np.array(factors, np.float32))
        writer.add_tensor(
            f"{name}.input_scale", np.array([7.0], np.float32)
        )  # of activations, which are not quantised here
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layers = oracle.model.layers
    layers[1].self_attn.q_proj.weight.mul_(0.5)
    layers[2].self_attn.o_proj.weight.mul_(1.5)
    layers[0].mlp.experts.down_proj.mul_(torch.tensor(scales["blk.0.ffn_down_exps"])[:, None, None])
    tokens = torch.arange(5, 45)
    expected = oracle(tokens[None]).logits[0].log_softmax(-1)[range(39), tokens[1:]]
    assert (scores(tmp_path / "scaled.gguf", tokens, True) - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.embedding_length": "wide"}, "llama.embedding_length: expected a positive integer, got 'wide'"),
        ({"llama.block_count": 1 << 30}, "num_hidden_layers: expected a whole number from 1 to 4096"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps: expected a number over 0"), ({"llama.context_length": [1, 2]}, "the same value for all layers"),
        ({"llama.rope.freq_base": "high"}, "model.gguf: "), ({"tokenizer.ggml.bos_token_id": "first"}, "model.gguf: "),
        ({"llama.attention.head_count": 3}, "model.gguf: "), ({"llama.attention.key_length": 0}, None),
    ],
)  # fmt: skip
def test_values_of_other_types(keys: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    """Raise no other error than that of a checkpoint, and name the file; a zero counts as missing."""
    path = edited(tmp_path / "model.gguf", "llama", keys)
    if words is None:
        assert open_checkpoint(path).config.head_dim == 16
        return
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert words in str(caught.value)
    assert "model.gguf" in str(caught.value)


def test_divisors_of_frequencies_that_do_not_fit_a_head(tmp_path: Path) -> None:
    """Refuse another number of divisors than a head has frequencies."""
    oracle = oracle_of("llama", {})
    reader = gguf.GGUFReader(write(tmp_path / "good.gguf", "llama", oracle))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    metadata(writer, "llama", oracle.config)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match="model.gguf: config: rope: expected 8 factors, half the width of a head, got 5"
    ):
        open_checkpoint(tmp_path / "model.gguf")
