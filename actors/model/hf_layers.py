"""Run the layer groups of any causal model that transformers knows, through that library's layers: slower, but correct.

Every actor runs the model's own forward pass over a skeleton in which only this actor's layers have weights. The
input from the previous actor replaces the hidden states before the first of these layers. The output of the last of
them is the result. All other layers pass their input on unchanged. So the library computes masks, positions and
everything else that a family does between its layers. Tensors that are never written to take no memory.

Shape suffixes: T tokens of the batch, t tokens of one row, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from ranvier.transport.format.aligned import aligned
from ranvier.transport.format.header import Row

from ..checkpoint.bounds import MOST_LAYERS
from ..checkpoint.checkpoint import Checkpoint
from ..component.actor import Actor, Context, Look
from ..component.devices import CPU, here
from ..component.inside import HIDDEN, Place
from ..component.session import SessionInfo
from ..errors import CheckpointError
from .causal import BlocksActor, Embedding, Stage
from .head import Head
from .hf_rope import Rotations
from .hf_weights import model_of, move, read, tensors_of
from .hf_whole import Whole, WholeSession
from .inside import Inside
from .kv_cache import KVCache, Reserved
from .tensors import needed

if TYPE_CHECKING:
    from .gpu.fused import Fused


class ForeignSession(Reserved):
    """Hold one session's cache, with the layer classes that the model's config asks for.

    `prompt` is the number of tokens that came before the answer, and `known` that of the tokens at the session's start.
    """

    def __init__(self, config: Any, capacity: int) -> None:
        super().__init__(capacity)
        self.past = DynamicCache(config=config)
        self.prompt = self.known = 0


class _Left(Exception):
    """Stop the forward pass where this actor's part ends."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Place(nn.Module):
    """Replace one layer: run it if this actor holds it, else pass its input on and count the tokens in its cache."""

    def __init__(self, skeleton: Skeleton, index: int, layer: nn.Module, own: bool) -> None:
        super().__init__()
        self.own = layer if own else None
        self._skeleton = [skeleton]  # in a list, so that torch does not register it as a submodule
        self._index = index
        # some models read plain attributes of a layer, such as its type
        self._settings = {
            name: value for name, value in vars(layer).items() if isinstance(value, str | int | float | bool)
        }

    def __getattr__(self, name: str) -> Any:
        info = self.__dict__.get("_settings", {})
        return info[name] if name in info else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        skeleton = self._skeleton[0]
        if self._index == skeleton.enters_at and skeleton.entering is not None:
            hidden_states = skeleton.entering
        if self._index == skeleton.leaves_before:
            raise _Left(hidden_states)
        if self.own is not None and not skeleton.bypasses:
            made = self.own(hidden_states, *args, **kwargs)
            hidden_states = made[0] if isinstance(made, tuple | list) else made
        elif skeleton.past is not None:
            nothing = torch.zeros(1, 1, hidden_states.shape[1], 1)
            skeleton.past.update(nothing, nothing, self._index)
        if self.own is not None and not skeleton.bypasses and skeleton.inside.wants(skeleton.rows):
            hidden_states = hidden_states.clone()  # the library may hold it
            skeleton.inside.touch(Place(HIDDEN, self._index + 1), skeleton.rows, hidden_states[0])
        if skeleton.look is not None and self.own is not None and not skeleton.bypasses:
            skeleton.look(self._index, "hidden", skeleton.rows, hidden_states[0])
        if self._index == skeleton.leaves_after:
            raise _Left(hidden_states)
        return (hidden_states,) if skeleton.tuples else hidden_states


