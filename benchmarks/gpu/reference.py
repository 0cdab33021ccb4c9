"""Compute the same layers plainly, without pages or kernels: what the tests and the check compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .shapes import Layer, Shape, Weights


def turns(shape: Shape, positions: int, device: torch.device, theta: float = 1e4) -> torch.Tensor:
    """Return cos and sin of the positions, float32 [positions, 2, D / 2]."""
    inverse = theta ** (-torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack((angle.cos(), angle.sin()), 1).float().to(device)


def random_weights(shape: Shape, dtype: torch.dtype, device: torch.device, positions: int, seed: int = 0) -> Weights:
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
            matrix(1, s.qkv_rows, s.qkv_rows**0.5 * 0.1)[0] if s.qkv_bias else None,
            norm(s.head_width) if s.qk_norm else None, norm(s.head_width) if s.qk_norm else None,
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

    def to(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    layers = [Layer(**{name: to(value) for name, value in vars(layer).items()}) for layer in weights.layers]
    return Weights(layers, weights.turns_PD, to(weights.embedding_VH), to(weights.norm_out_H), to(weights.head_VH))


def forward(shape: Shape, weights: Weights, tokens_t: torch.Tensor) -> torch.Tensor:
    """Return the logits [t, V] of a whole sequence, as a plain model in the weights' dtype computes them."""
    dtype = weights.layers[0].qkv.dtype
    count, width = tokens_t.shape[0], shape.head_width
    at = torch.arange(count, device=tokens_t.device)
    sees = at <= at[:, None]
    if shape.window:
        sees &= at > at[:, None] - shape.window

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
        key, value = key.repeat_interleave(group, 0), value.transpose(0, 1).repeat_interleave(group, 0)
        score = (query @ key.transpose(1, 2)).float() * shape.attention_scale
        share = score.masked_fill(~sees, float("-inf")).softmax(-1).to(dtype)
        hidden = hidden + F.linear((share @ value).transpose(0, 1).reshape(count, -1), layer.out)
        gate, up = F.linear(normed(hidden, layer.norm_mid_H), layer.up).chunk(2, -1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
    return F.linear(normed(hidden, weights.norm_out_H), weights.head_VH).float()
