"""Compare the kernels with plain torch, in Triton's interpreter: pytest, or python benchmarks/gpu/test_step.py."""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from gpu import reference
from gpu.shapes import Attention, Pages, Shape, Tile, Tiles
from gpu.step import Step, prefill

CPU = torch.device("cpu")
PLAIN = Shape(hidden=48, heads=6, kv_heads=2, head_width=16, inner=40, layers=2, vocabulary=70)
CASES = {
    "one token": (PLAIN, "one", 1, [13]),
    "two tokens, page borders": (Shape(32, 2, 2, 16, 40, 1, 70), "many", 1, [8, 17]),
    "window": (Shape(32, 4, 1, 16, 40, 1, 70, window=11), "many", 1, [2, 31, 12]),
    "bias, splits": (Shape(48, 4, 2, 16, 48, 1, 70, qkv_bias=True), "many", 3, [16, 18]),
    "query and key norms": (Shape(32, 2, 1, 32, 40, 1, 70, qk_norm=True), "many", 2, [9]),
}
PAGE = 4


def tiles(kind, shape, splits=1):
    """Small tiles with ragged ends, of one kernel."""
    if kind == "one":
        made = {name: Tile(False, 4, 32) for name in ("qkv", "out", "up", "down", "head")}
    else:
        made = {name: Tile(True, 16, 16, splits) for name in ("qkv", "out", "up", "down", "head")}
    return Tiles(made, Attention(PAGE if splits == 1 else 2 * PAGE, 2 * PAGE, 4, 1), pdl=False)


def poison(step):
    """Fill every buffer that a step must write itself with NaN."""
    b = step.buffers
    for tensor in (
        b.hidden_TH,
        b.normed_TH,
        b.sums,
        b.qkv,
        b.inner_TI,
        b.logits_TV,
        b.best,
        b.parts,
        b.part_ml,
        b.part_sum,
    ):
        tensor.fill_(float("nan"))
    b.attended[: len(step.rows)].fill_(float("nan"))
    b.token_T.fill_(-1)


def decoded(shape, kind, lengths, dtype=torch.float32, splits=1, more=2):
    """Return the step's logits and the reference's, per session: prefill all but `more` tokens, then decode those."""
    torch.manual_seed(1)
    weights = reference.random_weights(shape, dtype, CPU, 64)
    tokens = max(1, 1 << (len(lengths) - 1).bit_length())
    width = 8
    pages = Pages.empty(shape, len(lengths) * width + 3, PAGE, dtype, CPU)
    for held in (*pages.keys, *pages.values):
        held.fill_(float("nan"))
    order = torch.randperm(len(lengths) * width + 3)[: len(lengths) * width].view(-1, width).int()
    texts = [torch.randint(0, shape.vocabulary, (n,)) for n in lengths]
    for text, table in zip(texts, order):
        if len(text) > more:
            half = (len(text) - more) // 2
            if half:
                prefill(shape, weights, pages, table, text[:half], 0)
            prefill(shape, weights, pages, table, text[half:-more], half)
    step = Step(shape, weights, pages, tokens, width, tiles(kind, shape, splits))
    made = []
    for i in range(more):
        step.rows = [
            (int(text[len(text) - more + i]), len(text) - more + i + 1, table.tolist())
            for text, table in zip(texts, order)
        ]
        step.put(step.rows)
        poison(step)
        step()
        made.append(step.buffers.logits_TV[: len(texts)].clone())
        assert torch.equal(step.buffers.logits_TV[: len(texts)].argmax(-1).int(), step.chosen_T[: len(texts)])
        assert not step.buffers.count.any() and not step.buffers.attend_count.any()
    want = [reference.forward(shape, weights, text)[-more:] for text in texts]
    return torch.stack(made, 1), torch.stack(want)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_steps_equal_plain_torch():
    """Give the plain model's logits in float32, to rounding: GQA, windows, ragged lengths, page boundaries."""
    for name, (shape, kind, splits, lengths) in CASES.items():
        a, b = decoded(shape, kind, lengths, splits=splits)
        assert distance(a, b) < 3e-6, (name, distance(a, b))


def test_bfloat16_is_no_worse_than_plain_bfloat16():
    """Keep the error of bfloat16 against float32 within 1.6 times the plain model's own.

    On a device it is 0.5 times. The interpreter rounds to bfloat16 by cutting bits off, which doubles a rounding error.
    """
    shape = Shape(32, 4, 2, 16, 48, 1, 70)
    for kind, lengths in (("one", (20,)), ("many", (13, 20))):
        a, plain = decoded(shape, kind, lengths, torch.bfloat16)
        torch.manual_seed(1)
        exact = reference.cast(reference.random_weights(shape, torch.bfloat16, CPU, 64), torch.float32)
        torch.randperm(len(lengths) * 8 + 3)
        texts = [torch.randint(0, shape.vocabulary, (n,)) for n in lengths]
        want = torch.stack([reference.forward(shape, exact, text)[-2:] for text in texts])
        assert distance(plain, want) > 1e-4
        assert distance(a, want) < 1.6 * distance(plain, want), (kind, distance(a, want), distance(plain, want))


def test_a_rows_bits_do_not_depend_on_the_others():
    """Give a row the same bits beside one other row and beside three others, with the tensor-core kernel."""
    shape = Shape(32, 4, 2, 16, 48, 1, 70)
    weights = reference.random_weights(shape, torch.float32, CPU, 64)
    found = []
    for rows in (2, 4):
        pages = Pages.empty(shape, 8, PAGE, torch.float32, CPU)
        for index, held in enumerate((*pages.keys, *pages.values)):
            held.normal_(generator=torch.Generator().manual_seed(index))
        step = Step(shape, weights, pages, rows, 2, tiles("many", shape, 2))
        step.put([(5 + row, 7, (2 * row, 2 * row + 1)) for row in range(rows)])
        step()
        found.append(step.buffers.logits_TV[0].clone())
    assert torch.equal(*found)


if __name__ == "__main__":
    import time

    for name, test in list(globals().items()):
        if name.startswith("test_"):
            begin = time.time()
            test()
            print(name, f"{time.time() - begin:.1f} s", flush=True)
