"""Compute llama-family layers plainly, without pages or kernels: what the kernels of a GPU are compared with.

Shape suffixes as in ranvier.actors.model.gpu.shapes; t tokens of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from ranvier.actors.checkpoint.quantised import Codes
from ranvier.actors.model.coded import Coded
from ranvier.actors.model.gpu.shapes import Layer, Pages, Shape, Weights


def turns(shape: Shape, positions: int, device: torch.device, theta: float = 1e4) -> torch.Tensor:
    """Return cos and sin of the positions, float32 [positions, 2, D / 2]."""
    inverse = theta ** (-torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack((angle.cos(), angle.sin()), 1).float().to(device)


def random_weights(
    shape: Shape, dtype: torch.dtype, device: torch.device, positions: int, *, seed: int = 0, window: int = 0,
    qkv_bias: bool = False, qk_norm: bool = False,
) -> Weights:  # fmt: skip
    """Return random weights whose products keep their size."""
    generator = torch.Generator(device=device).manual_seed(seed) if device.type != "meta" else None

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=dtype, device=device)
        return made.normal_(0, gain * columns**-0.5, generator=generator)

    def norm(count: int) -> torch.Tensor:
        made = torch.empty(count, dtype=dtype, device=device)
        return made.uniform_(0.5, 1.5, generator=generator)

    s, wide = shape, shape.heads * shape.head_width
    layers = [
        Layer(
            norm(s.hidden), matrix(s.qkv_rows, s.hidden), matrix(s.hidden, wide), norm(s.hidden),
            matrix(2 * s.inner, s.hidden), matrix(s.hidden, s.inner),
            matrix(1, s.qkv_rows, s.qkv_rows**0.5 * 0.1)[0] if qkv_bias else None,
            norm(s.head_width) if qk_norm else None, norm(s.head_width) if qk_norm else None, window,
        )
        for _ in range(s.layers)
    ]  # fmt: skip
    embedding = matrix(s.vocabulary, s.hidden, s.hidden**0.5)
    table = (
        turns(shape, positions, device)
        if device.type != "meta"
        else torch.empty(positions, 2, s.head_width // 2, device=device)
    )
    return Weights(layers, table, embedding, norm(s.hidden), matrix(s.vocabulary, s.hidden))


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """Return the same weights in another dtype."""

    def to(value: object) -> object:
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    layers = [Layer(**{name: to(value) for name, value in vars(layer).items()}) for layer in weights.layers]
    return Weights(layers, weights.turns_PD, to(weights.embedding_VH), to(weights.norm_out_H), to(weights.head_VH))


def coded(weights: Weights, rounded: Callable[[torch.Tensor], Codes], device: str = "cpu") -> tuple[Weights, Weights]:
    """Return the weights with coded matrices, and with the numbers that those stand for."""
    made: tuple[list[Layer], list[Layer]] = [], []
    matrices = ("qkv", "out", "up", "down")

    def both(matrix: torch.Tensor) -> tuple[Coded, torch.Tensor]:
        one = Coded([rounded(matrix)], matrix.dtype, device)
        return one, one.wide()

    for layer in weights.layers:
        pairs = {name: both(getattr(layer, name)) for name in matrices}
        for at, layers in enumerate(made):
            layers.append(replace(layer, **{name: pair[at] for name, pair in pairs.items()}))
    heads = both(weights.head_VH)
    one, other = (replace(weights, layers=layers, head_VH=heads[at]) for at, layers in enumerate(made))
    return one, other


def fill(pages: Pages, table: Sequence[int], kept: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int) -> None:
    """Write the keys and values of a text's first `count` tokens, as `forward` has kept them, into its pages."""
    at_t = torch.arange(count, device=pages.keys[0].device)
    where = torch.tensor(table, device=at_t.device)[at_t // pages.page], at_t % pages.page
    for index, (key_KtD, value_KtD) in enumerate(kept):
        pages.keys[index][where[0], :, where[1]] = key_KtD[:, :count].transpose(0, 1)
        pages.values[index][where[0], :, where[1]] = value_KtD[:, :count].transpose(0, 1)


def forward(
    shape: Shape, weights: Weights, tokens_t: torch.Tensor, kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
) -> torch.Tensor:
    """Return the logits [t, V] of a whole text, as a plain model in the weights' dtype computes them.

    Each layer's keys and values, [K, t, D], are appended to `kept`.
    """
    dtype = weights.layers[0].qkv.dtype
    count, width = tokens_t.shape[0], shape.head_width
    at = torch.arange(count, device=tokens_t.device)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + shape.eps).rsqrt()).to(dtype)

    cos, sin = (torch.cat((half, half), -1).to(dtype)[:, None] for half in weights.turns_PD[:count].unbind(1))

    def turned(x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat((-two, one), -1) * sin

    hidden = F.embedding(tokens_t, weights.embedding_VH)
    for layer in weights.layers:
        qkv = F.linear(normed(hidden, layer.norm_in_H), layer.qkv, layer.qkv_bias).view(count, -1, width)
        query, key, value = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        if layer.norm_query_D is not None:
            query, key = normed(query, layer.norm_query_D), normed(key, layer.norm_key_D)
        query, key = turned(query).transpose(0, 1), turned(key).transpose(0, 1)
        group = shape.heads // shape.kv_heads
        if kept is not None:
            kept.append((key, value.transpose(0, 1)))
        sees = at <= at[:, None]
        if layer.window:
            sees &= at > at[:, None] - layer.window
        key, value = key.repeat_interleave(group, 0), value.transpose(0, 1).repeat_interleave(group, 0)
        score = (query @ key.transpose(1, 2)).float() * shape.attention_scale
        share = score.masked_fill(~sees, float("-inf")).softmax(-1).to(dtype)
        hidden = hidden + F.linear((share @ value).transpose(0, 1).reshape(count, -1), layer.out)
        gate, up = F.linear(normed(hidden, layer.norm_mid_H), layer.up).chunk(2, -1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
    return F.linear(normed(hidden, weights.norm_out_H), weights.head_VH).float()
