"""Measure products of packed weights and tokens: the kernels of this package against torch's, on one core.

The weights are a matrix of 3072 x 576, as in SmolLM2's feed-forward part, in 24 copies, which no cache holds.
torchao uses these products of torch on a CPU. The figures are microseconds for 1 and for 8 tokens. A product is only
part of a step: the kernels do the other thirty operations of a layer, too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import report
import torch
from report import Answer, Goal

from ranvier.actors.model.kernels import packed

ROWS, COLUMNS, GROUP, COPIES = 3072, 576, 32, 24
Product = Callable[[torch.Tensor], torch.Tensor]


def _torch_int8(weight: torch.Tensor) -> Product:
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale[:, None]).round().to(torch.int8)
    narrow = scale.bfloat16()
    return lambda tokens: torch.ops.aten._weight_int8pack_mm(tokens, whole, narrow)


def _torch_int4(weight: torch.Tensor) -> Product:
    blocks = weight.view(ROWS, -1, GROUP)
    least, most = blocks.amin(-1), blocks.amax(-1)
    scale = (most - least) / 15
    whole = ((blocks - least[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(ROWS, COLUMNS)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    both = torch.stack((scale, least + 8 * scale), -1).transpose(0, 1).contiguous().bfloat16()
    return lambda tokens: torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, packed, GROUP, both)


def _torch_bfloat16(weight: torch.Tensor) -> Product:
    narrow = weight.bfloat16()
    return lambda tokens: torch.nn.functional.linear(tokens, narrow)


PEERS = {"bfloat16": _torch_bfloat16, "int8": _torch_int8, "int4": _torch_int4}
OURS = {"bfloat16": packed.pack_bfloat16, "int8": packed.pack_int8, "int4": packed.pack_int4}


def ask(rounds: int) -> Answer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    measures: dict[str, Callable[[], float]] = {}
    for kind, count in itertools.product(OURS, (1, 8)):
        tokens = torch.randn(count, COLUMNS).bfloat16()
        both = {
            "ranvier": [OURS[kind](weight).multiply for _ in range(COPIES)],
            "torch": [PEERS[kind](weight) for _ in range(COPIES)],
        }
        exact = tokens.float() @ weight.T
        for who, products in both.items():
            off = float((products[0](tokens).float() - exact).norm() / exact.norm())
            assert off < 0.12, f"{who} {kind} is off by {off:.3f}: it multiplies something else"
            measures[f"{who}, {kind}, {count} tokens"] = _timed(products, tokens)
    figures = report.in_turn(measures, rounds)
    pairs = [f"{kind}, {count} tokens" for kind, count in itertools.product(OURS, (1, 8))]
    return Answer("microseconds", figures, [Goal(f"ranvier, {pair}", f"torch, {pair}", less=True) for pair in pairs])


def _timed(products: list[Product], tokens: torch.Tensor) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        for _ in range(5):
            for product in products:
                product(tokens)
        return (time.perf_counter() - began) / (5 * len(products)) * 1e6

    return measure
