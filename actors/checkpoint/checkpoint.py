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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranvier.transport.files import read_bounded

from ..errors import CheckpointError
from . import config as configs
from . import gguf_file, safetensors_file
from .config import ModelConfig
from .hf_config import from_hf

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 18
"""Elements converted at a time: 1 MiB of float32, which stays in the processor's cache."""
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
    """Hold what `open_checkpoint` has found; `gguf` is the metadata of a GGUF file, which includes its tokenizer."""

    config: ModelConfig
    gguf: Mapping[str, Any] | None = None


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
    config = from_hf(_read_config(folder), str(folder / "config.json"))
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
    bare_gpt2 = config.family == "gpt2" and "wte.weight" in names  # names as in OpenAI's upload of gpt2
    tensors = {}
    for name, file in names.items():
        found = files[file].get(name)
        if found is None:
            raise CheckpointError(f"{file}: tensor {name} is missing, though {index.name} says it is here")
        known = f"transformer.{name}" if bare_gpt2 else name
        tensors[known] = TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
    if config.encoder is not None:
        own = "lm_head.weight" in tensors
        separate = config.family == "marian" and "model.shared.weight" not in tensors
        config = replace(config, tied=not own, encoder=replace(config.encoder, separate=separate))
    return Checkpoint(folder, tensors, config)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`.

    Newer encoder–decoder checkpoints keep some fields in `generation_config.json`; these are added.
    """
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if config.get("is_encoder_decoder") and generation.exists():
        defaults = read_json(generation)
        named = ("decoder_start_token_id", "eos_token_id", "bad_words_ids", "forced_bos_token_id")
        config |= {name: defaults[name] for name in named if defaults.get(name) is not None}
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
    header = gguf_file.read_header(path)
    config = configs.from_gguf(header.fields, header.tensors, str(path), _rope_factors(path, header))
    turned = {"q_proj": config.heads, "k_proj": config.kv_heads} if config.family == "llama" else {}
    tensors = {}
    for found in header.tensors.values():
        name = _hf_name(found.name)
        heads = turned.get(name.rpartition("self_attn.")[2].partition(".")[0], 0)
        stored = _GGUF_PLAIN.get(found.type, found.type)
        tensors[name] = TensorEntry(name, path, stored, found.shape, found.offset, found.nbytes, permuted_heads=heads)
    return Checkpoint(path, tensors, config, gguf=header.fields)


def _rope_factors(path: Path, header: gguf_file.GGUFHeader) -> tuple[float, ...]:
    """Return the divisors of the rotary frequencies, a tensor of Llama 3.1 and later; empty if the file has none."""
    found = header.tensors.get("rope_freqs.weight")
    if found is None:
        return ()
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
