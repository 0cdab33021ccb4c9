"""Refuse damaged model files before the run, naming file and tensor, and read good ones exactly."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ranvier
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.errors import CheckpointError
from ranvier.actors.model import weights

CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Return random weights for `CONFIG`, by name."""
    generator = torch.Generator().manual_seed(1)
    config = ranvier_config()
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in weights.needs(BUILT_IN["model"], config, (0, config.layers - 1))
    }


def ranvier_config() -> Any:
    """Return `CONFIG` as Ranvier reads it."""
    from ranvier.actors.checkpoint.hf_config import from_hf

    return from_hf(CONFIG, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a valid small checkpoint, and return its folder."""
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def rewrite(file: Path, change: Callable[[dict[str, Any]], None] | None = None, raw: str | None = None) -> None:
    """Change the header of a safetensors file, and keep its data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if change is not None:
        change(header)
    text = (raw or json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def load_graph(folder: Path) -> ranvier.Graph:
    """Load a graph over the checkpoint, as a user would."""
    path = folder / "graph.yaml"
    path.write_text(
        json.dumps(
            {
                "ranvier": 1,
                "name": "t",
                "model": {"source": "./"},
                "actors": {"all": {"kind": "model"}},
                "pipeline": ["all"],
            }
        )
    )
    return ranvier.load(path)


def test_a_good_checkpoint_loads(folder: Path) -> None:
    """Load a valid checkpoint, and plan 2 bytes per weight."""
    graph = load_graph(folder)
    assert ranvier.plan(graph).hosts[0].weight_bytes == sum(t.numel() for t in tensors().values()) * 2


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("32 wrong dtype", lambda h: h[Q].update(dtype="I32"), f"model.safetensors: tensor {Q}: expected floating-point weights, got int32"),
        ("32 unknown dtype", lambda h: h[Q].update(dtype="F7"), f"tensor {Q}: dtype 'F7' is not one of"),
        ("33 missing", lambda h: h.pop(Q), f"tensor {Q} is missing"),
        ("33 wrong shape", lambda h: h[Q].update(shape=[16, 64]), f"tensor {Q}: expected shape (32, 32), got (16, 64)"),
        ("34 overlap", lambda h: h[Q].update(data_offsets=[0, 4096]), "overlap"),
        ("34 overflow", lambda h: h[Q].update(data_offsets=[1 << 60, (1 << 60) + 4096]), f"tensor {Q}: ends at byte"),
        ("34 negative", lambda h: h[Q].update(data_offsets=[-4096, 0]), f"tensor {Q}: expected sizes and offsets from 0"),
        ("34 length", lambda h: h[Q].update(data_offsets=[0, 8]), f"tensor {Q}: expected 4096 bytes for float32[32, 32]"),
        ("34 huge shape", lambda h: h[Q].update(shape=[1 << 62, 1 << 62]), f"tensor {Q}: expected"),
        ("entry is no object", lambda h: h.update({Q: 5}), f"tensor {Q}: expected dtype, shape and data_offsets"),
    ],
)  # fmt: skip
def test_a_damaged_header_cases_32_to_34(name: str, change: Any, words: str, folder: Path) -> None:
    """Refuse a damaged safetensors header in the check of the graph, before anything starts (cases 32 to 34)."""
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(ranvier.GraphError) as caught:
        load_graph(folder)
    assert words in str(caught.value)


def test_truncated_case_31(folder: Path) -> None:
    """Refuse a file that is cut off anywhere, in the header or in the data (case 31)."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ranvier.GraphError, match=r"model.safetensors: .*(truncated|claims|has \d+ bytes)"):
            load_graph(folder)


def test_a_name_twice_case_34(folder: Path) -> None:
    """Refuse a header that names a tensor twice (case 34). A plain JSON parser would keep the last one."""
    file = folder / "model.safetensors"
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    header = file.read_bytes()[8 : 8 + length].decode()
    entry = json.dumps({Q: json.loads(header)[Q]})[1:-1]
    rewrite(file, raw="{" + entry + "," + header.strip()[1:])
    with pytest.raises(ranvier.GraphError, match=f"tensor {Q} appears twice"):
        load_graph(folder)


def test_a_header_that_claims_2_to_the_63_case_35(folder: Path) -> None:
    """Allocate nothing for a header that claims 2^63 bytes (case 35)."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 63) + data[8:])
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="the header claims 9223372036854775808 bytes"):
        open_checkpoint(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_pickle_as_a_model_case_41(folder: Path) -> None:
    """Refuse a pickle as a model, whatever its suffix, and never run it (case 41)."""
    canary = folder / "canary"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    for name in ("model.safetensors", "pickle.gguf"):
        (folder / name).write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ranvier.GraphError):
        load_graph(folder)
    with pytest.raises(CheckpointError, match="expected the magic"):
        open_checkpoint(folder / "pickle.gguf")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(CheckpointError, match="expected a .gguf file"):
        open_checkpoint(folder / "pytorch_model.bin")
    assert not canary.exists()


