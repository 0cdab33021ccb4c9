"""Build the tokenizer that the metadata of a GGUF file describes, as llama.cpp does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ranvier.actors.checkpoint.gguf_tokens import ends_of_text, numbered
from ranvier.actors.errors import CheckpointError, describe

from .pre_tokenizers import SPLITS, Split
from .text_codec import TextCodec
from .tokenizer_classes import spelled_out

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens (`tokenizer.ggml.token_type`)."""
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
         "cls_token": "cls", "mask_token": "mask"}  # fmt: skip
"""The names of special tokens in templates, and in GGUF's keys, which spell one of them wrong."""

KINDS = ("gpt2", "gemma4", "llama", "t5")
"""Kinds of tokenizers that are built in (`tokenizer.ggml.model`): two that merge pairs, SentencePiece's two."""
SENTENCEPIECE = ((0, "unknown", "<unk>"), (1, "bos", "<s>"), (2, "eos", "</s>"))
"""Ids of special tokens in SentencePiece's vocabularies, unless a file says otherwise."""


def from_gguf(fields: Mapping[str, Any], where: str) -> TextCodec:
    """Return the tokenizer of a file's metadata. `where` names the file in errors.

    Raises:
        CheckpointError: a field is missing, or the kind of tokenizer or pre-tokenizer is not built in.
        ValueError, TypeError, LookupError: a field is damaged.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is missing")
    types = fields.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type: expected a type for each of {len(tokens)} tokens, got {len(types)}"
        )
    ids = {token: number for number, token in enumerate(tokens)}
    if kind == "llama":  # llama.cpp's ids where a file of this kind names none
        fields = {
            f"tokenizer.ggml.{key}_token_id": i for i, key, text in SENTENCEPIECE if tokens[i : i + 1] == [text]
        } | dict(fields)
    split = SPLITS["gpt-2"]
    if kind in ("gpt2", "gemma4"):
        name = "gemma4" if kind == "gemma4" else fields.get("tokenizer.ggml.pre", "gpt-2")
        if name not in SPLITS:
            known = ", ".join(sorted(SPLITS))
            raise CheckpointError(f"{where}: pre-tokenizer {name!r} is not built in; built in: {known}")
        split = SPLITS[name]
        tokenizer = _merging(fields, tokens, ids, name, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, ids, where)
    elif kind == "t5":
        fields = {"tokenizer.ggml.add_eos_token": True, **fields}
        tokenizer = _unigram(fields, tokens, where)
    else:
        raise CheckpointError(f"{where}: tokenizer {kind!r} is not built in; built in: {', '.join(KINDS)}")
    ends = set(ends_of_text(fields, where))
    special = {i for i, kind_ in enumerate(types) if kind_ in (UNKNOWN, CONTROL)} | ends
    whole = [tokens[i] for i, kind_ in enumerate(types) if kind_ == USER_DEFINED and i not in ends]
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in sorted(special) if tokens[i]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole if token])
    named = {
        name: token
        for name, key in NAMED.items()
        if (token := _token(fields, tokens, f"tokenizer.ggml.{key}_token_id", where))
    }
    _frame(tokenizer, fields, named, split.add_bos or kind == "llama")
    twins = {i: ids[t] for i, t in enumerate(tokens) if ids[t] != i} if len(ids) < len(tokens) else {}
    return TextCodec(
        tokenizer,
        fields.get("tokenizer.chat_template"),
        named.get("bos_token", ""),
        named.get("eos_token", ""),
        special=named,
        templates=_templates(fields),
        twins=twins,
    )


def _token(fields: Mapping[str, Any], tokens: Sequence[str], key: str, where: str) -> str:
    number = numbered(fields, key, where)
    return "" if number is None else str(tokens[number])


def _templates(fields: Mapping[str, Any]) -> dict[str, str]:
    begin = "tokenizer.chat_template."
    return {key.removeprefix(begin): value for key, value in fields.items() if key.startswith(begin)}


def _frame(tokenizer: Tokenizer, fields: Mapping[str, Any], named: Mapping[str, str], add_bos: bool) -> None:
    """Let the tokenizer add the tokens around a text that the file asks for."""
    before = fields.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in named
    after = fields.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    pieces = [*(["bos_token"] if before else []), "$A", *(["eos_token"] if after else [])]
    if len(pieces) == 1:
        return
    ids = {name: fields[f"tokenizer.ggml.{NAMED[name]}_token_id"] for name in pieces if name != "$A"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces,
        special_tokens=[{"id": name, "ids": [number], "tokens": [named[name]]} for name, number in ids.items()],
    )


def _merging(fields: Mapping[str, Any], tokens: list[str], ids: dict[str, int], name: str, where: str) -> Tokenizer:
    """Return BPE by merges: over bytes, or for some names over characters."""
    split = SPLITS[name]
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is missing")
    wrong = next((merge for merge in merges if " " not in merge[1:]), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: tokenizer.ggml.merges: expected two parts and a space, got {wrong!r:.80}")
    pairs = [_parts(merge) if merge[0] == " " else tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = _model(fields, tokens, ids, pairs, split, where)
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{where}: tokenizer.ggml.merges: {describe(error)}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split.build()
    if split.byte_level:
        tokenizer.decoder = decoders.ByteLevel()
        if split.nfc:
            tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = spelled_out(strips=False)
    return tokenizer


def _model(
    fields: Mapping[str, Any], tokens: list[str], ids: dict[str, int], pairs: Any, split: Split, where: str
) -> models.BPE:
    if split.byte_level:
        return models.BPE(ids, pairs, ignore_merges=split.whole_words)
    unknown = _token(fields, tokens, "tokenizer.ggml.unknown_token_id", where) or None
    return models.BPE(ids, pairs, ignore_merges=split.whole_words, byte_fallback=True, fuse_unk=True, unk_token=unknown)


def _parts(merge: str) -> tuple[str, str]:
    """Return the parts of a merge whose first part begins with a space."""
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], ids: dict[str, int], where: str) -> Tokenizer:
    unknown = numbered(fields, "tokenizer.ggml.unknown_token_id", where)
    model = models.BPE(
        ids,
        _pairs(fields, tokens, ids, where),
        unk_token=tokens[unknown if unknown is not None else 0],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = spelled_out(strips=bool(prefix))
    return tokenizer


def _unigram(fields: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    """Return SentencePiece's tokenizer that chooses the likeliest pieces, as T5 has it (Kudo 2018)."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores is missing")
    unknown = numbered(fields, "tokenizer.ggml.unknown_token_id", where)
    pieces = list(zip(tokens, map(float, scores), strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2 if unknown is None else unknown, byte_fallback=False))
    charsmap = bytes(each & 0xFF for each in fields.get("tokenizer.ggml.precompiled_charsmap") or ())
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if fields.get("tokenizer.ggml.remove_extra_whitespaces", True):
        ends = Regex(r"\A +| +\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    spaces = [decoders.Replace("▁", " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)] if prefix else spaces)
    return tokenizer


def _pairs(fields: Mapping[str, Any], tokens: list[str], ranks: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece makes: of all pairs that are a token, the one with the best score first."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores is missing")
    merges = [
        (scores[index], token[:cut], token[cut:])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges.sort(key=lambda merge: (-merge[0], ranks[merge[1]], ranks[merge[2]]))
    return [(left, right) for _, left, right in merges]
