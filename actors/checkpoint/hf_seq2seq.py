"""Convert a transformers `config.json` of an encoder–decoder model to a `ModelConfig`: T5's and BART's families.

The families related to BART (marian, pegasus, mbart) differ in where their norms are and how positions are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .config import Activation, ModelConfig, Positions, Seq2Seq

Config = Mapping[str, Any]
UNBOUNDED_CONTEXT = 1 << 20
"""Context of models with relative positions: the positions have no limit, only the KV cache has."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def _t5(config: Config) -> ModelConfig:
    form = config.get("feed_forward_proj", "relu").split("-")
    # "gated-gelu" always means the approximation by tanh
    activation = "gelu_new" if form == ["gated", "gelu"] else form[-1]
    scaled = config["model_type"] == "t5" and config.get(
        "scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False
    )
    hidden, heads = config["d_model"], config["num_heads"]
    return ModelConfig(
        family=config["model_type"],
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=config.get("num_decoder_layers") or config["num_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["d_kv"],
        intermediate=config["d_ff"],
        context=UNBOUNDED_CONTEXT,
        norm_eps=float(config.get("layer_norm_epsilon", 1e-6)),
        rope_theta=0.0,
        rope_scaling=None,
        tied=True,
        bos_token=None,
        eos_tokens=eos_tokens(config),
        activation=_activation(activation),
        gated=form[0] == "gated",
        attention_scale=1.0,
        encoder=Seq2Seq(
            layers=config["num_layers"],
            heads=heads,
            intermediate=config["d_ff"],
            source_vocab=config["vocab_size"],
            start_token=_start(config),
            suppressed=_suppressed(config),
            norms_first=True,
            final_norm=True,
            positions="relative",
            buckets=config.get("relative_attention_num_buckets", 32),
            distance=config.get("relative_attention_max_distance", 128),
            head_scale=hidden**-0.5 if scaled else 1.0,
        ),
    )


def _bart(
    config: Config, positions: str = "learned", *, norms_first: bool = False, embedding_norm: bool = True
) -> ModelConfig:
    hidden, heads = config["d_model"], config["decoder_attention_heads"]
    return ModelConfig(
        family=config["model_type"],
        vocab=config.get("decoder_vocab_size") or config["vocab_size"],
        hidden=hidden,
        layers=config["decoder_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=config["decoder_ffn_dim"],
        context=config["max_position_embeddings"],
        norm_eps=1e-5,
        rope_theta=0.0,
        rope_scaling=None,
        tied=True,
        bos_token=config.get("bos_token_id"),
        eos_tokens=eos_tokens(config),
        norm="layer",
        activation=_activation(config.get("activation_function", "gelu")),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embedding_scale=float(hidden) ** 0.5 if config.get("scale_embedding") else 1.0,
        encoder=Seq2Seq(
            layers=config["encoder_layers"],
            heads=config["encoder_attention_heads"],
            intermediate=config["encoder_ffn_dim"],
            source_vocab=config["vocab_size"],
            start_token=_start(config),
            suppressed=_suppressed(config),
            first_token=config.get("forced_bos_token_id"),
            norms_first=norms_first,
            final_norm=norms_first,
            positions=cast(Positions, positions),
            embedding_norm=embedding_norm,
            logits_bias=True,
        ),
    )


def _marian(config: Config) -> ModelConfig:
    return _bart(config, "sinusoidal", embedding_norm=False)


def _pegasus(config: Config) -> ModelConfig:
    return _bart(config, "sinusoidal", norms_first=True, embedding_norm=False)


def _mbart(config: Config) -> ModelConfig:
    return _bart(config, norms_first=True)


FAMILIES: Mapping[str, Callable[[Config], ModelConfig]] = {
    "t5": _t5, "mt5": _t5, "marian": _marian, "bart": _bart, "pegasus": _pegasus, "mbart": _mbart,
    "mvp": _bart, "plbart": _bart,
}  # fmt: skip


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not built in; built in: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def eos_tokens(config: Config) -> tuple[int, ...]:
    """Return the tokens that end a text: one, several or none."""
    eos = config.get("eos_token_id")
    given = eos if isinstance(eos, list) else [eos]
    return tuple(token for token in given if token is not None and not (isinstance(token, int) and token < 0))


def _start(config: Config) -> int:
    """Return the token that begins every answer."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(config.get(name), int):
            return int(config[name])
    raise KeyError("decoder_start_token_id")


def _suppressed(config: Config) -> tuple[int, ...]:
    """Return the tokens that are never chosen, such as marian's padding: the `bad_words_ids` of one token."""
    return tuple(word[0] for word in config.get("bad_words_ids") or () if len(word) == 1)
