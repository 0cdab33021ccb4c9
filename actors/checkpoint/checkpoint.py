"""Open a checkpoint: the architecture and the tensors of a model, under transformers' names, from any kind of file.

Opening reads headers only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ranvier.transport.files import read_bounded

from ..errors import CheckpointError
from . import gguf_config, gguf_names, gguf_parts, quant_methods, safetensors_file
from .config import ModelConfig
from .gguf_config import Described
from .hf_config import by_transformers, from_hf
from .hf_seq2seq import eos_tokens
from .tensors import Entry, TensorEntry, Tensors, read_exactly

COMPARED_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20


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
    """False if the tensors of a GGUF file have its names, because only transformers' reader knows the architecture."""


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
        return _open_gguf(path)
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
    settings = quant_methods.quantised(read, folder) or _quantised_beside(folder)
    config = from_hf(read, str(folder / "config.json"))
    if generation_file.exists():  # it has often more ends than config.json, and none if it names none
        config = replace(config, eos_tokens=eos_tokens(generation))
    index = folder / "model.safetensors.index.json"
    single = single or folder / "model.safetensors"
    if single.exists():
        files = {single: safetensors_file.read_header(single)}
        names = dict.fromkeys(files[single], single)
    elif index.exists():
        names = _weight_map(folder, index)
        files = {file: safetensors_file.read_header(file) for file in dict.fromkeys(names.values())}
        for file, held in files.items():  # an index may leave out what its files hold
            names = dict.fromkeys(held, file) | names
    else:
        raise CheckpointError(f"{folder}: expected model.safetensors or {index.name}, found neither")
    entries: dict[str, TensorEntry] = {}
    for name, file in names.items():
        found = files[file].get(name)
        if found is not None:  # some indexes list a tied head that no file holds; whoever needs the tensor will miss it
            entries[name] = TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
    opened = quant_methods.entries(entries, settings, folder) if settings is not None else entries
    # transformers' own layers know the names of their files
    renamed = _prefixes(opened) if config.native or config.experts or config.encoder is not None else _as_it_is
    tensors: dict[str, Entry] = {renamed(name): entry for name, entry in opened.items()}
    embedding = _embedding(tensors)
    if config.tied and embedding is None and "lm_head.weight" in tensors:  # only one of the two was stored
        usual = "model.embed_tokens.weight" if config.encoder is None else "model.shared.weight"
        tensors[_EMBEDDINGS.get(config.family, usual)] = tensors["lm_head.weight"]
    config = _untied(config, tensors)
    if config.encoder is not None:
        own = "lm_head.weight" in tensors
        separate = config.family == "marian" and "model.shared.weight" not in tensors
        config = replace(config, tied=not own, encoder=replace(config.encoder, separate=separate))
    return Checkpoint(folder, tensors, config, quant_methods.without(read), generation=generation)


_OUTSIDE = ("lm_head.", "final_logits_bias")
"""Begins of names that have no prefix."""
_ANCHORS = {"embed_tokens.weight": "model.", "wte.weight": "transformer.", "shared.weight": "model.", "embed_in.weight":
            "gpt_neox."}  # fmt: skip
"""How the name of an embedding ends, and what transformers' causal models have before it."""


def _prefixes(names: Iterable[str]) -> Callable[[str], str]:
    """Return a function that gives names the prefix which transformers' models with a head have.

    Some checkpoints have none, because only the model below the head was saved; others have one more, because the model
    was a part of a larger one. T5 has no prefix.
    """
    for anchor, usual in _ANCHORS.items():
        found = [name for name in names if name == anchor or name.endswith("." + anchor)]
        if len(found) != 1 or (anchor == "shared.weight" and _is_t5(names)):
            continue
        given = found[0].removesuffix(anchor)
        if given == usual:
            break
        outer = given.removesuffix(usual) if given.endswith("." + usual) else None
        if outer:
            return lambda name: name.removeprefix(outer)
        return lambda name: name if name.startswith((usual, *_OUTSIDE)) else usual + name.removeprefix(given)
    return _as_it_is


def _as_it_is(name: str) -> str:
    return name


def _is_t5(names: Iterable[str]) -> bool:
    return not any(".layers." in name for name in names)


_EMBEDDINGS = {"gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight", "t5": "shared.weight",
               "mt5": "shared.weight"}  # fmt: skip
"""Names of embeddings, by family; in the others it is model.embed_tokens.weight or, with an encoder, model.shared.weight."""


def _embedding(tensors: Mapping[str, Entry]) -> Entry | None:
    names = ("model.embed_tokens.weight", "model.shared.weight", "shared.weight", *_EMBEDDINGS.values())
    return next((tensors[name] for name in names if name in tensors), None)


def _untied(config: ModelConfig, tensors: Mapping[str, Entry]) -> ModelConfig:
    """Return the config with its own head if the file holds one that differs from the embedding, whatever the config says.

    transformers does so, too: some fine-tuned models trained their head and kept the config.
    """
    head = tensors.get("lm_head.weight")
    embedding = _embedding(tensors)
    if not config.tied or config.encoder is not None or head is None or embedding is None:
        return config
    return config if same(head, embedding) else replace(config, tied=False)


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


_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def _quantised_beside(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a quantised checkpoint that has them in a file of their own; None if there is none."""
    file = next((folder / name for name in _BESIDE if (folder / name).exists()), None)
    if file is None:
        return None
    read = read_json(file)
    if file.name == "hf_quant_config.json":
        return {"quant_method": "modelopt", **(read.get("quantization") or {})}
    return {"quant_method": "gptq" if file.name == "quantize_config.json" else "awq", **read}


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


def _special_float(made: dict[str, Any]) -> Any:
    value = made.get("__float__")
    return float(value) if len(made) == 1 and isinstance(value, str) else made


def read_json(path: Path, *, special_floats: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB.

    With `special_floats`, `{"__float__": "Infinity"}` is a number: so transformers writes what JSON cannot say.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        made = json.loads(read_bounded(path, MAX_JSON_BYTES), object_hook=_special_float if special_floats else None)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(made, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(made).__name__}")
    return made


def _open_gguf(path: Path) -> Checkpoint:
    header, found = gguf_parts.read(path)
    file = Described(path, str(header.fields.get("general.architecture")), header.fields, found)
    made = gguf_config.to_hf(file)
    hf, layout = made if made is not None else (by_transformers(path, file.arch), gguf_names.AS_IT_IS)
    config = from_hf(hf, str(path))
    if config.native and config.encoder is None:  # a config.json cannot say everything that a file can have
        config = replace(config, qkv_bias=file.has("attn_q.bias") or file.has("attn_qkv.bias"),
                         out_bias=file.has("attn_output.bias"))  # fmt: skip
    tensors = gguf_names.named(found, layout, (config.heads, config.kv_heads, config.head_dim))
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
