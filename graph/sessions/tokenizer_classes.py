"""Rebuild a tokenizer as its class in transformers does, which takes only vocabulary and merges from `tokenizer.json`.

Four classes of byte-level and SentencePiece-like BPE bring their own normalizer, pre-tokenizer and decoder, and their own
special tokens. Other classes that do are left to transformers, where it is installed. Which class counts follows from
`tokenizer_class` and `model_type` by the rules of `AutoTokenizer` (transformers 5.24; a test compares the results).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from .pre_tokenizers import SPLITS

GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
AS_IT_IS = (
    "mistral", "mistral3", "ministral", "ministral3", "mixtral", "pixtral", "voxtral", "phi3", "phimoe", "olmo2", "olmo3",
    "granite", "granitemoe", "stablelm", "nemotron", "jamba", "arctic", "internlm2", "internlm3", "minicpm3", "glm",
    "glm4", "glm4_moe", "gpt_bigcode", "persimmon", "llava", "llava_next", "minimax_m2", "ernie4_5", "ernie4_5_moe",
)  # fmt: skip
"""Types of models whose `tokenizer.json` is taken as it is, whatever class they name: transformers distrusts the class."""
_BY_TYPE = {
    "Qwen2Tokenizer": (
        "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe",
    ),
    "GPT2Tokenizer": ("gpt2", "gpt_neo", "gptj", "codegen", "dbrx", "jais2", "opt", "phi", "starcoder2"),
    "GemmaTokenizer": ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma", "t5gemma"),
}  # fmt: skip
OF_TYPE = {kind: name for name, kinds in _BY_TYPE.items() for kind in kinds}
"""The class of a type of models, for checkpoints that name none."""
NEVER_TRUSTED = ("qwen2",)
"""Types for which the class of the type counts, whatever class a checkpoint names."""
_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Class:
    """Describe a class: the special tokens that it adds by default, and the settings of its BPE."""

    tokens: Mapping[str, str]
    bpe: Mapping[str, Any] = field(default_factory=dict)


CLASSES = {
    "LlamaTokenizer": Class(
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {"fuse_unk": True, "byte_fallback": True}
    ),
    "GPT2Tokenizer": Class({"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    "Qwen2Tokenizer": Class({"eos_token": _END, "unk_token": _END, "pad_token": _END}),
    "GemmaTokenizer": Class(
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
        {"fuse_unk": True, "byte_fallback": True},
    ),
}  # fmt: skip


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | None:
    """Return the class that rebuilds a tokenizer, one of `CLASSES` or another one; None: `tokenizer.json` is taken as it is.

    `config` is the content of `tokenizer_config.json`, `model` that of `config.json`, `tokenizer` that of `tokenizer.json`.
    """
    kind = str(model.get("model_type"))
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = str(named).removesuffix("Fast") if named else None
    by_type = OF_TYPE.get(kind)
    if name is None or kind in NEVER_TRUSTED:
        name = by_type
    elif kind in AS_IT_IS or name in GENERIC:
        return None
    if name == "LlamaTokenizer" and _byte_level(tokenizer):
        return None
    return name


def is_built_in(name: str, tokenizer: Mapping[str, Any]) -> bool:
    """Return whether `rebuilt` can do what a class does."""
    return name in CLASSES and tokenizer.get("model", {}).get("type") == "BPE"


def _byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return any('"ByteLevel"' in json.dumps(tokenizer.get(part)) for part in ("pre_tokenizer", "decoder"))


def rebuilt(name: str, tokenizer: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with the parts of a class."""
    before = config.get("add_prefix_space")
    bpe = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False, **CLASSES[name].bpe,
    }  # fmt: skip
    normalizer: Any = None
    if name == "LlamaTokenizer":
        scheme = "never" if before is False else "always" if config.get("legacy", False) else "first"
        splitter: Any = pre_tokenizers.Metaspace("▁", scheme, split=False)
        decoder: Any = spelled_out(strips=before is not False)
    elif name == "GemmaTokenizer":
        normalizer, splitter = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
        decoder = spelled_out(strips=False)
        bpe["unk_token"] = content(config.get("unk_token")) or "<unk>"
    elif name == "Qwen2Tokenizer":
        normalizer, decoder = normalizers.NFC(), decoders.ByteLevel()
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(before), use_regex=False)
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLITS["qwen2"].patterns[0]), "isolated"), bytes_]
        )
    else:
        splitter, decoder = pre_tokenizers.ByteLevel(add_prefix_space=bool(before)), decoders.ByteLevel()
    parts = {"normalizer": normalizer, "pre_tokenizer": splitter, "decoder": decoder}
    made = {part: json.loads(of.__getstate__()) if of is not None else None for part, of in parts.items()}
    return {**tokenizer, **made, "model": {**tokenizer["model"], **bpe}, "added_tokens": []}


def spelled_out(*, strips: bool) -> decoders.Decoder:
    """Return the decoder of a vocabulary that spells a space as U+2581; `strips`: it leaves out the first space."""
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def content(token: Any) -> str:
    """Return the text of a token, which configs give as text or as an object."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")
