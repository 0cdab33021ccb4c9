"""Test every kind of GGUF block with blocks that llama.cpp has made, and the numbers that llama.cpp reads from them.

`data/blocks.npz` is made by `data/make_blocks.py`. The model is 256 wide, as wide as the largest block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ranvier
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.transport.format.header import Row

DATA = Path(__file__).parent / "data" / "blocks.npz"
KINDS = sorted({name.split(".")[0] for name in np.load(DATA).files})
WIDE = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip


def of_blocks(shape: tuple[int, ...], rows: Any, seed: int) -> Any:
    """Return a matrix whose rows are rows of the data, in a random order."""
    return rows[np.random.default_rng(seed).integers(0, len(rows), shape[0])]


def model_of(path: Path, kind: str) -> Any:
    """Write a qwen2 with matrices of `kind`, and return transformers' model with llama.cpp's numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    data = np.load(DATA)
    torch.manual_seed(1)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **WIDE), dtype=torch.float32).eval()
    config = oracle.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for number, (name, tensor) in enumerate(oracle.state_dict().items()):
        stem, _, end = name.rpartition(".")
        known = f"{names.get_name(stem)}.{end}"
        if tensor.dim() == 1:
            writer.add_tensor(known, tensor.numpy())
            continue
        shape = tuple(tensor.shape)
        writer.add_tensor(
            known, of_blocks(shape, data[f"{kind}.blocks"], number), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
        tensor.copy_(torch.from_numpy(of_blocks(shape, data[f"{kind}.numbers"], number)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return oracle


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_blocks_are_read_as_llama_cpp_reads_them(kind: str, tmp_path: Path) -> None:
    """Give every number of every matrix as llama.cpp does, and the model's scores as transformers does with them."""
    path = tmp_path / "model.gguf"
    oracle = model_of(path, kind)
    checkpoint = open_checkpoint(path)
    for name, tensor in oracle.state_dict().items():
        read = torch.empty_like(tensor)
        checkpoint.read_into(name, read)
        assert torch.equal(read, tensor), name
    tokens = torch.arange(3, 33)
    expected = oracle(tokens[None]).logits[0].log_softmax(-1)[range(29), tokens[1:]]
    actor = load_class(str(BUILT_IN["model"].implementation), None)()
    actor.load(Context("test", {}, lambda _: None, checkpoint, "float32", (0, 1), 64))
    info = ranvier.SessionInfo(session=1, epoch=1, capacity=64, log=tuple(tokens.tolist()), max_tokens=1, score=True)
    actor.open(info)
    made = actor.step(Batch((Row(1, 1, 0, 30),), {"token": tokens}))
    assert (torch.as_tensor(made["scores"]["scores"]) - expected).abs().max() < 1e-4


def test_every_kind_that_the_gguf_package_reads_is_tried() -> None:
    """Have data for all kinds but those of plain numbers, and those that files hold only while they are computed with."""
    from gguf.quants import _type_traits

    readable = {kind.name for kind in _type_traits}
    assert readable - {"F32", "F16", "BF16"} == set(KINDS)
