"""Write the `config.json` of transformers that the metadata of a GGUF file describes.

From there a GGUF model is like any other: families that are built in run by this package's own blocks, the others by
transformers' layers. What a file does not say has llama.cpp's value for its architecture (`src/models/`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import MOST_COUNT, number, whole
from .gguf_file import GGUFTensor
from .gguf_names import LAYOUTS, Layout
from .gguf_tokens import ends_of_text, numbered
from .tensors import TensorEntry

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Described:
    """Hold the metadata of a GGUF model, and its tensors by their names, each with its file."""

    path: Path
    arch: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, GGUFTensor]]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value of the architecture's metadata, or `default`. If it is one for each layer, they must be equal.

        Raises:
            CheckpointError: the layers differ.
        """
        value = self.fields.get(f"{self.arch}.{name}")
        if isinstance(value, list):
            if not value or any(each != value[0] for each in value):
                raise CheckpointError(
                    f"{self.path}: {self.arch}.{name}: expected the same value for all layers, got {value!r:.80}"
                )
            value = value[0]
        if isinstance(value, float):
            value = _shortest(value)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Return a value of the architecture's metadata.

        Raises:
            CheckpointError: it is missing.
        """
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.path}: expected the metadata '{self.arch}.{name}', which is missing")
        return value

    def size(self, name: str) -> int:
        """Return a positive whole number of the architecture's metadata.

        Raises:
            CheckpointError: it is missing, or is something else.
        """
        value = self.need(name)
        if not whole(value, 1, MOST_COUNT):
            raise CheckpointError(f"{self.path}: {self.arch}.{name}: expected a positive integer, got {value!r:.40}")
        return int(value)

    def has(self, ending: str) -> bool:
        """Return whether some layer has a tensor with this ending of its name."""
        return any(name.endswith(f".{ending}") for name in self.tensors)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.tensors

    def vocabulary(self) -> int:
        """Return the rows of the embedding: more than there are tokens, where these are padded."""
        _, embedding = self.tensors.get("token_embd.weight", (None, None))
        if embedding is not None and len(embedding.shape) == 2:
            return embedding.shape[0]
        tokens = self.fields.get("tokenizer.ggml.tokens")
        return int(self.get("vocab_size") or (len(tokens) if isinstance(tokens, list) else 0))

    def factors(self, name: str) -> list[float]:
        """Return a vector of divisors of rotary frequencies; empty if the file has none.

        Raises:
            CheckpointError: it is no vector of float32, or a number is not over 0.
        """
        path, found = self.tensors.get(f"{name}.weight", (None, None))
        if path is None or found is None:
            return []
        if found.type != "F32" or len(found.shape) != 1:
            raise CheckpointError(f"{path}: tensor {name}.weight: expected float32[n], got {found.type}{found.shape}")
        entry = TensorEntry(f"{name}.weight", path, "float32", found.shape, found.offset, found.nbytes)
        data = entry.read()
        factors = struct.unpack(f"<{found.shape[0]}f", data)
        if not all(0 < factor < math.inf for factor in factors):
            raise CheckpointError(f"{path}: tensor {name}.weight: expected numbers over 0, got {min(factors)}")
        return list(factors)


def _shortest(value: float) -> float:
    """Return the number with the fewest digits that float32 rounds to `value`: 0.1, where the file has 0.10000000149."""
    if not math.isfinite(value) or abs(value) > MOST_FLOAT:
        return value
    same = (short for digits in range(6, 10) if _float32(short := float(f"{value:.{digits}g}")) == _float32(value))
    return next(same, value)


MOST_FLOAT = 3e38
"""About the largest number of float32."""


def _float32(value: float) -> bytes:
    return struct.pack("<f", value)


def to_hf(file: Described) -> tuple[Config, Layout] | None:
    """Return the `config.json` of a model and the layout of its tensors; None if the architecture is not known here.

    Raises:
        CheckpointError: a field is missing or invalid.
    """
    made = ARCHITECTURES.get(file.arch)
    if made is None:
        return None
    try:
        config = {**_tokens(file), **made(file)}
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    layout = config.pop("layout", file.arch)
    return config, LAYOUTS[layout]


def _tokens(file: Described) -> Config:
    """Return the vocabulary, and the special tokens that generation uses."""
    return {
        "bos_token_id": numbered(file.fields, "tokenizer.ggml.bos_token_id", str(file.path)),
        "eos_token_id": list(ends_of_text(file.fields, str(file.path))),
        "pad_token_id": numbered(file.fields, "tokenizer.ggml.padding_token_id", str(file.path)),
        "vocab_size": file.vocabulary(),
        "tie_word_embeddings": "output.weight" not in file,
    }


def _sizes(file: Described) -> Config:
    """Return the sizes that most architectures have."""
    heads, hidden = file.size("attention.head_count"), file.size("embedding_length")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv") or heads,
        "head_dim": file.get("attention.key_length") or hidden // heads,
        "max_position_embeddings": file.size("context_length"),
    }


def _llama(file: Described, model_type: str = "", **more: Any) -> Config:
    """Convert the fields that llama and similar models share."""
    made = {
        "model_type": model_type or file.arch,
        **_sizes(file),
        "intermediate_size": file.size("feed_forward_length"),
        "rms_norm_eps": float(file.need("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file and "blk.0.attn_output.bias" in file,
        "mlp_bias": "blk.0.ffn_down.bias" in file,
    }
    made["rope_parameters"] = _rope(file, made)
    return {**made, **more}


def _rope(file: Described, sizes: Mapping[str, Any], theta: str = "rope.freq_base") -> Config:
    """Return the rotary base and how the frequencies are scaled."""
    made: Config = {"rope_theta": float(file.get(theta, 10_000.0))}
    turned = file.get("rope.dimension_count")
    if turned is not None and turned != sizes["head_dim"]:
        made["partial_rotary_factor"] = turned / sizes["head_dim"]
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear")  # older files have the second name
    kind = file.get("rope.scaling.type", "linear" if factor else "none")
    before = file.get("rope.scaling.original_context_length") or sizes["max_position_embeddings"]
    one = file.factors("rope_freqs")
    short, long = file.factors("rope_factors_short"), file.factors("rope_factors_long")
    if one or (short and long):
        scaled = {
            "rope_type": "longrope", "short_factor": short or one, "long_factor": long or one,
            "attention_factor": float(file.get("rope.scaling.attn_factor", 1.0)),
            "original_max_position_embeddings": before,
        }  # fmt: skip
    elif kind in ("none", "longrope"):
        scaled = {"rope_type": "default"}
    elif kind == "linear":
        scaled = {"rope_type": "linear", "factor": _factor(file, factor)}
    elif kind == "yarn":
        scaled = {
            "rope_type": "yarn", "factor": _factor(file, factor), "original_max_position_embeddings": before,
            **_yarn(file, _factor(file, factor)),
        }  # fmt: skip
    else:
        raise CheckpointError(
            f"{file.path}: rope scaling {kind!r} is not built in; built in: none, linear, yarn, longrope"
        )
    return {**made, **scaled}


def _factor(file: Described, factor: Any) -> float:
    if not number(factor, 0.0, 1e6):
        raise CheckpointError(
            f"{file.path}: expected {file.arch}.rope.scaling.factor as a number over 0, got {factor!r}"
        )
    return float(factor)


def _yarn(file: Described, factor: float) -> Config:
    """Return the fields of yarn (Peng et al. 2023) that a file may set."""
    made = {
        name: float(file.get(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if file.get(f"rope.scaling.yarn_{name}") is not None
    }
    if file.get("rope.scaling.yarn_log_multiplier"):
        made |= {"mscale": 1.0, "mscale_all_dim": float(file.get("rope.scaling.yarn_log_multiplier"))}
    if file.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise CheckpointError(
            f"{file.path}: {file.arch}.rope.scaling.yarn_ext_factor: expected 1, got "
            f"{file.get('rope.scaling.yarn_ext_factor')!r:.40}"
        )
    # the first is transformers' attention_factor; the second multiplies what the method gives
    whole_factor, more = file.get("rope.scaling.yarn_attn_factor"), file.get("rope.scaling.attn_factor")
    if whole_factor is not None or more is not None:
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        made["attention_factor"] = float(usual if whole_factor is None else whole_factor) * float(more or 1.0)
    return made


def _plain_llama(file: Described) -> Config:
    experts = file.get("expert_count")
    if not experts:
        return _llama(file)
    return _llama(file, "mixtral", layout="llama with experts", sliding_window=None, num_local_experts=experts,
                  num_experts_per_tok=file.size("expert_used_count"))  # fmt: skip


def _qwen(file: Described) -> Config:
    return _llama(file, use_sliding_window=False)


def _qwen_moe(file: Described) -> Config:
    third = file.arch == "qwen3moe"
    used = file.size("expert_used_count")
    more: Config = {
        "num_experts": file.size("expert_count"),
        "num_experts_per_tok": used,
        # where a file gives no width for one expert, it is this
        "moe_intermediate_size": file.get("expert_feed_forward_length") or file.size("feed_forward_length") // used,
        "norm_topk_prob": third,
        "use_sliding_window": False,
    }
    if not third:
        more["shared_expert_intermediate_size"] = file.get(
            "expert_shared_feed_forward_length", file.size("feed_forward_length")
        )
        more["qkv_bias"] = file.has("attn_q.bias")
    if "blk.0.ffn_gate_inp.weight" in file and file.get("feed_forward_length") is None:
        more["intermediate_size"] = more["moe_intermediate_size"]
    return _llama(file, "qwen3_moe" if third else "qwen2_moe", **more)


def _gemma(file: Described, largest: int = 0, **more: Any) -> Config:
    """Convert gemma's fields. Only the model of `largest` layers scales attention by another width than that of a head."""
    sizes = _sizes(file)
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    return _llama(
        file,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=width if sizes["num_hidden_layers"] == largest else sizes["head_dim"],
        final_logit_softcapping=file.get("final_logit_softcapping"),
        **more,
    )


