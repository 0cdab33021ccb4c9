"""Define the built-in kinds of causal models.

`embedding`, `blocks` and `head` (head.py) are the parts. `first_stage` is the embedding with blocks, `last_stage` is blocks
with the head, and `model` is all of them in one actor.

Shape suffixes: T tokens of the batch, H hidden, P positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row

from ..checkpoint import ModelConfig
from ..component.actor import Actor, Batch, Context, Look
from ..component.devices import CPU
from ..component.inside import HIDDEN, LOGITS, Place
from ..component.session import SessionInfo
from . import weights
from .blocks import Blocks, places_of, taken_back
from .coded import Coded
from .head import Head
from .inside import Inside
from .kernels.packed import Packed
from .kv_cache import KVCache
from .tensors import by_torch, ids_beside, needed, read_slot, sent, unpacked

if TYPE_CHECKING:
    from .gpu.fused import Fused


class AnyBlocks(Protocol):
    """Describe layers with the caches of their sessions, native or run by transformers."""

    look: Look | None
    inside: Inside
    finite: bool | None
    """True if all numbers of the last step are finite, None if this is not known."""
    fused: Fused | None
    """The kernels of a GPU, where they run these layers."""

    @property
    def cache(self) -> KVCache[Any]: ...

    def open(self, session: SessionInfo) -> None: ...

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor: ...

    def held_bytes(self) -> int: ...


class Embedding(Actor):
    """Embed tokens: `token` int64 [tokens] -> `hidden` [tokens, H]."""

    writes = False
    places = True
    makes_new = True
    stateless = True
    on_host: ClassVar[tuple[str, ...]] = ("token",)

    def __init__(self) -> None:
        self.inside = Inside([Place(HIDDEN, 0)])

    def load(self, context: Context) -> None:
        self.load_with(context, None)

    def load_with(self, context: Context, weight_VH: torch.Tensor | Packed | None) -> None:
        """Load the weights; if `weight_VH` is given (a tied head's matrix), use it instead of reading one."""
        checkpoint, dtype = needed(context)
        held = {
            slot.name: read_slot(slot, checkpoint, dtype, context.device)
            for slot in weights.embedding(checkpoint.config)
            if weight_VH is None or slot.name != "embedding"
        }
        self.held = sum(tensor.nbytes for tensor in held.values())
        self.weight_VH = held["embedding"] if weight_VH is None else weight_VH
        self.positions_PH = held.get("positions")
        self.dtype = dtype
        self.use_scale(checkpoint.config, dtype)
        context.progress(1.0)

    def use_scale(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Keep the embedding scale, rounded to `dtype` before use as in transformers."""
        scale = config.embedding_scale
        self._scale = torch.tensor(scale, dtype=dtype) if scale != 1.0 else None

    def forward(self, rows: tuple[Row, ...], token_T: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight_VH, Packed):
            hidden_TH = self.weight_VH.rows(token_T, self.dtype)
        else:
            hidden_TH = F.embedding(ids_beside(self.weight_VH, token_T), self.weight_VH)
        if self._scale is not None:
            hidden_TH = hidden_TH * self._scale
        if self.positions_PH is not None:
            parts = [self.positions_PH[row.position : row.position + row.tokens] for row in rows]
            hidden_TH = hidden_TH + torch.cat(parts)
        return hidden_TH

    def open(self, session: SessionInfo) -> None:
        self.inside.open(session)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        return self.inside.around(batch.rows, lambda: self._stepped(batch.rows, batch["token"]))

    def _stepped(self, rows: tuple[Row, ...], token_T: torch.Tensor) -> Mapping[str, torch.Tensor | Batch]:
        return sent(self, "hidden", rows, self.inside.touch(Place(HIDDEN, 0), rows, self.forward(rows, token_T)))

    def close(self, session: int) -> None:
        self.inside.close(session)

    def held_bytes(self) -> int:
        return self.held


class BlocksActor(Actor):
    """Run a range of layers with their KV cache: `hidden` [tokens, H] -> `hidden` [tokens, H]."""

    writes = False
    places = True
    makes_new = True

    def load(self, context: Context) -> None:
        assert context.layers is not None
        self.blocks: AnyBlocks = blocks_of(context, context.layers)
        warm(self.blocks)

    def open(self, session: SessionInfo) -> None:
        self.blocks.open(session)

    def rewind(self, session: SessionInfo) -> None:
        self.blocks.cache.rewind(session.session, session.kept)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        return self.blocks.inside.around(batch.rows, lambda: self._stepped(batch.rows, batch["hidden"]))

    def _stepped(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> Mapping[str, torch.Tensor | Batch]:
        hidden_TH = self.blocks.forward(rows, hidden_TH)
        return sent(self, "hidden", rows, hidden_TH, self.blocks.finite)

    def close(self, session: int) -> None:
        self.blocks.cache.close(session)
        self.blocks.inside.close(session)

    def capacity_tokens(self) -> int | None:
        return self.blocks.cache.tokens

    def held_bytes(self) -> int:
        return self.blocks.held_bytes()


class Stage(Actor):
    """Run blocks together with the embedding before them (`begins`), the head after them (`ends`), or both."""

    writes = False
    places = True
    makes_new = True

    begins: ClassVar[bool] = False
    ends: ClassVar[bool] = False
    look: Look | None = None

    def load(self, context: Context) -> None:
        checkpoint, _ = needed(context)
        config = checkpoint.config
        self.embedding = Embedding() if self.begins else None
        self.head = Head() if self.ends else None
        if self.embedding is not None and self.head is not None and config.tied:
            _load_tied(self.embedding, self.head, context)
        elif self.embedding is not None:
            self.embedding.load(context)
        layers = context.layers or (0, config.layers - 1)
        self.blocks: AnyBlocks = blocks_of(context, layers)
        if self.head is not None and not (self.embedding is not None and config.tied):
            self.head.load_with(context, None)
        self.look_inside(layers)
        if self.blocks.fused is not None:
            self._fuse(self.blocks.fused, config)

    def look_inside(self, layers: tuple[int, int]) -> None:
        """Let requests read and change what this stage makes: its parts share one object for that."""
        begin, end = [Place(HIDDEN, 0)] if self.begins else [], [Place(LOGITS)] if self.ends else []
        self.inside = self.blocks.inside = Inside([*begin, *places_of(*layers), *end])
        if self.head is not None:
            self.head.inside = self.inside

    def _fuse(self, fused: Fused, config: ModelConfig) -> None:
        """Let the kernels of a GPU begin with this stage's embedding and end with its head, if they can."""
        if self.embedding is not None and config.embedding_scale == 1:
            assert isinstance(self.embedding.weight_VH, torch.Tensor)
            fused.begin_with(self.embedding.weight_VH)
        if self.head is not None and config.logit_softcap is None:
            fused.end_with(self.head.norm, unpacked(self.head.weight_VH))
        warm(self.blocks)

    def open(self, session: SessionInfo) -> None:
        self.blocks.open(session)
        if self.head is not None:
            self.head.open(session)

    def rewind(self, session: SessionInfo) -> None:
        self.blocks.cache.rewind(session.session, session.kept)
        if self.head is not None:
            self.head.open(session)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        fused = self.blocks.fused
        if self.inside.wants(batch.rows):
            return self.inside.around(batch.rows, lambda: self._stepped(batch))
        if fused is None:
            return self._stepped(batch)
        with taken_back(self.blocks.cache, batch.rows):
            if self.look is None and all(row.tokens == 1 for row in batch.rows):
                return self._by_fused(fused, batch)
            return self._stepped(batch)

    def _stepped(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        if self.embedding is None:
            hidden_TH = batch["hidden"]
        else:
            hidden_TH = self.embedding.forward(batch.rows, batch["token"])
            hidden_TH = self.inside.touch(Place(HIDDEN, 0), batch.rows, hidden_TH)
            if self.look is not None and hidden_TH.is_floating_point():  # not for models that take token ids
                self.look(None, "embedding", batch.rows, hidden_TH)
        hidden_TH = self.blocks.forward(batch.rows, hidden_TH)
        if self.head is not None:
            return self.head.forward(batch.rows, hidden_TH)
        return sent(self, "hidden", batch.rows, hidden_TH, self.blocks.finite)

    def _by_fused(self, fused: Fused, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        """Run one token of each row by the kernels, with embedding and head where `_fuse` has given them."""
        rows, ends = batch.rows, self.head is not None and fused.ends
        source = batch["hidden"] if self.embedding is None else batch["token"]
        if self.embedding is not None and not fused.begins:
            source = self.embedding.forward(rows, source)
        hidden = not ends or self.head is None or self.head.scores(rows)
        made = fused.step(rows, self.blocks.cache, source, hidden=hidden, ends=ends)
        hidden_TH = source if made.hidden_TH is None else made.hidden_TH
        if self.head is not None:
            return self.head.forward(rows, hidden_TH, made)
        return sent(self, "hidden", rows, hidden_TH)

    def close(self, session: int) -> None:
        self.blocks.cache.close(session)
        self.inside.close(session)
        if self.head is not None:
            self.head.close(session)

    def capacity_tokens(self) -> int | None:
        return self.blocks.cache.tokens

    def held_bytes(self) -> int:
        held = self.blocks.held_bytes()
        if self.embedding is not None:
            held += self.embedding.held_bytes()
        if self.head is not None:
            held += self.head.held_bytes()
        return held


class FirstStage(Stage):
    """Run the embedding and the first blocks: `token` int64 [tokens] -> `hidden` [tokens, H]."""

    begins = True
    on_host: ClassVar[tuple[str, ...]] = ("token",)


class LastStage(Stage):
    """Run the last blocks and the head: `hidden` [tokens, H] -> the outputs of `Head`."""

    ends = True


class Model(Stage):
    """Run a whole model in one actor: `token` int64 [tokens] -> the outputs of `Head`."""

    begins = True
    ends = True
    on_host: ClassVar[tuple[str, ...]] = ("token",)


def _load_tied(embedding: Embedding, head: Head, context: Context) -> None:
    """Load both ends of a tied model; they share one matrix, packed or plain, if both read the same values from it."""
    checkpoint, dtype = needed(context)
    [slot] = [slot for slot in weights.head(checkpoint.config) if slot.name == "head"]
    if by_torch(slot, dtype, context.device):
        embedding.load(context)
        coded = context.device != CPU and weights.packed_as(slot, checkpoint, context.precision) != "bfloat16"
        head.load_with(context, None if coded else unpacked(embedding.weight_VH))
        return
    head.load_with(context, None)
    assert not isinstance(head.weight_VH, Coded)  # this is not a GPU
    embedding.load_with(context, head.weight_VH if weights.shares_packed(slot, checkpoint, context.precision) else None)


def warm(blocks: AnyBlocks) -> None:
    """Make the kernels of a GPU ready. If they cannot be built, torch computes everything, and a warning says why."""
    if blocks.fused is None:
        return
    try:
        blocks.fused.warm()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # of Triton, which needs a C compiler and enough shared memory
        blocks.fused = None
        logging.getLogger("ranvier").warning("the kernels of the GPU cannot be built, so torch computes all: %s", error)


def blocks_of(context: Context, layers: tuple[int, int]) -> Blocks:
    """Read native layers as an actor needs them; `layers` are the first and the last."""
    checkpoint, dtype = needed(context)
    return Blocks(
        checkpoint,
        layers,
        dtype,
        context.cache_tokens,
        context.progress,
        context.precision,
        context.fast,
        context.device,
    )
