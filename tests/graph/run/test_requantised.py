"""Test a real model in other kinds of GGUF blocks, split into three files, by its perplexity over English text."""

from __future__ import annotations

import copy
import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ranvier

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "smollm2.yaml"
WINDOW, WINDOWS = 320, 3


def requantised(original: Path, folder: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Write a model's matrices as blocks of `kind`, into three files as `llama-gguf-split` does; return the first."""
    reader = gguf.GGUFReader(original)
    parts = [folder / f"model-{number + 1:05}-of-00003.gguf" for number in range(3)]
    for number, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "llama")
        for field in reader.fields.values():
            if number == 0 and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kinds = field.types
                writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::3]:
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if numbers.ndim == 2:
                writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts[0]


def dequantised(oracle: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """Return the model with the numbers of its blocks: no block is part of two rows, so their order does not matter."""
    made = copy.deepcopy(oracle)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                blocks = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_real_model_in_other_blocks(kind: str, smollm2: Path, oracle: Any, tmp_path: Path, runs: Path) -> None:
    """Have the perplexity of the same numbers in transformers, within one per cent: with bfloat16, and held as stored."""
    number = gguf.GGMLQuantizationType[kind]
    first = requantised(smollm2, tmp_path, number)
    model = dequantised(oracle, number)
    text = pydoc_data.topics.topics["assignment"]
    results = {}
    for weights in ("stored", "dtype"):
        graph = ranvier.load(EXAMPLE, overrides={"model.source": str(first), "model.weights": weights})
        with ranvier.start(graph, runs=runs) as run:
            ids = run.codec.encode(text, special=False)[: WINDOW * WINDOWS]
            scores = [score for at in range(0, len(ids), WINDOW) for score in run.score(ids[at : at + WINDOW])]
        results[weights] = math.exp(-sum(scores) / len(scores))
    with torch.inference_mode():
        expected = []
        for at in range(0, len(ids), WINDOW):
            window = torch.tensor(ids[at : at + WINDOW])
            logits = model(window[None]).logits[0]
            expected.append(logits.log_softmax(-1)[range(len(window) - 1), window[1:]])
    perplexity = math.exp(-float(torch.cat(expected).mean()))
    assert len(ids) == WINDOW * WINDOWS
    assert results["stored"] == pytest.approx(perplexity, rel=0.01)
    assert results["dtype"] == pytest.approx(perplexity, rel=0.01)