def _gemma2(file: Described) -> Config:
    return _gemma(
        file, 46, attn_logit_softcapping=file.get("attn_logit_softcapping", 50.0),
        sliding_window=file.get("attention.sliding_window", 4096), layer_types=_types(file, 2),
    ) | {"final_logit_softcapping": file.get("final_logit_softcapping", 30.0)}  # fmt: skip


def _gemma3(file: Described) -> Config:
    window = file.get("attention.sliding_window") or 0
    made = _gemma(
        file, 62, model_type="gemma3_text", sliding_window=window or MOST_COUNT,
        layer_types=_types(file, 6) if window else ["full_attention"] * file.size("block_count"),
    )  # fmt: skip
    far = {**made["rope_parameters"], "rope_theta": float(file.get("rope.freq_base", 1e6))}
    near = {"rope_type": "default", "rope_theta": float(file.get("rope.freq_base_swa", 10_000.0))}
    return made | {"rope_parameters": {"full_attention": far, "sliding_attention": near}}


def _types(file: Described, period: int) -> list[str]:
    """Return the types of layers: as the file has them, or with every `period`-th layer seeing all positions."""
    layers = file.size("block_count")
    pattern = file.fields.get(f"{file.arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        slides = [bool(each) for each in pattern]
    else:
        every = int(pattern) if pattern is not None and whole(pattern, 1, MOST_COUNT) else period
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _phi3(file: Described) -> Config:
    made = _llama(file, sliding_window=file.get("attention.sliding_window") or None)
    before = file.get("rope.scaling.original_context_length") or made["max_position_embeddings"]
    tokens = dict.fromkeys(("bos_token_id", "pad_token_id"))  # the class has numbers of its own vocabulary
    return {**made, **tokens, "original_max_position_embeddings": before}


def _gpt2(file: Described) -> Config:
    return {
        "model_type": "gpt2", "n_embd": file.size("embedding_length"), "n_layer": file.size("block_count"),
        "n_head": file.size("attention.head_count"), "n_inner": file.get("feed_forward_length"),
        "n_positions": file.size("context_length"),
        "layer_norm_epsilon": float(file.need("attention.layer_norm_epsilon")), "activation_function": "gelu_new",
    }  # fmt: skip


def _granite(file: Described) -> Config:
    made = _llama(
        file,
        embedding_multiplier=float(file.get("embedding_scale", 1.0)),
        residual_multiplier=float(file.get("residual_scale", 1.0)),
        logits_scaling=float(file.get("logit_scale", 1.0)),
    )
    scale = file.get("attention.scale")
    made["attention_multiplier"] = float(scale) if scale else made["head_dim"] ** -0.5
    if file.arch == "granitemoe":
        made |= {
            "num_local_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count"),
        }  # fmt: skip
    return made


