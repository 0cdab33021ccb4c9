"""Wire the kernels of one decode step: a list of launches over static buffers, which runs, compiles or is captured.

Shape suffixes as in `shapes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..coded import Coded
from . import coded_products, products
from .attention import attend
from .shapes import Layer, Pages, Shape, Weights
from .tiles import Tile, Tiles, above, size


@dataclass(frozen=True)
class Launch:
    """Hold one kernel with everything it is launched with."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[torch.Tensor | int, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)

    def compile(self) -> Any:
        """Compile without running and return the compiled kernel; the tensors may be on the meta device."""
        return self.kernel.warmup(*self.kinds(), grid=self.grid, **self.constants, **self.options)

    def key(self) -> tuple[Any, ...]:
        """Return what decides whether two launches share a compilation."""
        return (self.kernel.__name__, self.kinds(), tuple(self.constants.items()), tuple(self.options.items()))

    def kinds(self) -> tuple[torch.dtype | int, ...]:
        return tuple(a.dtype if isinstance(a, torch.Tensor) else 16 for a in self.arguments)


@dataclass
class Buffers:
    """Hold the static memory of one step of T rows."""

    inputs: torch.Tensor
    """int32: tokens, lengths, pages [T, W], as `input_parts` cuts it; one copy brings them all."""
    hidden_TH: torch.Tensor
    """The residual, float32."""
    normed_TH: torch.Tensor
    sums: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    inner_TI: torch.Tensor
    logits_TV: torch.Tensor
    best: torch.Tensor
    best_at: torch.Tensor
    token_T: torch.Tensor
    """The likeliest token of each row."""
    message_TH: torch.Tensor
    """What a message brought, for a group without an embedding."""
    parts: torch.Tensor
    count: torch.Tensor
    part_ml: torch.Tensor
    part_sum: torch.Tensor
    attend_count: torch.Tensor
    tokens: int = 0

    @classmethod
    def of(
        cls, shape: Shape, tokens: int, width: int, page: int, tiles: Tiles, dtype: torch.dtype, device: torch.device
    ) -> Buffers:
        """Take the memory that `tokens` rows with `width` pages each need, for these tiles."""

        def zeros(*dims: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(dims, dtype=kind, device=device)

        cuts = {name: tile_count(shape, name, tile) for name, tile in tiles.products.items()}
        parts = max(
            cuts[name] * tile.splits * tile.rows * above(tokens, 16) * (2 if name == "up" else 1)
            for name, tile in tiles.products.items()
        )
        chunks = -(-width * page // tiles.attention.chunk)
        entries = tokens * shape.kv_heads * chunks
        group = shape.heads // shape.kv_heads
        return cls(
            inputs=zeros(input_count(tokens, width), kind=torch.int32),
            hidden_TH=zeros(tokens, shape.hidden),
            normed_TH=zeros(tokens, shape.hidden, kind=dtype),
            sums=zeros(tokens, max(cuts["out"], cuts["down"])),
            qkv=zeros(tokens, shape.qkv_rows),
            attended=zeros(tokens, shape.heads * shape.head_width, kind=dtype),
            inner_TI=zeros(tokens, shape.inner, kind=dtype),
            logits_TV=zeros(tokens, shape.vocabulary),
            best=zeros(tokens, cuts.get("head", 0)),
            best_at=zeros(tokens, cuts.get("head", 0), kind=torch.int32),
            token_T=zeros(tokens, kind=torch.int32),
            message_TH=zeros(tokens, shape.hidden, kind=dtype),
            parts=zeros(parts if any(tile.splits > 1 for tile in tiles.products.values()) else 1),
            count=zeros(max(cuts.values()), kind=torch.int32),
            part_ml=zeros(entries, 2, group),
            part_sum=zeros(entries, group, shape.head_width),
            attend_count=zeros(tokens * shape.kv_heads, kind=torch.int32),
            tokens=tokens,
        )


def input_count(tokens: int, width: int) -> int:
    return 2 * above(tokens, 4) + tokens * width


def input_parts(inputs: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tokens [T], the lengths [T] and the page table [T, W] in `inputs`, each aligned to 16 bytes."""
    room = above(tokens, 4)
    return inputs[:tokens], inputs[room : room + tokens], inputs[2 * room :].view(tokens, -1)


def tile_count(shape: Shape, name: str, tile: Tile) -> int:
    return -(-size(shape, name)[0] // tile.rows)


class Wiring:
    """Make the launches of one step of `tokens` rows, `width` pages per row."""

    def __init__(
        self, shape: Shape, weights: Weights, pages: Pages, buffers: Buffers, width: int, tiles: Tiles
    ) -> None:
        self.shape, self.weights, self.pages, self.buffers, self.tiles = shape, weights, pages, buffers, tiles
        self.width = width

    def launches(self) -> list[Launch]:
        """Return the launches of the whole step, in order."""
        layers, end = self.weights.layers, self.weights.norm_out_H
        norms = [*(layer.norm_in_H for layer in layers), layers[-1].norm_in_H if end is None else end]
        made = [self._enter(norms[0])]
        for index, layer in enumerate(layers):
            made += self._layer(index, layer, norms[index + 1])
        if self.weights.head_VH is not None:
            b = self.buffers
            made.append(self._product("head", products.LOGITS, self.weights.head_VH, b.normed_TH, b.logits_TV, "down"))
            made.append(self._pick())
        return made

    def _layer(self, index: int, layer: Layer, norm_next: torch.Tensor) -> list[Launch]:
        b = self.buffers
        return [
            self._product("qkv", products.QKV, layer.qkv, b.normed_TH, b.qkv, "down", bias=layer.qkv_bias),
            self._attend(index, layer),
            self._product("out", products.ADDED, layer.out, b.attended, b.hidden_TH, "out", norm=layer.norm_mid_H),
            self._product("up", products.GATED, layer.up, b.normed_TH, b.inner_TI, "out"),
            self._product("down", products.ADDED, layer.down, b.inner_TI, b.hidden_TH, "down", norm=norm_next),
        ]

    def _options(self, warps: int, stages: int = 1, pdl: bool = True) -> dict[str, Any]:
        more = {"launch_pdl": True} if self.tiles.pdl and pdl else {}
        return {"num_warps": warps, "num_stages": stages, **more}

    def _parts(self, name: str) -> int:
        """Return how many sums of squares per token the product `name` leaves."""
        count = tile_count(self.shape, name, self.tiles.products[name])
        if count > self._most_parts:
            raise ValueError(f"tiles of {name}: {count} tiles of rows, at most {self._most_parts}")
        return count

    @property
    def _most_parts(self) -> int:
        """The same for all tiles that may be tried, so that they share the compilations of the other products."""
        return above(-(-self.shape.hidden // (2 if self.buffers.tokens == 1 else 16)))

    def _enter(self, norm_H: torch.Tensor) -> Launch:
        b, weights = self.buffers, self.weights
        source = b.message_TH if weights.embedding_VH is None else weights.embedding_VH
        return Launch(
            "enter",
            products.enter,
            (b.tokens,),
            (source, input_parts(b.inputs, b.tokens)[0], norm_H, b.hidden_TH, b.normed_TH, b.sums, self._parts("down")),
            {
                "H": self.shape.hidden,
                "HP": above(self.shape.hidden),
                "PARTS_P": self._most_parts,
                "EMBED": weights.embedding_VH is not None,
                "PDL": self.tiles.pdl,
            },
            self._options(8, pdl=False),
        )

    def _product(
        self,
        name: str,
        epilogue: Any,
        matrix: torch.Tensor | Coded,
        source: torch.Tensor,
        out: torch.Tensor,
        sums: str,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
    ) -> Launch:
        b, shape, tile = self.buffers, self.shape, self.tiles.products[name]
        rows, columns = size(shape, name)
        constants: dict[str, Any] = {
            "R": rows,
            "C": columns,
            "BR": tile.rows,
            "BC": tile.columns,
            "H": shape.hidden,
            "PARTS_P": self._most_parts,
            "eps": shape.eps,
            "EPILOGUE": epilogue.value,
            "BIAS": bias is not None,
            "PDL": self.tiles.pdl,
        }
        grid: tuple[int, ...] = (tile_count(shape, name, tile),)
        if isinstance(matrix, Coded):
            constants |= {"NARROW": matrix.narrow, **({"TP": above(b.tokens, 16)} if tile.dots else {})}
            least = matrix.scales_RB if matrix.least_RB is None else matrix.least_RB  # stands where there is none
            codes = (matrix.codes, matrix.scales_RB, least)
        elif tile.dots:
            ahead = min(tile.ahead, columns // tile.splits)
            fetched = 1 << (ahead.bit_length() - 1) if ahead >= 64 and matrix.element_size() == 2 else 0
            constants |= {"TP": above(b.tokens, 16), "SPLITS": tile.splits, "AHEAD": fetched}
            grid = (*grid, tile.splits)
        none = b.parts  # stands where a kernel of this kind reads and writes nothing
        common = (
            source, b.sums, none if bias is None else bias, out, b.hidden_TH, none if norm is None else norm,
            b.normed_TH, b.sums, b.best, b.best_at,
        )  # fmt: skip
        ends = b.tokens, self._parts(sums)
        options = self._options(tile.warps, tile.stages)
        if isinstance(matrix, Coded):
            kernel = coded_products.many_coded if tile.dots else coded_products.one_coded
            return Launch(name, kernel, grid, (*codes, *common, *ends), constants, options)
        kernel = products.many if tile.dots else products.one
        return Launch(name, kernel, grid, (matrix, *common, b.parts, b.count, *ends), constants, options)

    def _attend(self, index: int, layer: Layer) -> Launch:
        b, shape = self.buffers, self.shape
        group = shape.heads // shape.kv_heads
        page, width, cut = self.pages.page, self.width, self.tiles.attention
        chunks = -(-width * page // cut.chunk)
        none = b.parts
        normed = layer.norm_query_D is not None
        _, lengths, table = input_parts(b.inputs, b.tokens)
        return Launch(
            "attend",
            attend,
            (b.tokens, shape.kv_heads, chunks),
            (
                b.qkv, self.pages.keys[index], self.pages.values[index], table, lengths, self.weights.turns_PD,
                none if layer.norm_query_D is None else layer.norm_query_D,
                none if layer.norm_key_D is None else layer.norm_key_D,
                b.attended, b.part_ml, b.part_sum, b.attend_count, width, cut.chunk, chunks,
            ),
            {
                "K": shape.kv_heads, "G": group, "GP": above(group, 16), "GM": above(group), "D": shape.head_width,
                "PAGE": page, "BLOCK": cut.block, "SINGLE": cut.chunk == cut.block, "JOIN": 16,
                "WINDOW": layer.window, "scale": shape.attention_scale, "eps": shape.eps, "NORMED": normed,
                "PDL": self.tiles.pdl,
            },
            self._options(cut.warps, cut.stages),
        )  # fmt: skip

    def _pick(self) -> Launch:
        b = self.buffers
        count = tile_count(self.shape, "head", self.tiles.products["head"])
        constants = {"TILES": count, "BLOCK": min(8192, above(count)), "PDL": self.tiles.pdl}
        return Launch("pick", products.pick, (b.tokens,), (b.best, b.best_at, b.token_T), constants, self._options(16))
