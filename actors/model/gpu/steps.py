"""Decode one token of several sessions as one CUDA graph.

A `Step` is captured for a number of rows and of pages per row. Its graph begins with one copy from pinned memory (tokens,
lengths, page table), and its last kernel writes the chosen tokens to pinned memory. Without a GPU the same launches run one
by one in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..coded import Coded
from .launches import Buffers, Launch, Wiring, input_count, input_parts
from .shapes import Pages, Shape, Weights
from .tiles import Tiles, above, default_tiles

MOST_ROWS = 32
"""Rows of a step; the kernels' tiles hold no more."""
LEAST_PAGES = 16
"""Pages per row of the smallest step."""
SMALL_BYTES = 128 << 10
"""Shared memory of a block below which tiles have fewer stages. A GPU of a desktop has 99 KiB, an H100 227."""
WARM_RUNS = 2
"""Runs before a capture: they load the kernels."""


class Place(NamedTuple):
    """Say where the newest token of a session belongs: the length with it, and the session's pages."""

    length: int
    pages: Sequence[int]


class Step:
    """Hold one decode step of up to `rows` rows with up to `width` pages each; all its memory is taken here."""

    def __init__(self, shape: Shape, weights: Weights, pages: Pages, rows: int, width: int, tiles: Tiles) -> None:
        device, dtype = pages.keys[0].device, pages.keys[0].dtype
        self.rows, self.width, self.pages = rows, width, pages
        self.buffers = Buffers.of(shape, rows, width, pages.page, tiles, dtype, device)
        pinned = device.type == "cuda"
        self.inputs = torch.zeros(input_count(rows, width), dtype=torch.int32, pin_memory=pinned)
        self._tokens, self._lengths, self._table = (part.numpy() for part in input_parts(self.inputs, rows))
        self._tables: list[Sequence[int]] = [()] * rows  # what the rows of the page table were written from
        chosen_T = torch.zeros(rows, dtype=torch.int32, pin_memory=pinned)
        self.buffers.token_T = chosen_T  # the last kernel writes there, which spares a copy
        self.chosen = chosen_T.numpy()
        """The likeliest token of each row, once the step has ended; `products.NOWHERE` if no logit was a number."""
        self.launches: list[Launch] = Wiring(shape, weights, pages, self.buffers, width, tiles).launches()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ended = torch.cuda.Event() if pinned else None

    def put(self, places: Sequence[Place], tokens: Sequence[int] | None = None) -> None:
        """Write the inputs of a step; rows left over are idle. `tokens` are missing for a group that takes messages."""
        if self._ended is not None:
            self._ended.synchronize()  # the step before may not have read its inputs yet
        count = len(places)
        self._lengths[count:] = 0
        for index, (length, pages) in enumerate(places):
            self._lengths[index] = length
            if self._tables[index] is not pages:
                used = pages[: self.width]
                self._table[index, : len(used)] = used
                self._tables[index] = pages
        if tokens is not None:
            self._tokens[:count] = tokens
            self._tokens[count:] = 0

    def run(self) -> None:
        """Launch everything once on the current stream."""
        self.buffers.inputs.copy_(self.inputs, non_blocking=True)
        for launch in self.launches:
            launch.run()

    def capture(self) -> None:
        """Capture the step. Idle rows write no key and no value, so warm runs leave the pages alone."""
        kept = self.inputs.clone()
        self.inputs.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                self.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.run()
        self.inputs.copy_(kept)
        self._graph = graph

    def __call__(self) -> None:
        """Replay the captured step, or run it where there is no graph."""
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()
        if self._ended is not None:
            self._ended.record()


class Steps:
    """Hold the steps of one group of layers, made when they are first needed.

    Args:
        shape: the sizes of the layers.
        weights: on the device.
    """

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self._shape, self._weights = shape, weights
        device = weights.turns_PD.device
        self._cuda = device.type == "cuda"
        # a kernel may begin before the one before it has ended
        self._early = self._cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        about: Any = torch.cuda.get_device_properties(device) if self._cuda else None
        self._cores = about.multi_processor_count if self._cuda else 132
        self._small = self._cuda and about.shared_memory_per_block_optin < SMALL_BYTES
        self._coded = any(isinstance(layer.qkv, Coded) for layer in weights.layers)
        self._held: dict[tuple[int, int], Step] = {}

    def at_least(self, rows: int, width: int, pages: Pages) -> Step:
        """Return a step for so many rows and pages per row, which reads and writes `pages`."""
        bucket = above(rows), above(width, LEAST_PAGES)
        step = self._held.get(bucket)
        if step is None:
            tiles = default_tiles(
                self._shape, *bucket, pages.page, self._early, self._cores, coded=self._coded, small=self._small
            )
            step = self._held[bucket] = Step(self._shape, self._weights, pages, *bucket, tiles)
            if self._cuda:
                step.capture()
        return step
