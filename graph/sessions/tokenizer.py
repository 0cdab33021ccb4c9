"""Load the tokenizer and the chat template of a checkpoint.

A folder's `tokenizer.json` is used as it is. From GGUF the tokenizer is built from the metadata: byte-level BPE
(`gpt2`) or SentencePiece-like BPE (`llama`), as in llama.cpp and transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.checkpoint.checkpoint import read_json
from ranvier.actors.errors import CheckpointError, describe
from ranvier.transport.files import read_text

from . import chat_template

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NORMAL, _CONTROL, _USER = 1, 3, 4
MOST_BYTES = 64 << 20
"""Maximum size of a tokenizer's file, and of a chat template's."""


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Convert text to token ids and back, and the messages of a chat to text.

    `add_bos` is the id that goes before a raw prompt. None means that the tokenizer adds what is needed.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    bos_token: str
    eos_token: str
    add_bos: int | None = None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return token ids. With `special`, add the model's special tokens around the text.

        A raw prompt needs them. A chat does not: its template writes them.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return [self.add_bos, *ids] if special and self.add_bos is not None else ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a chat, open for the answer.

        Raises:
            CheckpointError: there is no template, the template is wrong, or it refuses the messages.
        """
        if self.chat_template is None:
            raise CheckpointError("the model has no chat template; use a raw prompt")
        return chat_template.render(self.chat_template, messages, self.bos_token, self.eos_token)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a chat, open for the answer.

        Only the template can write control tokens. A message that spells one (`<|im_end|>`), also in parts that the
        template joins, stays ordinary text. Errors are those of `render`.
        """
        rendered, controls = self.render(messages), self._controls()
        hidden = _Hidden(controls, messages)
        if hidden.needed:
            apart = self.render(hidden.hide(messages))
            pattern = re.compile(f"({'|'.join(map(re.escape, sorted(controls, key=len, reverse=True)))})")
            if pattern.findall(rendered) != pattern.findall(apart):
                ids: list[int] = []
                for part in pattern.split(apart):
                    token = controls.get(part)
                    ids += [token] if token is not None else self._ordinary(hidden.restored(part), controls)
                return ids
        return self.encode(rendered, special=False)

    def _controls(self) -> dict[str, int]:
        added = self.tokenizer.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special and token.content}

    def _ordinary(self, text: str, controls: Mapping[str, int]) -> list[int]:
        """Encode text in which nothing is a control token."""
        if not text:
            return []
        self.tokenizer.encode_special_tokens = True
        try:
            ids = self.encode(text, special=False)
            if not set(ids).isdisjoint(controls.values()):  # even so, BPE made one: split it after its first character
                cut = "|".join(
                    f"(?<={re.escape(word[0])})(?={re.escape(word[1:])})" for word in controls if len(word) > 1
                )
                ids = [token for part in re.split(cut, text) if part for token in self.encode(part, special=False)]
            return ids
        finally:
            self.tokenizer.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """Return text without special tokens.

        Raises:
            CheckpointError: the tokenizer's library failed.
        """
        try:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics do not derive from Exception
            raise CheckpointError(f"tokenizer: cannot decode: {describe(error)}") from None
        return text


class _Hidden:
    """Replace the first characters of control tokens in messages by private-use characters.

    No template can then build a control token from the text of messages.
    """

    PRIVATE = range(0x10_0000, 0x10_FFFE)
    """Supplementary private use area B. No language uses these characters, and no template looks for one."""

    def __init__(self, controls: Iterable[str], messages: Sequence[Mapping[str, Any]]) -> None:
        said = set(json.dumps(messages, ensure_ascii=False, default=str))
        free = (chr(number) for number in self.PRIVATE if chr(number) not in said)
        first = sorted({control[0] for control in controls} & said - {'"', "\\"})
        self._there = str.maketrans({letter: next(free) for letter in first})
        self._back = str.maketrans({stand: chr(letter) for letter, stand in self._there.items()})
        self.needed = bool(first)

    def hide(self, value: Any) -> Any:
        """Return the value with the characters replaced in all of its strings, including the keys of mappings."""
        if isinstance(value, str):
            return value.translate(self._there)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def restored(self, text: str) -> str:
        return text.translate(self._back)


class StreamDecoder:
    """Decode a growing list of ids piece by piece. Bytes that do not yet make a whole character are held back."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that `token` completes, or "" if it leaves a character unfinished."""
        self._ids.append(token)
        before = self._codec.decode(self._ids[self._start : self._shown])
        now = self._codec.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # each decoding starts one piece back, so that a character over two pieces comes out whole
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """Return what is still held back at the end of the stream."""
        before = self._codec.decode(self._ids[self._start : self._shown])
        now = self._codec.decode(self._ids[self._start :])
        self._start = self._shown = len(self._ids)
        return now[len(before) :]


