"""Read a checkpoint: the architecture and the tensors of a model, under transformers' names, from any kind of file.

Opening reads headers only. `read_into` reads one tensor, piece by piece, into memory of the caller's dtype. So a host
holds only its own tensors and a piece of a few MiB.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranvier.transport.files import read_bounded

from ..errors import CheckpointError
from . import config as configs
from . import gguf_file, gguf_parts, safetensors_file
from .config import ModelConfig
from .hf_config import from_hf
from .hf_seq2seq import eos_tokens

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 18
"""Elements converted at a time: 1 MiB of float32, which stays in the processor's cache."""
COMPARED_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
WHOLE = ("bool", "uint8", "int8", "int16", "int32", "int64")
"""Dtypes that are not floating-point; they are read without conversion."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Describe where a tensor lies; `stored` is a dtype of the wire format or a GGUF type, `shape` is row-major.

    For the llama architecture, GGUF stores the rows of q and k in another order than transformers: as pairs that the
    rotary embedding rotates together. `permuted_heads` is the number of heads to reorder, or 0.
    """

    name: str
    file: Path
    stored: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    permuted_heads: int = 0


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Hold rows of a matrix in one of GGUF's block types.

    `data` is uint8, as in the file. `order` is int32 and gives each row's number in the file; None: the same order.
    """

    stored: str
    rows: int
    columns: int
    data: Any
    order: Any


@dataclass(frozen=True, slots=True)
class Tensors:
    """Hold the entries of tensors by name, and read the tensors."""

    path: Path
    tensors: Mapping[str, TensorEntry]

    def require(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorEntry:
        """Return the entry of a tensor that must be there.

        If `dtype` is a floating-point one, the file may have any floating-point type; otherwise it must have `dtype`.

        Raises:
            CheckpointError: the tensor is missing, or has another shape or dtype; the message names file and tensor.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        if entry.stored.startswith(safetensors_file.UNKNOWN):
            code = entry.stored.removeprefix(safetensors_file.UNKNOWN)
            known = ", ".join(safetensors_file.DTYPES)
            raise CheckpointError(f"{entry.file}: tensor {name}: dtype {code!r:.40} is not one of {known}")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected shape {shape}, got {entry.shape}")
        if dtype in WHOLE and entry.stored != dtype:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected {dtype}, got {entry.stored}")
        if dtype not in WHOLE and entry.stored in WHOLE:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected floating-point weights, got {entry.stored}")
        return entry

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor into `target` (same shape, any strides); floating-point numbers are converted to its dtype.

        Raises:
            CheckpointError: the file ends early, or has no tensor of this name and shape.
        """
        entry = self.require(name, tuple(target.shape), str(target.dtype).removeprefix("torch."))
        if not target.numel():
            return
        rows = _rows(target, bool(entry.permuted_heads))
        order = _head_order(entry) if entry.permuted_heads else None
        row_bytes = entry.nbytes // rows.shape[0]
        step = max(1, PIECE_ELEMENTS // rows.shape[-1])
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for start in range(0, rows.shape[0], step):
                stop = min(start + step, rows.shape[0])
                piece = _converted(entry, _read_exactly(file, entry, (stop - start) * row_bytes), stop - start)
                if order is None:
                    rows[start:stop].copy_(piece)
                else:
                    rows[order[start:stop]] = piece.to(rows.dtype)

    def stored_rows(self, name: str, shape: tuple[int, ...]) -> StoredRows:
        """Return a matrix of GGUF blocks as it lies in the file, which is mapped and not read.

        Raises:
            CheckpointError: the file ends early, or has no tensor of this name and shape.
        """
        import numpy as np

        entry = self.require(name, shape)
        try:
            data = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name}: truncated, or it cannot be mapped: {error}") from None
        order = None
        if entry.permuted_heads:
            order = np.ascontiguousarray(np.argsort(_head_order(entry).numpy()).astype(np.int32))
        rows, columns = shape
        return StoredRows(entry.stored, rows, columns, data, order)


@dataclass(frozen=True, slots=True)
class Checkpoint(Tensors):
    """Hold what `open_checkpoint` has found.

    `gguf` is the metadata of a GGUF file, which includes its tokenizer. `generation` is the content of
    `generation_config.json`, or the same fields of a GGUF file: how the model's makers let it generate.
    """

    config: ModelConfig
    gguf: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def _read_exactly(file: Any, entry: TensorEntry, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = file.readinto(view)
        if not got:
            raise CheckpointError(f"{entry.file}: tensor {entry.name}: truncated (missing bytes: {len(view)})")
        view = view[got:]
    return data


def _rows(target: torch.Tensor, reordered: bool) -> torch.Tensor:
    """Return `target` as a matrix of the rows to read; a vector is one row or, if `reordered`, one row per number."""
    if target.dim() > 1:
        return target.flatten(0, -2)
    return target.view(-1, 1) if reordered else target.view(1, -1)


def _converted(entry: TensorEntry, data: bytearray, rows: int) -> torch.Tensor:
    """Return `rows` rows of the tensor: GGUF blocks as float32, other data in its stored dtype."""
    import numpy as np
    import torch

    if not entry.stored.isupper():
        dtype: torch.dtype = getattr(torch, entry.stored)
        return torch.frombuffer(data, dtype=dtype).view(rows, -1)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # as one long row, because the package converts only sixteen rows at a time; no block is part of two rows
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[entry.stored])).view(rows, -1)


def _head_order(entry: TensorEntry) -> torch.Tensor:
    """Return, for each row in GGUF's order, its row in transformers' order (halves of a head, not pairs)."""
    import torch

    rows = torch.arange(entry.shape[0])
    # transformers' row r = (head, half, i) lies at (head, i, half)
    return rows.view(entry.permuted_heads, 2, -1).transpose(1, 2).reshape(-1)


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


def open_tensors(file: Path) -> Tensors:
    """Open a safetensors file without a config.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return Tensors(
        file,
        {name: TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
         for name, found in safetensors_file.read_header(file).items()},
    )  # fmt: skip


