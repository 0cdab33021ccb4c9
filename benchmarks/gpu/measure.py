"""Time captured steps on a GPU, and choose tiles by measuring them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import triton

from ranvier.actors.model.gpu.launches import Launch
from ranvier.actors.model.gpu.shapes import Pages, Shape, Weights
from ranvier.actors.model.gpu.steps import Place, Step
from ranvier.actors.model.gpu.tiles import PRODUCTS, Attention, Tile, Tiles, default_tiles

from .candidates import attention_candidates, candidates

LEAST_GAIN = 0.005  # other tiles must be so much faster than those that are kept; less is noise


class Measured:
    """Hold a group of layers on a GPU, and the tiles that were found fastest."""

    def __init__(self, shape: Shape, weights: Weights, pages: Pages, pdl: bool) -> None:
        self.shape, self.weights, self.pages, self.pdl = shape, weights, pages, pdl
        self.cores = torch.cuda.get_device_properties(0).multi_processor_count
        self.products: dict[int, Mapping[str, Tile]] = {}
        self.attentions: dict[tuple[int, int], Attention] = {}

    def tiles_for(self, rows: int, width: int) -> Tiles:
        """Return the tiles of a step: the measured ones, else those that actors use."""
        made = default_tiles(self.shape, rows, width, self.pages.page, self.pdl, self.cores)
        products = self.products.get(rows, made.products)
        return Tiles(products, self.attentions.get((rows, width), made.attention), self.pdl)

    def step(self, rows: int, width: int, length: int, tiles: Tiles | None = None) -> Step:
        """Return a captured step whose rows have `length` tokens."""
        step = Step(self.shape, self.weights, self.pages, rows, width, tiles or self.tiles_for(rows, width))
        step.capture()
        step.put([Place(length, range(at * width, (at + 1) * width)) for at in range(rows)], range(1, rows + 1))
        return step

    def choose_products(self, rows: int, width: int, length: int, say: Callable[[str], None]) -> None:
        """Choose the tiles of the products of `rows` rows: each candidate runs in the whole captured step."""
        tiles = self.tiles_for(rows, width)
        best = seconds(self.step(rows, width, length, tiles), 12)
        for name in sorted(PRODUCTS, key=lambda name: name != "up"):
            for tile in candidates(self.shape, name, rows, self.cores):
                best, tiles = self._better(best, tiles, tiles.with_product(name, tile), rows, width, length, say)
        self.products[rows] = tiles.products

    def choose_attention(self, rows: int, width: int, length: int, say: Callable[[str], None]) -> None:
        """Choose the cut of the attention of steps of `rows` rows with `width` pages each."""
        tiles = self.tiles_for(rows, width)
        best = seconds(self.step(rows, width, length, tiles), 12)
        for cut in attention_candidates(tiles.attention, self.pages.page):
            best, tiles = self._better(best, tiles, replace(tiles, attention=cut), rows, width, length, say)
        self.attentions[rows, width] = tiles.attention

    def _better(self, best, tiles, trial, rows, width, length, say):
        changed = [tile for name, tile in trial.products.items() if tile != tiles.products[name]] or [trial.attention]
        try:
            took = seconds(self.step(rows, width, length, trial), 12)
        except triton.runtime.errors.OutOfResources as error:  # more shared memory than the device has
            say(f"{changed}: {error}")
            return best, tiles
        say(f"{changed}: {took * 1e6:.1f} against {best * 1e6:.1f} us")
        return (took, trial) if took < best * (1 - LEAST_GAIN) else (best, tiles)


def seconds(step: Callable[[], None], count: int) -> float:
    """Return the median time of one run, by events on the device."""
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