def test_shards_stay_in_their_folder_case_42(folder: Path) -> None:
    """Refuse a shard index that points out of its folder (case 42)."""
    (folder / "model.safetensors").unlink()
    for bad in ("../x.safetensors", "/etc/passwd", "", 5):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: bad}}))
        with pytest.raises(CheckpointError, match=f"tensor {Q}: expected a file of the same folder"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "bert"},
            "model_type 'bert' is not built in, and transformers knows no causal model of that type",
        ),
        ({"hidden_size": None}, "hidden"),
        ({"hidden_size": -4}, "hidden_size: expected a whole number from 1 to 16777216, got -4"),
        ({"num_key_value_heads": 3}, "expected heads as a multiple of 3 key-value heads, got 4"),
        ({"vocab_size": "many"}, "vocab_size: expected a whole number from 1 to 16777216, got 'many'"),
    ],
)
def test_a_config_that_cannot_be(change: dict[str, Any], words: str, folder: Path) -> None:
    """Refuse an impossible config.json, and name the field."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "gelu_fast"}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}],
)
def test_what_the_native_blocks_do_not_have_is_left_to_transformers(change: dict[str, Any], folder: Path) -> None:
    """Leave a known family with an unsupported feature to transformers, rather than compute it wrongly."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    assert not open_checkpoint(folder).config.native
    assert open_checkpoint(folder).config.layers == CONFIG["num_hidden_layers"]