def _gpt_oss(file: Described) -> Config:
    made = _llama(
        file, "gpt_oss", num_local_experts=file.size("expert_count"), num_experts_per_tok=file.size("expert_used_count"),
        sliding_window=file.size("attention.sliding_window"), layer_types=_types(file, 2), attention_bias=True,
        intermediate_size=file.get("expert_feed_forward_length") or file.size("feed_forward_length"),
    )  # fmt: skip
    if made["rope_parameters"]["rope_type"] == "yarn":
        made["rope_parameters"]["truncate"] = False  # as in all published models; no metadata says so
    return made


def _olmo(file: Described) -> Config:
    return {**_layer_normed(file), "clip_qkv": file.get("attention.clamp_kqv")}


def _olmo2(file: Described) -> Config:
    window = file.get("attention.sliding_window") or 0
    if not window:
        return _llama(file)
    return _llama(file, "olmo3", sliding_window=window, layer_types=_types(file, 4))


def _olmoe(file: Described) -> Config:
    return _llama(
        file, num_experts=file.size("expert_count"), num_experts_per_tok=file.size("expert_used_count"), norm_topk_prob=False
    )  # fmt: skip


def _layer_normed(file: Described, model_type: str = "", **more: Any) -> Config:
    """Convert the fields of models with layer norms, under the names that transformers' classes give their epsilon."""
    epsilon = float(file.need("attention.layer_norm_epsilon"))
    made = {
        "model_type": model_type or file.arch,
        **_sizes(file),
        "intermediate_size": file.size("feed_forward_length"),
        "layer_norm_eps": epsilon,
        "norm_epsilon": epsilon,
        "attention_bias": "blk.0.attn_q.bias" in file,
    }
    made["rope_parameters"] = _rope(file, made)
    return {**made, **more}