class Skeleton:
    """Hold a transformers model in which only this actor's part has weights.

    The part is `layers` (first and last, or None for no layer) and, if `outside`, all that is in no layer: embedding,
    final norm, head. A model that cannot be cut is held whole.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: tuple[int, int] | None,
        outside: bool,
        dtype: torch.dtype,
        progress: Callable[[float], None],
        device: str = CPU,
    ) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.look: Look | None = None
        self.inside = Inside(())
        self.rows: tuple[Row, ...] = ()
        """Rows of the current step, for `look` and `inside`."""
        self.entering: torch.Tensor | None = None
        self.enters_at = self.leaves_before = self.leaves_after = -1
        self.bypasses = self.tuples = False
        self.past: Any = None
        self.layers = layers
        self._device = device
        self.model = model_of(checkpoint, dtype)
        self.config = self.model.config
        # transformers 5.24 calls it `cache`, earlier versions `past_key_values`
        named = inspect.signature(self.model.forward).parameters
        self._past_name = "cache" if "cache" in named else "past_key_values"
        self.rotations = Rotations(self.model, recomputed=checkpoint.config.recomputed_after > 0)
        self.whole = Whole(self.model, checkpoint.config, self._past_name) if checkpoint.config.uncut else None
        tensors = tensors_of(self.model)
        if self.whole is not None:
            self.held_bytes = read(self.model, checkpoint, set(tensors), range(MOST_LAYERS), dtype, progress)
            move(self.model, set(tensors), device)
            return
        stack, name = _layer_list(self.model, checkpoint.config.layers)
        self.tuples = self._returns_tuples(stack[0])
        own = range(layers[0], layers[1] + 1) if layers is not None else range(0)
        wanted = {
            tensor
            for tensor in tensors
            if (layer_of(tensor, name) in own if tensor.startswith(name + ".") else outside)
        }
        self.held_bytes = read(self.model, checkpoint, wanted, own, dtype, progress)
        move(self.model, wanted, device)
        for index in range(len(stack)):
            stack[index] = _Place(self, index, stack[index], index in own)

    def _returns_tuples(self, layer: nn.Module) -> bool:
        """Return whether a layer returns a tuple and not a tensor; runs one token through it without weights."""
        found = []

        def look(_: nn.Module, __: Any, output: Any) -> None:
            found.append(isinstance(output, tuple | list))
            raise _Left(torch.empty(0))

        handle = layer.register_forward_hook(look)
        try:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        except _Left:
            pass
        finally:
            handle.remove()
        return found[0]

    def mode(self) -> AbstractContextManager[Any]:
        """Return the mode for running the library: its device is torch's default there, because it makes tensors of its own."""
        return nullcontext() if self._device == CPU else torch.device(self._device)

    def embed(self, position: int, token_t: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that enter the first layer, [t, H]."""
        self._set(leaves_before=0)
        return self._run(position, input_ids=token_t[None])

    def run(self, session: ForeignSession, position: int, hidden_tH: torch.Tensor) -> torch.Tensor:
        """Run [t, H] through this actor's layers, and extend the session's cache."""
        assert self.layers is not None
        end = position + len(hidden_tH)
        self.rotations.set(max(end, session.prompt if self.rotations.grows else session.known))
        self._set(hidden_tH[None], enters_at=self.layers[0], leaves_after=self.layers[1], past=session.past)
        return self._run(position, inputs_embeds=torch.zeros_like(hidden_tH)[None])

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, V] by final norm and head; the tokens may be of different sessions."""
        self._set(hidden_TH[None], enters_at=0, bypasses=True)
        with self.mode():
            made = self.model(inputs_embeds=torch.zeros_like(hidden_TH)[None], use_cache=False)
        logits_TV: torch.Tensor = made.logits[0]
        return logits_TV

    def _set(
        self,
        entering: torch.Tensor | None = None,
        *,
        enters_at: int = -1,
        leaves_before: int = -1,
        leaves_after: int = -1,
        bypasses: bool = False,
        past: Any = None,
    ) -> None:
        self.entering, self.enters_at, self.bypasses, self.past = entering, enters_at, bypasses, past
        self.leaves_before, self.leaves_after = leaves_before, leaves_after

    def _run(self, position: int, **inputs: torch.Tensor) -> torch.Tensor:
        [given] = inputs.values()
        with self.mode():
            return self._until_left(position, given.shape[1], inputs)

    def _until_left(self, position: int, count: int, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.past is None and position:  # a cache of `position` empty entries makes the tokens begin there
            self.past = DynamicCache(config=self.config)
            for index in range(len(_layer_list(self.model, None)[0])):
                nothing = torch.zeros(1, 1, position, 1)
                self.past.update(nothing, nothing, index)
        try:
            self.model(
                **inputs,
                attention_mask=torch.ones(1, position + count, dtype=torch.long),
                position_ids=torch.arange(position, position + count)[None],
                use_cache=self.past is not None,
                **{self._past_name: self.past},
            )
        except _Left as left:
            return left.hidden[0]
        raise AssertionError("the forward pass did not stop where this actor's part ends")


def _layer_list(model: nn.Module, count: int | None) -> tuple[nn.ModuleList, str]:
    """Return the list of decoder layers and its name: the first list of `count` modules, or of replaced layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and (len(module) == count or isinstance(module[0], _Place)):
            return module, name
    raise CheckpointError(f"{type(model).__name__} has no list of {count} layers; it cannot be cut into actors")


def layer_of(name: str, stack: str) -> int:
    return int(name[len(stack) + 1 :].split(".", 1)[0])


class ForeignBlocks:
    """Run layers of transformers with the interface of `Blocks`."""

    def __init__(self, skeleton: Skeleton, cache_tokens: int) -> None:
        self.skeleton = skeleton
        self.look: Look | None = None
        self.finite: bool | None = None
        self.fused: Fused | None = None
        self.inside = Inside(())
        if skeleton.whole is None and skeleton.layers is not None:
            first, last = skeleton.layers
            self.inside = Inside(Place(HIDDEN, layer) for layer in range(first + 1, last + 2))
        self.cache: KVCache[ForeignSession | WholeSession] = KVCache(cache_tokens, self._session)

    def _session(self, capacity: int) -> ForeignSession | WholeSession:
        whole = self.skeleton.whole
        return ForeignSession(self.skeleton.config, capacity) if whole is None else whole.open(capacity)

    def open(self, session: SessionInfo) -> None:
        self.cache.open(session.session, session.capacity)
        self.inside.open(session)
        opened = self.cache.sessions[session.session]
        if isinstance(opened, ForeignSession):
            opened.prompt, opened.known = session.prompt_tokens, len(session.log)
        else:
            opened.scored = session.score

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        made = []
        parts = torch.split(hidden_TH, [row.tokens for row in rows])
        for row, unaligned in zip(rows, parts, strict=True):
            part = aligned(unaligned)  # results must not depend on the rows before it in the batch
            session = self.cache.at(row.session, row.position, row.tokens)
            self.skeleton.look, self.skeleton.inside, self.skeleton.rows = self.look, self.inside, (row,)
            if isinstance(session, WholeSession):
                whole = self.skeleton.whole
                assert whole is not None
                self.skeleton.rotations.set(row.position + row.tokens)
                watched = whole.watched(row, self.look) if self.look is not None else nullcontext()
                with watched, self.skeleton.mode():
                    made.append(whole.logits(session, part))
            else:
                made += self._run(session, row, part)
            session.length = row.position + row.tokens
        return torch.cat(made)

    def _run(self, session: ForeignSession, row: Row, part_tH: torch.Tensor) -> list[torch.Tensor]:
        """Run a row: in one piece, or token by token after the prompt if the rotary frequencies follow the length.

        The tokens of an answer come one by one, so that a recovery, which has several at once, must do the same.
        """
        at_once = len(part_tH)
        if self.skeleton.rotations.grows:
            at_once = max(0, min(at_once, session.prompt - row.position))
        sizes = [at_once] * (at_once > 0) + [1] * (len(part_tH) - at_once)
        made, start = [], row.position
        for piece in torch.split(part_tH, sizes):
            self.skeleton.rows = (Row(row.session, row.epoch, start, len(piece)),)
            made.append(self.skeleton.run(session, start, aligned(piece)))
            start += len(piece)
        return made

    def held_bytes(self) -> int:
        return self.skeleton.held_bytes


class ForeignEmbedding(Embedding):
    on_host = ()

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.use(Skeleton(checkpoint, None, True, dtype, context.progress, context.device))

    def use(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton

    def forward(self, rows: tuple[Row, ...], token_T: torch.Tensor) -> torch.Tensor:
        if self.skeleton.whole is not None:
            return token_T  # the model takes the tokens themselves
        parts = torch.split(token_T, [row.tokens for row in rows])
        return torch.cat([self.skeleton.embed(row.position, part) for row, part in zip(rows, parts, strict=True)])

    def held_bytes(self) -> int:
        return self.skeleton.held_bytes


class ForeignBlocksActor(BlocksActor):
    writes = True
    rewind = Actor.rewind  # not supported: a cache may hold only a window, or sums over all positions

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.blocks = ForeignBlocks(
            Skeleton(checkpoint, context.layers, False, dtype, context.progress, context.device), context.cache_tokens
        )


class ForeignHead(Head):
    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.use(Skeleton(checkpoint, None, True, dtype, context.progress, context.device))

    def use(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.streams = {}

    def logits(self, picked_TH: torch.Tensor) -> torch.Tensor:
        if self.skeleton.whole is not None:
            return here(picked_TH.float())  # the blocks returned logits already
        return here(self.skeleton.logits(picked_TH).float())

    def held_bytes(self) -> int:
        return self.skeleton.held_bytes


class ForeignStage(Stage):
    rewind = Actor.rewind

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        layers = context.layers or (0, checkpoint.config.layers - 1)
        skeleton = Skeleton(checkpoint, layers, True, dtype, context.progress, context.device)
        self.embedding = ForeignEmbedding() if self.begins else None
        self.head = ForeignHead() if self.ends else None
        if isinstance(self.embedding, ForeignEmbedding):
            self.embedding.use(skeleton)
        if isinstance(self.head, ForeignHead):
            self.head.use(skeleton)
        self.blocks = ForeignBlocks(skeleton, context.cache_tokens)
        if skeleton.whole is None:
            self.look_inside(layers)
        else:
            self.inside = self.blocks.inside

    def held_bytes(self) -> int:
        return self.blocks.held_bytes()


class ForeignFirstStage(ForeignStage):
    begins = True


class ForeignLastStage(ForeignStage):
    ends = True


class ForeignModel(ForeignStage):
    begins = True
    ends = True
