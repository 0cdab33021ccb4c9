"""Open a checkpoint: the architecture and the tensors of a model, under transformers' names, from any kind of file.

Opening reads headers, and the small tensors that give the shapes and groups of quantised matrices. If a tied model also
stores a head, both are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, describe
from . import gguf_config, gguf_names, gguf_parts, quant_methods, safetensors_file
from .config import ModelConfig
from .gguf_config import Described
from .hf_config import from_hf
from .hf_foreign import by_transformers
from .hf_seq2seq import eos_tokens
from .json_file import read_json
from .tensors import Entry, TensorEntry, Tensors, read_exactly

COMPARED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint(Tensors):
    """Hold what `open_checkpoint` has found.

    `hf` is the model's `config.json`; for a GGUF file, the one that its metadata describes. `gguf` is the metadata of a
    GGUF file, which includes its tokenizer. `generation` is the content of `generation_config.json`, or the same fields of
    a GGUF file: how the model's makers let it generate.
    """

    config: ModelConfig
    hf: Mapping[str, Any] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    renamed: bool = True
    """False if the tensors keep GGUF's names, because only transformers' reader knows the architecture."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers at `path`: a `.gguf` file, a `.safetensors` file with `config.json` beside it, or a folder.

    Raises:
        CheckpointError: the file is missing or damaged, or its architecture is not built in.
    """
    if path.is_dir():
        return _open_folder(path, None)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        try:
            return _open_gguf(path)
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise CheckpointError(f"{path}: metadata: {describe(error)}") from None
    if path.suffix == ".safetensors":
        return _open_folder(path.parent, path)
    raise CheckpointError(f"{path}: expected a .gguf file, a .safetensors file, or a folder with config.json")


@functools.lru_cache(maxsize=4)
def known_checkpoint(path: Path) -> Checkpoint:
    """Return `open_checkpoint` of a path, cached, so that a forked process need not read the headers again."""
    return open_checkpoint(path)


def _open_folder(folder: Path, single: Path | None) -> Checkpoint:
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    read = _read_config(folder, generation)
    settings = quant_methods.settings_of(read, folder)
    config = from_hf(read, str(folder / "config.json"))
    if generation_file.exists():  # it has often more ends than config.json, and none if it names none
        config = replace(config, eos_tokens=eos_tokens(generation))
    entries = _entries(folder, single)
    opened = quant_methods.entries(entries, settings, folder)
    embedding = _embedding(config)
    if embedding is None:  # transformers' own layers know the names of their files
        tensors = dict(opened)
    else:
        renamed = _prefixes(opened.keys(), embedding)
        tensors = {renamed(name): entry for name, entry in opened.items()}
        if config.tied and embedding not in tensors and "lm_head.weight" in tensors:  # only one of the two was stored
            tensors[embedding] = tensors["lm_head.weight"]
        config = _untied(config, tensors, embedding)
    if config.encoder is not None:
        own = "lm_head.weight" in tensors
        separate = config.family == "marian" and "model.shared.weight" not in tensors
        config = replace(config, tied=not own, encoder=replace(config.encoder, separate=separate))
    return Checkpoint(folder, tensors, config, quant_methods.without(read), generation=generation)


def _entries(folder: Path, single: Path | None) -> dict[str, TensorEntry]:
    """Return the tensors of a folder's safetensors files, by the names that they have there.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    single = single or folder / "model.safetensors"
    others = list(folder.glob("*.safetensors"))
    if not single.exists() and not index.exists() and len(others) == 1:  # such as gptq_model-4bit-128g.safetensors
        [single] = others
    if single.exists():
        files = {single: safetensors_file.read_header(single)}
        names = dict.fromkeys(files[single], single)
    elif index.exists():
        names = _weight_map(folder, index)
        files = {file: safetensors_file.read_header(file) for file in dict.fromkeys(names.values())}
        for file, held in files.items():  # an index may leave out what its files hold
            names = dict.fromkeys(held, file) | names
    else:
        raise CheckpointError(
            f"{folder}: expected model.safetensors, {index.name}, or one other safetensors file, got {len(others)}"
        )
    return {
        name: TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
        for name, file in names.items()
        # some indexes list a tied head that no file holds; whoever needs the tensor will miss it
        if (found := files[file].get(name)) is not None
    }


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight")
"""Ends of the names of embeddings."""
_OUTSIDE = ("lm_head.", "final_logits_bias")
"""Starts of names that never get a prefix."""