def _open_folder(folder: Path, single: Path | None) -> Checkpoint:
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    read = _read_config(folder, generation)
    quantised = read.get("quantization_config") or read.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise CheckpointError(
            f"{folder}: the weights are quantised by {method!r:.40}, which is not built in; use the original checkpoint, "
            "or a GGUF file of the model"
        )
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
    else:
        raise CheckpointError(f"{folder}: expected model.safetensors or {index.name}, found neither")
    prefix = _left_out(names)
    tensors = {}
    for name, file in names.items():
        found = files[file].get(name)
        if found is None:
            continue  # some indexes list a tied head that no file holds; whoever needs the tensor will miss it
        known = name if name.startswith((prefix, "lm_head.")) else prefix + name
        tensors[known] = TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
    config = _untied(folder, config, tensors)
    if config.encoder is not None:
        own = "lm_head.weight" in tensors
        separate = config.family == "marian" and "model.shared.weight" not in tensors
        config = replace(config, tied=not own, encoder=replace(config.encoder, separate=separate))
    return Checkpoint(folder, tensors, config, generation=generation)


_BARE = {"wte.weight": "transformer.", "embed_tokens.weight": "model.", "shared.weight": "model."}
"""A name that only a checkpoint without the prefix of its head has, and that prefix."""


def _left_out(names: Mapping[str, Path]) -> str:
    """Return the prefix that the names of a checkpoint lack, because only the model below the head was saved.

    T5 has no such prefix: its encoder's layers are blocks.
    """
    if "shared.weight" in names and not any(name.startswith("encoder.layers.") for name in names):
        return ""
    return next((prefix for name, prefix in _BARE.items() if name in names), "")


_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "model.shared.weight", "gpt_neox.embed_in.weight")


def _untied(folder: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry]) -> ModelConfig:
    """Return the config with its own head if the file holds one that differs from the embedding, whatever the config says.

    transformers does so, too: some fine-tuned models trained their head and kept the config.
    """
    head = tensors.get("lm_head.weight")
    embedding = next((tensors[name] for name in _EMBEDDINGS if name in tensors), None)
    if not config.tied or config.encoder is not None or head is None or embedding is None:
        return config
    alike = (head.shape, head.stored) == (embedding.shape, embedding.stored)
    return config if alike and _same_bytes(head, embedding) else replace(config, tied=False)


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, one.nbytes - start)
            if _read_exactly(first, one, size) != _read_exactly(second, other, size):
                return False
    return True


def _read_config(folder: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Read `config.json`.

    Newer encoder–decoder checkpoints keep some fields in `generation_config.json`; these are added.
    """
    config = read_json(folder / "config.json")
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        made = json.loads(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(made, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(made).__name__}")
    return made


_GGUF_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_PLAIN = {"F32": "float32", "F16": "float16", "F64": "float64"}


def _open_gguf(path: Path) -> Checkpoint:
    header, found = gguf_parts.read(path)
    all_tensors = {name: tensor for name, (_, tensor) in found.items()}
    config = configs.from_gguf(header.fields, all_tensors, str(path), _rope_factors(found))
    turned = {"q_proj": config.heads, "k_proj": config.kv_heads} if config.family == "llama" else {}
    tensors = {}
    for file, tensor in found.values():
        name = _hf_name(tensor.name)
        heads = turned.get(name.rpartition("self_attn.")[2].partition(".")[0], 0)
        stored = _GGUF_PLAIN.get(tensor.type, tensor.type)
        tensors[name] = TensorEntry(
            name, file, stored, tensor.shape, tensor.offset, tensor.nbytes, permuted_heads=heads
        )
    return Checkpoint(path, tensors, config, gguf=header.fields, generation=_generation(header.fields))


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


def _rope_factors(tensors: Mapping[str, tuple[Path, gguf_file.GGUFTensor]]) -> tuple[float, ...]:
    """Return the divisors of the rotary frequencies, a tensor of Llama 3.1 and later; empty if the file has none."""
    if "rope_freqs.weight" not in tensors:
        return ()
    path, found = tensors["rope_freqs.weight"]
    if found.type != "F32" or len(found.shape) != 1:
        raise CheckpointError(f"{path}: tensor rope_freqs.weight: expected float32[n], got {found.type}{found.shape}")
    entry = TensorEntry("rope_freqs.weight", path, "float32", found.shape, found.offset, found.nbytes)
    with path.open("rb", buffering=0) as file:
        file.seek(found.offset)
        factors = struct.unpack(f"<{found.shape[0]}f", _read_exactly(file, entry, found.nbytes))
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError(f"{path}: tensor rope_freqs.weight: expected numbers over 0, got {min(factors)}")
    return factors


def _hf_name(name: str) -> str:
    if name in _GGUF_OUTER:
        return _GGUF_OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_BLOCK:
        return f"model.layers.{parts[1]}.{_GGUF_BLOCK[parts[2]]}.{parts[3]}"
    return name
