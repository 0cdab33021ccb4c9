"""Describe models that transformers' own layers run: their sizes, and whether they can be cut apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, NotBuiltIn, describe
from .config import ModelConfig
from .gguf_config import ARCHITECTURES
from .hf_positions import context_of
from .hf_seq2seq import eos_tokens

Config = Mapping[str, Any]


def described(config: Config, why: str, built_in: Iterable[str]) -> ModelConfig:
    """Describe any other causal model that transformers knows, by the sizes that all its configs have."""
    if importlib.util.find_spec("transformers") is None:
        raise NotBuiltIn(f"{why}; built in: {', '.join(built_in)}; for other families pip install 'ranvier[hf]'")
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    family = config.get("model_type")
    encoder = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")  # such as bert
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.get("is_encoder_decoder"):
        raise NotBuiltIn(f"{why}, and transformers knows no causal model of that type")
    from transformers import CONFIG_MAPPING

    if family in ROUNDED:
        raise NotBuiltIn(f"{why}, and {family} attends to other tokens with a cache than without")
    if family in DRAFTERS:
        raise NotBuiltIn(
            f"{why}, and {family} is no model by itself: it drafts for another model and needs that model's states"
        )
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))  # adds defaults of missing fields
    except Exception as error:  # the library raises errors of many classes
        raise CheckpointError(f"config: transformers refuses this config: {describe(error)[:300]}") from None
    sizes = text = made.get_text_config()  # the text part of a model that also takes pictures or sound
    uncut = _uncut(made, text)
    if not hasattr(sizes, "hidden_size"):  # several stacks of layers: use the sizes of the largest
        stacks = [getattr(made, name) for name in made.sub_configs]
        sizes = max(stacks, key=lambda stack: _size(stack, "num_hidden_layers", 0), default=sizes)
    hidden, heads = sizes.hidden_size, _size(sizes, "num_attention_heads", 1)
    bos = getattr(text, "bos_token_id", None)
    return ModelConfig(
        family=config["model_type"],
        vocab=text.vocab_size,
        hidden=hidden,
        layers=getattr(sizes, LAYERS_OF_FILE.get(str(family), "num_hidden_layers")),
        heads=heads,
        kv_heads=heads if uncut else _size(sizes, "num_key_value_heads", heads),
        head_dim=_size(sizes, "head_dim", max(1, hidden // heads)),
        intermediate=_size(sizes, "intermediate_size", 4 * hidden),
        context=context_of(
            config["model_type"],
            _size(sizes, "max_position_embeddings", 1 << 20),
            getattr(sizes, "rope_parameters", None) or {},
        ),
        norm_eps=0.0,
        rope_theta=0.0,
        rope_scaling=None,
        tied=bool(getattr(made, "tie_word_embeddings", False)),
        bos_token=bos if isinstance(bos, int) else None,
        eos_tokens=eos_tokens({"eos_token_id": getattr(text, "eos_token_id", None)}),
        native=False,
        uncut=uncut,
        uncached=uncut == WITHOUT_CACHE,
        both_ways=uncut == BOTH_WAYS,
        recomputed_after=_recomputed_after(str(family), getattr(text, "rope_parameters", None) or {}),
    )


def _recomputed_after(family: str, rope: Mapping[str, Any]) -> int:
    before = rope.get("original_max_position_embeddings")
    return before if family in RECOMPUTED and rope.get("rope_type") == "longrope" and isinstance(before, int) else 0


def by_transformers(path: Path, arch: str) -> dict[str, Any]:
    """Return the `config.json` of a GGUF file whose architecture only transformers knows.

    Raises:
        NotBuiltIn: transformers does not know it either, or is not installed.
    """
    known = ", ".join(ARCHITECTURES)
    why = f"{path}: architecture {arch!r} is not built in; built in: {known}"
    if importlib.util.find_spec("transformers") is None:
        raise NotBuiltIn(f"{why}; for some others pip install 'ranvier[hf]'")
    from transformers import AutoConfig

    try:
        made: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except Exception as error:  # the library raises errors of many classes
        raise NotBuiltIn(f"{why}; and transformers cannot read it: {describe(error)[:200]}") from None
    return made


def _size(sizes: Any, name: str, default: int) -> int:
    """Return a size that is only used for display and estimates.

    Return `default` if the size is missing, or if it differs from layer to layer as in some families.
    """
    try:
        found = getattr(sizes, name, None)
    except Exception:  # the library raises errors of many classes
        return default
    return found if isinstance(found, int) and found > 0 else default


def _uncut(made: Any, sizes: Any) -> str:
    """Return why a model's layers cannot be cut apart; empty if they can.

    Reasons: text is only a part of the model's inputs; its layers keep a state other than a KV cache; they differ in their
    sizes, run several times, or take more than what the layer before gives; prompt tokens see each other in both directions.
    """
    kinds = next((k for name in ("layer_types", "layers_block_type") if (k := getattr(sizes, name, None))), None)
    if made.model_type in PROMPTS_BOTH_WAYS:
        return BOTH_WAYS
    if made.model_type in STATES_ELSEWHERE or (kinds is None and not hasattr(sizes, "num_attention_heads")):
        return WITHOUT_CACHE
    odd = sorted({str(kind) for kind in kinds or ()} - ATTENDING)
    if odd:
        return f"layers of the type {', '.join(odd)} keep a state that is no KV cache"
    if made.model_type in LOOPED:
        return "its layers run several times, or keep several KV caches"
    if getattr(sizes, "hidden_size_per_layer_input", 0) or getattr(sizes, "num_kv_shared_layers", 0):
        return "its layers take more than the hidden states of the layer before"
    if sizes is not made:
        return "text is only a part of what it takes"
    return "its layers differ in their sizes" if any(_differs(sizes, name) for name in SIZES) else ""


def _differs(sizes: Any, name: str) -> bool:
    try:
        return not isinstance(getattr(sizes, name, 1), int | None)
    except Exception:  # the library raises errors of many classes
        return True


LAYERS_OF_FILE = {"longcat_flash": "num_layers", "hrm_text": "num_layers_per_stack"}
"""Fields with the number of layers that a file holds, where it is not `num_hidden_layers`."""
LOOPED = ("longcat_flash", "hrm_text", "dory")
"""Families whose layers run several times, or keep several KV caches."""
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


WITHOUT_CACHE = "the library keeps no state per session for it"
STATES_ELSEWHERE = ("recurrent_gemma", "rwkv", "xlstm", "blt", "openai-gpt")
"""Families whose states transformers keeps in the modules or in a list, not in a cache per session."""
BOTH_WAYS = "the tokens of a prompt see each other in both directions"
PROMPTS_BOTH_WAYS = ("cpmant", "xlnet")
RECOMPUTED = ("phi3", "phimoe", "phi4_multimodal")
"""Families whose cache transformers throws away where a text gets longer than the original context of `longrope`."""
ROUNDED = ("reformer",)
"""Families whose tokens attend to others with a cache than without: no chunking gives what one piece gives."""
DRAFTERS = ("gemma4_assistant",)
ATTENDING = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "global",
    "local",
    "dense",
    "sparse",
}
"""Types of layers that keep only keys and values."""