def _embedding(config: ModelConfig) -> str | None:
    """Return the name of the embedding in a model that this package's own blocks can run; None for any other."""
    if config.encoder is not None:
        return "shared.weight" if config.family in ("t5", "mt5") else "model.shared.weight"
    if config.family == "gpt2":
        return "transformer.wte.weight"
    return "model.embed_tokens.weight" if config.native or config.experts else None


def _prefixes(names: Collection[str], embedding: str) -> Callable[[str], str]:
    """Return a function that gives names the prefix which transformers' models with a head have.

    Some checkpoints have none, because only the model below the head was saved; others have one more, because the model
    was a part of a larger one. The name of the embedding shows which.
    """
    usual = next(embedding.removesuffix(end) for end in _EMBEDDINGS if embedding.endswith(end))
    anchor = embedding.removeprefix(usual)
    found = [name for name in names if name == anchor or name.endswith("." + anchor)]
    if not usual or embedding in names or len(found) != 1:
        return lambda name: name
    given = found[0].removesuffix(anchor)
    if given.endswith("." + usual):
        outer = given.removesuffix(usual)
        return lambda name: name.removeprefix(outer)
    if given:
        return lambda name: usual + name.removeprefix(given) if name.startswith(given) else name
    return lambda name: name if name.startswith((usual, *_OUTSIDE)) else usual + name


def _untied(config: ModelConfig, tensors: Mapping[str, Entry], embedding: str) -> ModelConfig:
    """Return the config with its own head if the file holds one that differs from the embedding, whatever the config says.

    transformers does so, too: some fine-tuned models trained their head and kept the config.
    """
    head = tensors.get("lm_head.weight")
    if not config.tied or config.encoder is not None or head is None or embedding not in tensors:
        return config
    return config if same(head, tensors[embedding]) else replace(config, tied=False)


def same(one: Entry, other: Entry) -> bool:
    """Return whether two tensors have the same numbers, stored in the same form."""
    if not isinstance(one, TensorEntry) or not isinstance(other, TensorEntry):
        return False
    return (one.shape, one.stored) == (other.shape, other.stored) and _same_bytes(one, other)


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, one.nbytes - start)
            if read_exactly(first, one, size) != read_exactly(second, other, size):
                return False
    return True


def _read_config(folder: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Read `config.json`.

    Newer encoder–decoder checkpoints keep some fields in `generation_config.json`; these are added.
    """
    config = read_json(folder / "config.json", special_floats=True)
    if config.get("is_encoder_decoder"):
        named = ("decoder_start_token_id", "bad_words_ids", "forced_bos_token_id")
        config |= {name: generation[name] for name in named if generation.get(name) is not None}
    return config


def _weight_map(folder: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected an object 'weight_map', got {type(weight_map).__name__}")
    names = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: tensor {name}: expected a file of the same folder, got {file!r}")
        names[name] = folder / file
    return names


def _open_gguf(path: Path) -> Checkpoint:
    header, found = gguf_parts.read(path)
    if "general.architecture" not in header.fields:
        raise CheckpointError(f"{path}: expected the metadata 'general.architecture', which is missing")
    file = Described(path, str(header.fields["general.architecture"]), header.fields, found)
    made = gguf_config.to_hf(file)
    hf, layout = made if made is not None else (by_transformers(path, file.arch), gguf_names.AS_IT_IS)
    config = from_hf(hf, str(path))
    if config.native and config.encoder is None:  # a config.json cannot say everything that a file can have
        config = replace(config, qkv_bias=file.has("attn_q.bias") or file.has("attn_qkv.bias"),
                         out_bias=file.has("attn_output.bias"))  # fmt: skip
    heads = (config.heads, hf.get("num_key_value_heads") or config.heads, hf.get("head_dim") or config.head_dim)
    tensors = gguf_names.named(found, layout, heads)
    if config.encoder is not None:
        config = replace(config, tied="lm_head.weight" not in tensors)
    return Checkpoint(path, tensors, config, hf, header.fields, _generation(header.fields), made is not None)


_GGUF_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling defaults of a GGUF file under the names of `generation_config.json`."""
    begin = "general.sampling."
    made = {name: fields[begin + key] for key, name in _GGUF_SAMPLING.items() if begin + key in fields}
    return {"do_sample": True, **made} if made else {}
