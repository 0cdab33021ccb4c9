"""Read GGUF files as others write them: split ones, of any block type, with positions scaled in any spelling."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.checkpoint.config import RopeScaling
from ranvier.actors.checkpoint.hf_positions import context_of
from ranvier.actors.errors import CheckpointError

LAYERS = 3
NAMES = [
    "token_embd", "output_norm", "output",
    *(f"blk.{layer}.{part}" for layer in range(LAYERS) for part in (
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
    )),
]  # fmt: skip


def tensor(name: str) -> Any:
    """Return the values of a tensor of a small llama, other ones for each name."""
    shape = {"token_embd": (40, 64), "output": (40, 64)}.get(name, (64,) if name.endswith("norm") else (64, 64))
    return np.random.default_rng(NAMES.index(name)).normal(size=shape).astype(np.float32)


def write(
    path: Path,
    wanted: Callable[[str], bool] = lambda _name: True,
    more: Callable[[Any], None] = lambda _writer: None,
    kind: gguf.GGMLQuantizationType | None = None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a file with the wanted tensors; `kind` is the type of the matrices."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    more(writer)
    for name in filter(wanted, NAMES):
        values = tensor(name)
        if kind is not None and values.ndim == 2:
            writer.add_tensor(f"{name}.weight", blocks(kind, values.shape), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
    """Return bytes for a matrix, the same ones for each."""
    elements, size = GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(1).integers(0, 256, (shape[0], shape[1] // elements * size), dtype=np.uint8)
    made.reshape(shape[0], -1, size)[..., : size - elements // 2] = 0x20  # scales that are numbers
    return made


def part(number: int, count: int = 3) -> Callable[[Any], None]:
    def add(writer: Any) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(NAMES))

    return add


def of_part(number: int) -> Callable[[str], bool]:
    """Return whether a tensor is in this part: one layer each, and what is in no layer in the first."""
    return lambda name: f"blk.{number}." in name or (number == 0 and "blk" not in name)


def split(folder: Path) -> list[Path]:
    """Write the small llama as three files, a layer each."""
    return [
        write(
            folder / f"m-{number + 1:05}-of-00003.gguf",
            of_part(number),
            part(number),
        )
        for number in range(3)
    ]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_split_file_is_read_as_a_whole(given: int, tmp_path: Path) -> None:
    """Find all parts of a model, whichever of them is given."""
    opened = open_checkpoint(split(tmp_path)[given])
    whole = open_checkpoint(write(tmp_path / "whole.gguf"))
    assert opened.tensors.keys() == whole.tensors.keys()
    assert opened.config == whole.config
    for name, entry in whole.tensors.items():
        ours, theirs = torch.empty(entry.shape), torch.empty(entry.shape)
        opened.read_into(name, ours)
        whole.read_into(name, theirs)
        assert torch.equal(ours, theirs), name


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    """Name the file that is missing."""
    files = split(tmp_path)
    files[1].unlink()
    with pytest.raises(
        CheckpointError, match=re.escape(f"{files[1]}: no such file; {files[0].name} is one of 3 files")
    ):
        open_checkpoint(files[0])


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    """Refuse parts that do not belong together: another number, or a tensor in two of them."""
    files = split(tmp_path)
    write(files[1], lambda name: "blk.1." in name, part(2))
    with pytest.raises(CheckpointError, match="file 2 of 3 does not belong to the others: expected split.no"):
        open_checkpoint(files[0])
    write(files[1], lambda name: "blk.0." in name, part(1))
    with pytest.raises(CheckpointError, match="is in two of its 3 files"):
        open_checkpoint(files[0])


def test_a_part_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    """Ask for the name that tells the parts, where a file says that it is one of several."""
    files = split(tmp_path)
    with pytest.raises(CheckpointError, match="one of 3 files of a split model; give it its name"):
        open_checkpoint(files[0].rename(tmp_path / "renamed.gguf"))


def test_a_big_endian_file_says_so(tmp_path: Path) -> None:
    """Name the byte order, and how to change it."""
    with pytest.raises(CheckpointError, match="a big-endian file, expected a little-endian one; convert it"):
        open_checkpoint(write(tmp_path / "big.gguf", endian=gguf.GGUFEndian.BIG))


def test_blocks_of_nvfp4(tmp_path: Path) -> None:
    """Read NVFP4 as the gguf package does."""
    kind = gguf.GGMLQuantizationType.NVFP4
    opened = open_checkpoint(write(tmp_path / "m.gguf", kind=kind))
    expected = gguf.quants.dequantize(blocks(kind, (64, 64)), kind)
    made = torch.empty(64, 64)
    opened.read_into("model.layers.1.mlp.down_proj.weight", made)
    assert torch.equal(made, torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("spelling", ["typed", "factor alone", "older name"])
def test_linear_scaling_in_all_spellings(spelling: str, tmp_path: Path) -> None:
    """Scale positions where a file names the type, only the factor, or the factor by its older name."""

    def more(writer: Any) -> None:
        if spelling == "typed":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        if spelling == "older name":
            writer.add_float32("llama.rope.scale_linear", 4.0)
        else:
            writer.add_rope_scaling_factor(4.0)

    assert open_checkpoint(write(tmp_path / "m.gguf", more=more)).config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(("family", "rope", "expected"), [
    ("llama", {"rope_type": "linear", "factor": 4.0}, 256), ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64), ("llama", {"rope_type": "llama3", "factor": 8.0}, 64),
    ("gemma3_text", {"rope_type": "linear", "factor": 8.0}, 64), ("llama", {}, 64), ("llama", {"rope_type": "dynamic", "factor": 2.0}, 128),
    ("llama", {"rope_type": "linear", "factor": "x"}, 64),
])  # fmt: skip
def test_the_context_is_what_scaling_gives(family: str, rope: dict[str, Any], expected: int) -> None:
    """Offer the positions that scaled frequencies reach, unless the config gives that number already."""
    assert context_of(family, 64, rope) == expected
