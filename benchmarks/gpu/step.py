"""Decode one token of several sessions as one CUDA graph, and prefill prompts with torch.

A `Group` holds the layers, their pages and one `Step` per (rows, pages per row). A step's graph begins with one copy
from pinned memory (tokens, lengths, page table) and ends with one copy back (the chosen tokens). Without a GPU the same
launches run one by one in Triton's interpreter.

Shape suffixes as in `shapes.py`; t tokens of one prompt, p positions that they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton

from .launches import Buffers, Launch, Wiring, input_count, input_parts
from .shapes import (
    PRODUCTS,
    Attention,
    Layer,
    Pages,
    Shape,
    Tile,
    Tiles,
    Weights,
    above,
    attention_candidates,
    candidates,
    default_tiles,
)

LEAST_GAIN = 0.005
"""How much faster other tiles must be than those that are kept; less is noise."""
WARM_RUNS = 2
"""Runs before a capture: they load the kernels."""


class Step:
    """Hold one decode step of `tokens` rows with up to `width` pages each; all memory is taken here."""

    def __init__(self, shape: Shape, weights: Weights, pages: Pages, tokens: int, width: int, tiles: Tiles) -> None:
        device = weights.layers[0].qkv.device
        dtype = weights.layers[0].qkv.dtype
        self.tokens, self.width, self.tiles = tokens, width, tiles
        self.buffers = Buffers.of(shape, tokens, width, pages.page, tiles, dtype, device)
        pinned = device.type == "cuda"
        self.inputs = torch.zeros(input_count(tokens, width), dtype=torch.int32, pin_memory=pinned)
        self.chosen_T = torch.zeros(tokens, dtype=torch.int32, pin_memory=pinned)
        """The last kernel writes here: pinned memory, which spares a copy."""
        self.buffers.token_T = self.chosen_T
        self.launches: list[Launch] = Wiring(shape, weights, pages, self.buffers, width, tiles).launches()
        self._graph: torch.cuda.CUDAGraph | None = None

    def put(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Write the inputs: per row the token, the length with that token, and the pages. Rows left over are idle."""
        tokens_T, lengths_T, table_TW = input_parts(self.inputs, self.tokens)
        tokens_T.zero_()
        lengths_T.zero_()
        for index, (token, length, pages) in enumerate(rows):
            tokens_T[index] = token
            lengths_T[index] = length
            table_TW[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def run(self) -> None:
        """Launch everything once on the current stream."""
        self.buffers.inputs.copy_(self.inputs, non_blocking=True)
        for launch in self.launches:
            launch.run()

    def capture(self) -> None:
        """Capture the step. Idle rows (length 0) write no key and no value, so warm runs leave the pages alone."""
        kept = self.inputs.clone()
        self.inputs.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                self.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run()
        self.inputs.copy_(kept)
        self._graph = graph

    def __call__(self) -> None:
        """Replay the captured step, or run it where there is no graph."""
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()


class Group:
    """Hold a group of layers on one device, its pages and its steps."""

    def __init__(self, shape: Shape, weights: Weights, pages: Pages, pdl: bool | None = None) -> None:
        self.shape, self.weights, self.pages = shape, weights, pages
        self.device = weights.layers[0].qkv.device
        cuda = self.device.type == "cuda"
        self.pdl = (cuda and torch.cuda.get_device_capability(self.device) >= (9, 0)) if pdl is None else pdl
        self.cores = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 132
        self.products: dict[int, Mapping[str, Tile]] = {}
        """Measured tiles of the products, by rows."""
        self.attentions: dict[tuple[int, int], Attention] = {}
        """Measured cuts of the attention, by rows and pages per row."""
        self._steps: dict[tuple[int, int], Step] = {}

    def tiles_for(self, tokens: int, width: int) -> Tiles:
        """Return the tiles of a step: the measured ones, else the default ones."""
        made = default_tiles(self.shape, tokens, width, self.pages.page, self.pdl, self.cores)
        products = self.products.get(tokens, made.products)
        return Tiles(products, self.attentions.get((tokens, width), made.attention), self.pdl)

    def step(self, tokens: int, width: int) -> Step:
        """Return the step for at least so many rows and pages per row, captured on first use."""
        bucket = (above(tokens), above(width))
        if bucket not in self._steps:
            step = Step(self.shape, self.weights, self.pages, *bucket, self.tiles_for(*bucket))
            if self.device.type == "cuda":
                step.capture()
            self._steps[bucket] = step
        return self._steps[bucket]

    def measure_products(
        self, tokens: int, width: int, length: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Choose the tiles of the products of `tokens` rows: each candidate runs in the whole captured step."""
        tiles = self.tiles_for(tokens, width)
        best = self.seconds(tiles, tokens, width, length)
        for name in sorted(PRODUCTS, key=lambda name: name != "up"):
            if name == "head" and self.weights.head_VH is None:
                continue
            for tile in candidates(self.shape, name, tokens, self.cores):
                best, tiles = self._better(best, tiles, tiles.with_product(name, tile), tokens, width, length, say)
        self.products[tokens] = tiles.products

    def measure_attention(
        self, tokens: int, width: int, length: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Choose the cut of the attention of steps of `tokens` rows with `width` pages each."""
        tiles = self.tiles_for(tokens, width)
        best = self.seconds(tiles, tokens, width, length)
        for cut in attention_candidates(tiles.attention, self.pages.page):
            best, tiles = self._better(best, tiles, replace(tiles, attention=cut), tokens, width, length, say)
        self.attentions[tokens, width] = tiles.attention

    def _better(
        self, best: float, tiles: Tiles, trial: Tiles, tokens: int, width: int, length: int, say: Callable[[str], None]
    ) -> tuple[float, Tiles]:
        changed = [tile for name, tile in trial.products.items() if tile != tiles.products[name]] or [trial.attention]
        try:
            took = self.seconds(trial, tokens, width, length)
        except triton.runtime.errors.OutOfResources as error:  # more shared memory than the device has
            say(f"{changed}: {error}")
            return best, tiles
        say(f"{changed}: {took * 1e6:.1f} against {best * 1e6:.1f} us")
        return (took, trial) if took < best * (1 - LEAST_GAIN) else (best, tiles)

    def seconds(self, tiles: Tiles, tokens: int, width: int, lengths: int) -> float:
        """Return the time of a captured step with these tiles."""
        step = Step(self.shape, self.weights, self.pages, tokens, width, tiles)
        step.capture()
        step.put([(1, lengths, range(index * width, (index + 1) * width)) for index in range(tokens)])
        return seconds(step, 12)


def seconds(step: Callable[[], None], count: int) -> float:
    """Return the median time of one replay, by events on the device."""
    step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    marks[-1].synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return times[count // 2] / 1e3


def compilations(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch per compilation that `launches` need."""
    return list({launch.key(): launch for launch in launches}.values())


def turned(x_tND: torch.Tensor, turns_tD: torch.Tensor) -> torch.Tensor:
    """Rotate heads by cos and sin [t, 2, D / 2], in float32."""
    cos, sin = turns_tD[:, None, 0], turns_tD[:, None, 1]
    one, two = x_tND.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def prefill(
    shape: Shape, weights: Weights, pages: Pages, table: torch.Tensor, source_t: torch.Tensor, past: int
) -> torch.Tensor:
    """Run a prompt's next tokens through the group; return the logits of the last one [V], or the residual [t, H].

    Args:
        table: the session's pages, on the device; they hold `past` positions and have room for the new ones.
        source_t: token ids [t], or for a group without an embedding hidden states [t, H].
        past: positions that were computed before.
    """
    count = source_t.shape[0]
    at_t = torch.arange(past, past + count, device=source_t.device)
    where = (table[at_t // pages.page].long(), at_t % pages.page)
    turns_tD = weights.turns_PD[past : past + count]
    hidden_tH = (source_t if weights.embedding_VH is None else F.embedding(source_t, weights.embedding_VH)).float()
    for index, layer in enumerate(weights.layers):
        attended = _attended(shape, layer, pages, index, table, hidden_tH, where, turns_tD, past)
        hidden_tH = hidden_tH + F.linear(attended, layer.out)
        gate, up = F.linear(_normed(hidden_tH, layer.norm_mid_H, shape.eps), layer.up).chunk(2, -1)
        hidden_tH = hidden_tH + F.linear(F.silu(gate) * up, layer.down)
    if weights.head_VH is None or weights.norm_out_H is None:
        return hidden_tH
    return F.linear(_normed(hidden_tH[-1:], weights.norm_out_H, shape.eps), weights.head_VH)[0].float()


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(weight.dtype)


def _attended(
    shape: Shape,
    layer: Layer,
    pages: Pages,
    index: int,
    table: torch.Tensor,
    hidden_tH: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor],
    turns_tD: torch.Tensor,
    past: int,
) -> torch.Tensor:
    count, width, dtype = hidden_tH.shape[0], shape.head_width, layer.qkv.dtype
    qkv = F.linear(_normed(hidden_tH, layer.norm_in_H, shape.eps), layer.qkv, layer.qkv_bias)
    parts = qkv.view(count, -1, width).split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
    query, key, value_tKD = parts
    if layer.norm_query_D is not None and layer.norm_key_D is not None:
        query, key = _normed(query, layer.norm_query_D, shape.eps), _normed(key, layer.norm_key_D, shape.eps)
    query_tND, key_tKD = turned(query, turns_tD).to(dtype), turned(key, turns_tD).to(dtype)
    pages.keys[index][where[0], :, where[1]] = key_tKD
    pages.values[index][where[0], :, where[1]] = value_tKD
    query_NtD = query_tND.transpose(0, 1)[None]
    if past == 0 and not (shape.window and count > shape.window):
        key_Kp, value_Kp = key_tKD.transpose(0, 1)[None], value_tKD.transpose(0, 1)[None]
        made = F.scaled_dot_product_attention(
            query_NtD, key_Kp, value_Kp, is_causal=True, scale=shape.attention_scale, enable_gqa=True
        )
        return made[0].transpose(0, 1).reshape(count, -1)
    total = past + count
    group = shape.heads // shape.kv_heads

    def gathered(held: torch.Tensor) -> torch.Tensor:
        used = held[table[: -(-total // pages.page)].long()]
        return used.transpose(0, 1).reshape(shape.kv_heads, -1, width)[:, :total].repeat_interleave(group, 0)[None]

    at_p = torch.arange(total, device=hidden_tH.device)
    at_t = at_p[past:, None]
    sees_tp = at_p <= at_t
    if shape.window:
        sees_tp &= at_p > at_t - shape.window
    made = F.scaled_dot_product_attention(
        query_NtD, gathered(pages.keys[index]), gathered(pages.values[index]), sees_tp, scale=shape.attention_scale
    )
    return made[0].transpose(0, 1).reshape(count, -1)