def _starcoder2(file: Described) -> Config:
    return _layer_normed(file, use_bias=file.has("attn_q.bias"), sliding_window=None)


def _stablelm(file: Described) -> Config:
    return _layer_normed(
        file, use_qkv_bias=file.has("attn_q.bias"), qk_layernorm=file.has("attn_q_norm.weight"),
        use_parallel_residual=not file.has("ffn_norm.weight"),
    )  # fmt: skip


def _cohere(file: Described) -> Config:
    made = _layer_normed(
        file, "cohere2" if file.arch == "cohere2" else "cohere", logit_scale=float(file.need("logit_scale"))
    )
    if file.arch == "cohere2":
        made |= {"sliding_window": file.size("attention.sliding_window"), "layer_types": _types(file, 4)}
        made["rope_parameters"].pop("partial_rotary_factor", None)
    else:
        made["use_qk_norm"] = file.has("attn_q_norm.weight")
    return made


def _t5(file: Described) -> Config:
    if "enc.blk.1.attn_rel_b.weight" in file:  # each layer has relative positions of its own
        return {"model_type": "umt5", "is_encoder_decoder": True}
    gated = "enc.blk.0.ffn_gate.weight" in file
    start = file.get("decoder_start_token_id")
    return {
        "model_type": "t5", "is_encoder_decoder": True, "d_model": file.size("embedding_length"),
        "d_kv": file.size("attention.key_length"), "d_ff": file.size("feed_forward_length"),
        "num_layers": file.size("block_count"),
        "num_decoder_layers": file.get("decoder_block_count") or file.size("block_count"),
        "num_heads": file.size("attention.head_count"),
        "layer_norm_epsilon": float(file.need("attention.layer_norm_epsilon")),
        "relative_attention_num_buckets": file.size("attention.relative_buckets_count"),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "decoder_start_token_id": 0 if start is None else start,
        "layout": "t5 with gates" if gated else "t5",
    }  # fmt: skip


ARCHITECTURES: Mapping[str, Callable[[Described], Config]] = {
    "llama": _plain_llama, "qwen2": _qwen, "qwen3": _qwen, "qwen2moe": _qwen_moe, "qwen3moe": _qwen_moe,
    "gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3, "gpt2": _gpt2,
    "granite": _granite, "granitemoe": _granite, "gpt-oss": _gpt_oss, "olmo": _olmo, "olmo2": _olmo2, "olmoe": _olmoe,
    "starcoder2": _starcoder2, "stablelm": _stablelm, "command-r": _cohere, "cohere2": _cohere, "smollm3": _llama,
    "t5": _t5,
}  # fmt: skip
"""Architectures of GGUF that are read here; mistral's files say llama, too."""