# -- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, kind: gguf.GGMLQuantizationType | None = None, **leave_out: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a small llama as GGUF with the gguf package.

    Return the values as the file's type stores them, by transformers' names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    held = {}
    for name, tensor in tensors().items():
        data = tensor.numpy()
        short = next(s for n, s in names.items() if n in name)
        gguf_name = short if short.endswith("weight") else f"blk.0.{short}.weight"
        if kind is not None and data.ndim == 2:
            quantised = gguf.quants.quantize(permuted(data, gguf_name), kind)
            held[name] = back(gguf.quants.dequantize(quantised, kind), gguf_name)
            writer.add_tensor(gguf_name, quantised, raw_dtype=kind)
        else:
            held[name] = data
            writer.add_tensor(gguf_name, permuted(data, gguf_name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def permuted(data: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Reorder the rows of q and k from halves of a head to pairs, as llama.cpp's convert script does."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2] if "." in name and name.startswith("blk") else "", 0)
    if not heads:
        return data
    return np.ascontiguousarray(
        data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
    )


def back(data: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Undo `permuted`."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2] if "." in name and name.startswith("blk") else "", 0)
    if not heads:
        return data
    return data.reshape(heads, data.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(data.shape)


@pytest.mark.parametrize(
    "kind",
    [None, *(gguf.GGMLQuantizationType[n] for n in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))],
    ids=str,
)
def test_gguf_types_are_read_as_the_package_reads_them(kind: Any, tmp_path: Path) -> None:
    """Read every tensor type as the gguf package does, with q and k in transformers' order."""
    file = tmp_path / "m.gguf"
    held = write_gguf(file, kind)
    checkpoint = open_checkpoint(file)
    assert checkpoint.config.tied
    for name, expected in held.items():
        target = torch.empty(expected.shape)
        checkpoint.read_into(name, target)
        assert np.array_equal(target.numpy(), expected), name


@pytest.mark.parametrize("cut", [0, 3, 8, 20, 100, 300, 700, -1, -5000])
def test_truncated_gguf_case_31(cut: int, tmp_path: Path) -> None:
    """Refuse a GGUF file that is cut off anywhere (case 31)."""
    file = tmp_path / "m.gguf"
    write_gguf(file)
    data = file.read_bytes()
    file.write_bytes(data[:cut] if cut >= 0 else data[: len(data) + cut])
    with pytest.raises(CheckpointError, match="m.gguf: "):
        open_checkpoint(file)


def patched(file: Path, old: bytes, new: bytes) -> None:
    """Replace the first `old` in the file by `new`."""
    data = file.read_bytes()
    assert data.count(old) >= 1
    file.write_bytes(data.replace(old, new, 1))


def test_damaged_gguf_cases_32_to_35(tmp_path: Path) -> None:
    """Refuse a damaged GGUF file (cases 32 to 35).

    The damages are an unknown type, a missing tensor, a name twice, overlapping and overflowing offsets, and claims of
    2^63."""
    file = tmp_path / "m.gguf"

    def entry(name: str, kind: int, offset: int) -> bytes:
        shape = (32, 32)
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I2QIQ", 2, *shape, kind, offset)

    write_gguf(file)
    header_q = entry("blk.0.attn_q.weight", 0, 0)[: 8 + 19 + 4 + 16]
    at = file.read_bytes().index(header_q) + len(header_q)
    kind, offset = struct.unpack("<IQ", file.read_bytes()[at : at + 12])
    cases = {
        "unknown type 77": struct.pack("<IQ", 77, offset),
        "needs bytes": struct.pack("<IQ", kind, 1 << 62),
        "overlap": struct.pack("<IQ", kind, offset - 32),
        "is not aligned": struct.pack("<IQ", kind, offset + 1),
    }
    for words, patch in cases.items():
        write_gguf(file)
        data = file.read_bytes()
        file.write_bytes(data[:at] + patch + data[at + 12 :])
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(file)
    write_gguf(file)
    patched(file, b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    with pytest.raises(CheckpointError, match=f"tensor {Q} is missing"):
        weights.check(open_checkpoint(file), BUILT_IN["model"], (0, 0))
    write_gguf(file)
    patched(file, b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight")
    with pytest.raises(CheckpointError, match="tensor blk.0.attn_q.weight appears twice"):
        open_checkpoint(file)
    write_gguf(file)
    data = file.read_bytes()
    tracemalloc.start()
    for place in (8, 16, 24):  # tensor count, field count, the first key's length
        file.write_bytes(data[:place] + struct.pack("<Q", 1 << 63) + data[place + 8 :])
        with pytest.raises(CheckpointError, match="9223372036854775808"):
            open_checkpoint(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_ends_while_it_is_read(folder: Path) -> None:
    """Name the tensor that cannot be read when a file shrinks after the check."""
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(CheckpointError, match=f"tensor {Q}: truncated"):
        checkpoint.read_into(Q, torch.empty(32, 32))


def test_hosts_open_only_their_own_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read exactly the tensors that each kind of actor needs."""
    from ranvier.actors.checkpoint import Checkpoint
    from ranvier.actors.component.actor import Context
    from ranvier.actors.model.causal import BlocksActor, Embedding
    from ranvier.actors.model.head import Head

    read: list[str] = []
    original = Checkpoint.read_into
    monkeypatch.setattr(
        Checkpoint, "read_into", lambda self, name, target: (read.append(name), original(self, name, target))[1]
    )
    checkpoint = open_checkpoint(folder)
    for kind, name, layers in ((Embedding, "embedding", None), (BlocksActor, "blocks", (0, 0)), (Head, "head", None)):
        read.clear()
        kind().load(Context("t", {}, lambda _: None, checkpoint, "float32", layers, 8))
        assert sorted(read) == sorted(n for n, _ in weights.needs(BUILT_IN[name], checkpoint.config, layers))


def test_the_table_of_types_is_ggufs() -> None:
    """Match the gguf package in the number, name, block size and bytes per block of every type in the table.

    Types that the package added later may be missing from the table."""
    from gguf.constants import GGML_QUANT_SIZES

    from ranvier.actors.checkpoint.gguf_file import _TYPES

    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert len(_TYPES) > 25
    assert {number: theirs[number] for number in _TYPES if number in theirs} == _TYPES
