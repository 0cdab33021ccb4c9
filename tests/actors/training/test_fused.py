"""Check fused.c against torch's operations and their autograd in float64, forward and backward.

Each test runs with every instruction set that this processor has.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ranvier.actors.model.rotary import rotate
from ranvier.actors.training import fused

pytestmark = pytest.mark.skipif(not fused.libraries(), reason="no AVX2, or fused.c was not compiled")


@pytest.fixture(params=list(fused.libraries()), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with one of the instruction sets."""
    monkeypatch.setattr(fused, "library", lambda: fused.libraries()[request.param])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that values differ by at most 2e-6 of the largest expected value."""
    scale = float(expected.abs().max())
    assert float((got.double() - expected).abs().max()) <= 2e-6 * scale


@pytest.mark.parametrize("more", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 48), (1, 16), (384, 192), (3, 7, 64)])
def test_root_mean_square(shape: tuple[int, ...], more: float) -> None:
    """Match RMS normalisation, whose weight is increased by `more`, and its gradients."""
    torch.manual_seed(1)
    x, weight, given = torch.randn(shape) * 3, torch.randn(shape[-1]), torch.randn(shape)
    mine = [each.clone().requires_grad_() for each in (x, weight)]
    made = fused.root_mean_square(mine[0], mine[1], 1e-5, more)
    made.backward(given)
    theirs = [each.double().requires_grad_() for each in (x, weight)]
    expected = theirs[0] * torch.rsqrt(theirs[0].pow(2).mean(-1, keepdim=True) + 1e-5) * (theirs[1] + more)
    expected.backward(given.double())
    close(made.detach(), expected.detach())
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        close(one.grad, other.grad)


def test_swiglu() -> None:
    """Match SwiGLU and its gradient, also where the exponential overflows or underflows.

    Gate and up are the two halves of one tensor."""
    torch.manual_seed(1)
    wide = torch.cat((torch.randn(9, 96) * 4, torch.tensor([[-200.0, -90, -88, -1e-8, 0, 1e-8, 88, 200] * 12])))
    given = torch.randn(10, 48)
    mine, theirs = wide.clone().requires_grad_(), wide.double().requires_grad_()
    made = fused.swiglu(mine)
    made.backward(given)
    gate, up = theirs.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(given.double())
    assert mine.grad is not None and theirs.grad is not None
    for got, right in ((made.detach(), expected.detach()), (mine.grad, theirs.grad)):
        assert torch.allclose(got.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 8), (4, 4, 32), (3, 1, 6)])
def test_heads(heads: int, kv_heads: int, width: int) -> None:
    """Match the queries, keys and values of a joint projection, with rotary embedding, and the gradient."""
    torch.manual_seed(1)
    batch, sequence = 3, 5
    qkv = torch.randn(batch * sequence, (heads + 2 * kv_heads) * width)
    angles = torch.randn(sequence, width)
    cos, sin = angles.cos(), angles.sin()  # the two halves differ, as longrope's may
    given = [torch.randn(batch, count, sequence, width) for count in (heads, kv_heads, kv_heads)]
    mine, theirs = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    made = fused.heads(mine, cos, sin, heads, kv_heads)
    torch.autograd.backward(list(made), given)
    whole = theirs.view(-1, heads + 2 * kv_heads, width)
    turned = rotate(whole[:, : heads + kv_heads], cos.double().repeat(batch, 1), sin.double().repeat(batch, 1))
    expected = [
        each.view(batch, sequence, -1, width).transpose(1, 2)
        for each in (turned[:, :heads], turned[:, heads:], whole[:, heads + kv_heads :])
    ]
    torch.autograd.backward(expected, [each.double() for each in given])
    for got, right in zip(made, expected, strict=True):
        close(got.detach(), right.detach())
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad)


def test_what_is_not_for_it() -> None:
    """Leave half precision, and widths that are no multiple of 16, to torch."""
    assert fused.able(48, torch.empty(1))
    assert not fused.able(48, torch.empty(1, dtype=torch.bfloat16))
    assert not fused.able(40, torch.empty(1))
