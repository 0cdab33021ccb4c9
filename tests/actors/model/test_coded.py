"""Hold matrices as codes of 8 and 4 bits, and compare with what the package gguf reads from the same blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from ranvier.actors.checkpoint.tensors import StoredRows
from ranvier.actors.model.coded import Coded, in_4_bits, in_8_bits, of_blocks

ROWS, COLUMNS = 48, 96


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("stored", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_gguf_keep_their_numbers(stored: str, ordered: bool) -> None:
    """Give the numbers of the file, rounded to nothing else, with rows in their order."""
    kind = GGMLQuantizationType[stored]
    wide = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    data: Any = quants.quantize(wide, kind)
    order = np.random.default_rng(2).permutation(ROWS).astype(np.int32) if ordered else None
    exact = quants.dequantize(data, kind)
    part = StoredRows(stored, ROWS, COLUMNS, data.reshape(-1).copy(), order)
    made = Coded([of_blocks(part), of_blocks(part)], torch.float32, "cpu")
    expected = torch.from_numpy(exact if order is None else exact[order])
    torch.testing.assert_close(made.wide(), torch.cat([expected, expected]), rtol=1e-6, atol=1e-7)
    assert made.shape == (2 * ROWS, COLUMNS) and made.nbytes < 2 * ROWS * COLUMNS * (0.7 if made.narrow else 1.1)
    tokens = torch.randn(3, COLUMNS)
    both = torch.cat([expected, expected])
    torch.testing.assert_close(made.multiply(tokens), tokens @ both.t())


@pytest.mark.parametrize(("rounded", "stored"), [(in_8_bits, "Q8_0"), (in_4_bits, "Q4_1")])
def test_rounding_is_as_ggufs(rounded: Any, stored: str) -> None:
    """Round about as well as the package gguf does for the type of the same name."""
    wide = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    wide[0, :32] = 0.0
    kind = GGMLQuantizationType[stored]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(wide.numpy(), kind), kind))
    ours = Coded([rounded(wide)], torch.float32, "cpu").wide()
    errors = [float((made - wide).pow(2).mean().sqrt()) for made in (ours, theirs)]
    assert errors[0] <= 1.05 * errors[1] and not ours[0, :32].any()
