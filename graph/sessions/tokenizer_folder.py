"""Read the tokenizer of a folder, with the templates beside it, as transformers does."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from ranvier.actors.checkpoint.json_file import read_json
from ranvier.actors.errors import CheckpointError, describe
from ranvier.transport.files import read_text

from . import tokenizer_classes
from .text_codec import TextCodec

MOST_BYTES = 64 << 20
"""Maximum size of a tokenizer's file, and of a chat template's."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that templates know by name, as in transformers."""
OTHER_FILES = ("tokenizer.model", "tekken.json", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
               "vocab.txt", "source.spm", "qwen.tiktoken")  # fmt: skip
"""Files of a tokenizer that transformers converts if there is no `tokenizer.json`."""
PACKAGES = {
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "protobuf": "protobuf",
    "mistral": "mistral-common",
}


def is_in(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, of whichever kind."""
    return any((folder / name).exists() for name in ("tokenizer.json", *OTHER_FILES))


def from_folder(folder: Path) -> TextCodec:
    """Return the tokenizer of a folder.

    Raises:
        CheckpointError: there is none, it is damaged, it needs a package that is missing, or it brings code of its own.
    """
    file = folder / "tokenizer.json"
    config_file = folder / "tokenizer_config.json"
    config = _config(folder, read_json(config_file) if config_file.exists() else {})
    if file.exists():
        tokenizer, config = _read(file, folder, config)
        _add(tokenizer, config)
    elif is_in(folder):
        tokenizer, defaults = _converted(folder, config)
        config = {**defaults, **config}
    else:
        raise CheckpointError(f"{file}: no such file; the checkpoint has no tokenizer")
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _check_decoder(file, json.loads(tokenizer.to_str()).get("decoder"))
    named = _named(config)
    default, templates = _templates(folder, config)
    cleans = bool(config.get("clean_up_tokenization_spaces")) and not isinstance(tokenizer.model, models.BPE)
    return TextCodec(
        tokenizer,
        default,
        named.get("bos_token", ""),
        named.get("eos_token", ""),
        special=named,
        templates=templates,
        cleans=cleans,  # for BPE it would remove spaces that the text has, so transformers ignores it there
    )


def _read(file: Path, folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a file, rebuilt if its class does so, and the config with the class's special tokens."""
    try:
        text = read_text(file, MOST_BYTES)
        content = json.loads(text)
        model = folder / "config.json"
        name = tokenizer_classes.class_of(config, read_json(model) if model.exists() else {}, content)
        if name is not None and tokenizer_classes.is_built_in(name, content):
            config = {**tokenizer_classes.CLASSES[name].tokens, **config}
            if "added_tokens_decoder" not in config:
                config["added_tokens_decoder"] = {str(token.pop("id")): token for token in content["added_tokens"]}
            text = json.dumps(tokenizer_classes.rebuilt(name, content, config))
        elif name is not None and (made := _by_library(folder)) is not None:
            return made[0], {**made[1], **config}
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()  # limits in the file would truncate prompts silently
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # an invalid file raises bare Exception; panics do not derive from Exception
        raise CheckpointError(f"{file}: {describe(error)}") from None
    return tokenizer, config


def _config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json` with what older files keep apart: `special_tokens_map.json`, `added_tokens.json`."""
    if "added_tokens_decoder" in config:
        return config
    made = dict(config)
    special = folder / "special_tokens_map.json"
    if special.exists():
        made |= {key: value for key, value in read_json(special).items() if value is not None}
    added = folder / "added_tokens.json"
    if added.exists():
        names = {*_named(made).values(), *(tokenizer_classes.content(token) for token in _extra(made))}
        made["added_tokens_decoder"] = {
            str(number): {"content": token, "special": token in names, "normalized": token not in names}
            for token, number in read_json(added).items()
        }
    return made


def _add(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that the config names and the tokenizer lacks, or calls ordinary.

    This is what transformers' `TokenizersBackend.__init__` does, in the same order.
    """
    have = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    tokens = [_added(declared[number]) for number in sorted(declared, key=int)]
    missing = [token for token in tokens if repr(token) not in have]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {t.content for t in missing}
    for value in (*(config.get(name) for name in NAMED), *_specific(config).values(), *_extra(config)):
        if value and tokenizer_classes.content(value) not in known:
            known.add(tokenizer_classes.content(value))
            missing.append(_added(value, special=True))
    tokenizer.add_tokens(missing)


def _added(value: Any, special: bool = False) -> AddedToken:
    if not isinstance(value, Mapping):
        return AddedToken(str(value), special=special)
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(tokenizer_classes.content(value), special=bool(value.get("special", special)), **flags)


def _extra(config: Mapping[str, Any]) -> Sequence[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, Mapping) else list(extra)


def _specific(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens that only some models have, such as `image_token`, by name."""
    named = {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | Mapping)
    }
    extra, models_own = config.get("extra_special_tokens"), config.get("model_specific_special_tokens")
    return {**named, **(extra if isinstance(extra, Mapping) else {}), **(models_own or {})}


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    named = {name: config.get(name) for name in NAMED} | _specific(config)
    return {
        name: tokenizer_classes.content(value) for name, value in named.items() if value and not isinstance(value, bool)
    }


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Return the default template and those with names. Files go before what the config holds."""
    found: Any = config.get("chat_template")
    try:
        files = {"default": folder / "chat_template.jinja"}
        more = folder / "additional_chat_templates"
        if more.is_dir():
            files |= {file.name.removesuffix(".jinja"): file for file in sorted(more.glob("*.jinja"))}
        texts = {name: read_text(file, MOST_BYTES) for name, file in files.items() if file.exists()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: chat template: {error}") from None
    if texts:
        found = texts
    elif isinstance(found, Sequence) and not isinstance(found, str):
        found = {each["name"]: each["template"] for each in found}
    if not isinstance(found, Mapping):
        return found, {}
    named = {str(name): template for name, template in found.items()}
    return named.pop("default", None), named


def _converted(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer that transformers makes of other files than `tokenizer.json`, and its special tokens by name.

    Raises:
        CheckpointError: transformers, or a package that it needs for these files, is missing; or it cannot read them.
    """
    files = ", ".join(name for name in OTHER_FILES if (folder / name).exists())
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        raise CheckpointError(f"{folder}: the tokenizer brings its own code, which is never run; add a tokenizer.json")
    try:
        made = _by_library(folder, refusing=True)
    except Exception as error:  # the library raises errors of many classes
        why = describe(error)
        package = next((package for word, package in PACKAGES.items() if word in why.lower()), None)
        hint = f"; pip install {package}" if package else ""
        raise CheckpointError(f"{folder}: transformers cannot convert {files}: {why[:300]}{hint}") from None
    if made is None:
        raise CheckpointError(
            f"{folder}: there is no tokenizer.json; for {files}, pip install 'ranvier[hf]', whose libraries convert it"
        )
    return made


def _by_library(folder: Path, *, refusing: bool = False) -> tuple[Tokenizer, dict[str, str]] | None:
    """Return the tokenizer that transformers makes of a folder, with its special tokens by name.

    Return None if the library is not installed or, unless `refusing`, if it cannot.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        copy = Tokenizer.from_str(made.backend_tokenizer.to_str())
    except Exception:  # the library raises errors of many classes
        if refusing:
            raise
        return None
    copy.no_truncation()
    copy.no_padding()
    return copy, {name: str(token) for name, token in made.special_tokens_map.items()}


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