def brought_by(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint has a tokenizer."""
    return checkpoint.gguf is not None or (checkpoint.path / "tokenizer.json").exists()


def of(checkpoint: Checkpoint) -> TextCodec:
    """Return the tokenizer of a checkpoint, with its chat template.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, a damaged one, or one of a kind that is not built in.
    """
    try:
        made = (
            _from_gguf(checkpoint.gguf, str(checkpoint.path))
            if checkpoint.gguf is not None
            else _from_folder(checkpoint)
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: tokenizer: damaged: {describe(error)}") from None
    if not isinstance(made.chat_template, str | None):
        what = type(made.chat_template).__name__
        raise CheckpointError(f"{checkpoint.path}: chat template: expected text, got {what}")
    return made


def _from_folder(checkpoint: Checkpoint) -> TextCodec:
    file = checkpoint.path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{file}: no such file; the checkpoint has no tokenizer")
    try:
        tokenizer = Tokenizer.from_str(read_text(file, MOST_BYTES))
        tokenizer.no_truncation()  # limits in the file would truncate prompts silently
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # an invalid file raises bare Exception; panics do not derive from Exception
        raise CheckpointError(f"{file}: {describe(error)}") from None
    _check_decoder(file, json.loads(tokenizer.to_str()).get("decoder"))
    config_file = checkpoint.path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    template_file = checkpoint.path / "chat_template.jinja"
    try:
        chat_template = read_text(template_file, MOST_BYTES) if template_file.exists() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{template_file}: {error}") from None
    return TextCodec(tokenizer, chat_template, _content(config.get("bos_token")), _content(config.get("eos_token")))


DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece", "BPEDecoder", "CTC")
MOST_DECODED = 16
"""Maximum number of characters that all decoders together may make of one, or that a decoder may strip at an end."""


def _check_decoder(file: Path, decoder: Any, grown: int = 1) -> int:
    """Return how many characters the decoders up to this one may make of one. Earlier decoders make `grown` of it.

    Tokens are decoded in the process of the run, so a decoder must not grow a text without bound.

    Raises:
        CheckpointError: the characters are too many, or the decoder is not built in.
    """
    if decoder is None:
        return grown
    kind = decoder.get("type")
    if kind == "Sequence":
        for each in decoder.get("decoders", []):
            grown = _check_decoder(file, each, grown)
    elif kind == "Replace":
        pattern, content = decoder.get("pattern", {}).get("String"), decoder.get("content", "")
        grown *= max(1, -(-len(content) // len(pattern))) if pattern else MOST_DECODED + 1
        if grown > MOST_DECODED:
            raise CheckpointError(
                f"{file}: decoder: expected Replace of a plain text by a short one, got {decoder!r:.200}"
            )
    elif kind == "Strip":
        if max(decoder.get("start", 0), decoder.get("stop", 0)) > MOST_DECODED:
            raise CheckpointError(f"{file}: decoder: expected Strip of at most {MOST_DECODED}, got {decoder!r:.200}")
    elif kind not in DECODERS:
        raise CheckpointError(f"{file}: decoder {kind!r:.80} is not built in; built in: {', '.join(DECODERS)}")
    return grown


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _from_gguf(fields: Mapping[str, Any], where: str) -> TextCodec:
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is missing")
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, where)
    else:
        raise CheckpointError(f"{where}: tokenizer {kind!r} is not built in; built in: gpt2, llama")
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER])
    bos, eos = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
    add_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
    return TextCodec(
        tokenizer,
        fields.get("tokenizer.chat_template"),
        tokens[bos] if bos is not None else "",
        tokens[eos] if eos is not None else "",
        add_bos=bos if add_bos else None,
    )


def _byte_level(fields: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is missing")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"), where)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(name: str, where: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return plain
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in ("llama-bpe", "llama3", "llama-v3"):
        split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated", invert=False)
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise CheckpointError(f"{where}: pre-tokenizer {name!r} is not built in; built in: gpt-2, smollm, llama-bpe")


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores is missing")
    ranks = {token: index for index, token in enumerate(tokens)}
    merges = [
        (scores[index], token[:cut], token[cut:])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges.sort(key=lambda merge: (-merge[0], ranks[merge[1]], ranks[merge[2]]))
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        ranks, [(a, b) for _, a, b in merges], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
