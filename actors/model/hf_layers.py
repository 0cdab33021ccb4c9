"""The layer groups of any causal model that transformers knows, through that library's own layers: slower, but right.

Every actor runs the model's own forward pass, over a skeleton in which only its own layers have weights. What comes from
the actor before enters where the first own layer begins, what leaves the last own layer is the result, and the layers
of others pass on what they get. So masks, positions and whatever else a family does between its layers are its own.
Memory of tensors that are never written to is never taken from the system.

Shape suffixes: T tokens of the batch, t tokens of one row, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

from ranvier.transport.format.aligned import aligned
from ranvier.transport.format.header import Row

from ..checkpoint.checkpoint import Checkpoint
from ..component.actor import Actor, Context, Look
from ..component.session import SessionInfo
from ..errors import CheckpointError
from .causal import BlocksActor, Embedding, Head, Stage, needed
from .hf_whole import Whole, WholeSession
from .kv_cache import KVCache


class ForeignSession:
    """One session's cache, of whatever class the model's own layers want."""

    def __init__(self, config: Any, capacity: int) -> None:
        self.past = DynamicCache(config=config)
        self.capacity = capacity
        self.length = 0


class _Left(Exception):
    """The forward pass has come to where this actor's part ends."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Place(nn.Module):
    """Where a layer stands: the layer itself if it is this actor's, else a passage that keeps its cache in step."""

    def __init__(self, skeleton: Skeleton, index: int, layer: nn.Module, own: bool) -> None:
        super().__init__()
        self.own = layer if own else None
        self._skeleton = [skeleton]  # in a list, so that it is no submodule
        self._index = index
        # some models ask a layer for what kind it is
        self._told = {name: value for name, value in vars(layer).items() if isinstance(value, str | int | float | bool)}

    def __getattr__(self, name: str) -> Any:
        told = self.__dict__.get("_told", {})
        return told[name] if name in told else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        skeleton = self._skeleton[0]
        if self._index == skeleton.enters_at and skeleton.entering is not None:
            hidden_states = skeleton.entering
        if self._index == skeleton.leaves_before:
            raise _Left(hidden_states)
        if self.own is not None and not skeleton.bypasses:
            made = self.own(hidden_states, *args, **kwargs)
            hidden_states = made[0] if isinstance(made, tuple) else made
        elif skeleton.past is not None:
            nothing = torch.zeros(1, 1, hidden_states.shape[1], 1)
            skeleton.past.update(nothing, nothing, self._index)
        if skeleton.look is not None and self.own is not None and not skeleton.bypasses:
            skeleton.look(self._index, "hidden", skeleton.rows, hidden_states[0])
        if self._index == skeleton.leaves_after:
            raise _Left(hidden_states)
        return (hidden_states,) if skeleton.tuples else hidden_states


class Skeleton:
    """A model of transformers of which this actor holds `layers` (first and last, or None) and, where `outside`, what is
    not in any layer: embedding, final norm, head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: tuple[int, int] | None,
        outside: bool,
        dtype: torch.dtype,
        progress: Callable[[float], None],
    ) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.look: Look | None = None
        self.rows: tuple[Row, ...] = ()
        """What `look` is told of."""
        self.entering: torch.Tensor | None = None
        self.enters_at = self.leaves_before = self.leaves_after = -1
        self.bypasses = self.tuples = False
        self.past: Any = None
        self.layers = layers
        # code that a checkpoint brings is never run: the library's own default, and nothing here asks for it
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.inference_mode(False), no_init_weights():
            make: Any = AutoModelForCausalLM.from_config
            self.model = make(config, dtype=dtype).train(False)
            self.model.tie_weights()  # which skipping the initialisation skips, too
        self.model.requires_grad_(False)
        self.config = self.model.config
        # 5.24 calls it `cache`, earlier versions `past_key_values`
        named = inspect.signature(self.model.forward).parameters
        self._past_name = "cache" if "cache" in named else "past_key_values"
        self.whole = Whole(self.model, checkpoint.config, self._past_name) if checkpoint.config.uncut else None
        parameters = [parameter for parameter, _ in self.model.named_parameters(remove_duplicate=False)]
        if self.whole is not None:
            self.held_bytes = self._read(checkpoint, set(parameters), dtype, progress)
            return
        stack, name = _layer_list(self.model, checkpoint.config.layers)
        self.tuples = self._returns_tuples(stack[0])
        own = range(layers[0], layers[1] + 1) if layers is not None else range(0)
        wanted = {
            parameter
            for parameter in parameters
            if (layer_of(parameter, name) in own if parameter.startswith(name + ".") else outside)
        }
        self.held_bytes = self._read(checkpoint, wanted, dtype, progress)
        for index in range(len(stack)):
            stack[index] = _Place(self, index, stack[index], index in own)

    def _returns_tuples(self, layer: nn.Module) -> bool:
        """Whether a layer gives a tuple or its hidden state alone: found out with one token and memory never written."""
        found = []

        def look(_: nn.Module, __: Any, output: Any) -> None:
            found.append(isinstance(output, tuple))
            raise _Left(torch.empty(0))

        handle = layer.register_forward_hook(look)
        try:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        except _Left:
            pass
        finally:
            handle.remove()
        return found[0]

    def _read(
        self, checkpoint: Checkpoint, wanted: set[str], dtype: torch.dtype, progress: Callable[[float], None]
    ) -> int:
        """Read the wanted parameters from the checkpoint, or, where its names are not the model's, through transformers."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        prefix = self.model.base_model_prefix + "."
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        names = {}
        for parameter in sorted(wanted):
            known = next(
                (name for name in (parameter, parameter.removeprefix(prefix)) if name in checkpoint.tensors), None
            )
            if known is not None:
                names[parameter] = known
            elif parameter not in tied:
                self._read_all(checkpoint, own, wanted, dtype)
                break
        else:
            for count, (parameter, known) in enumerate(names.items(), 1):
                checkpoint.read_into(known, own[parameter])
                progress(count / len(names))
        return sum(tensor.nbytes for tensor in {own[name].data_ptr(): own[name] for name in wanted}.values())

    def _read_all(
        self, checkpoint: Checkpoint, own: dict[str, nn.Parameter], wanted: set[str], dtype: torch.dtype
    ) -> None:
        """The whole model for a moment, since the library lays these tensors out differently from their file."""
        with torch.inference_mode(False):
            read: Any = AutoModelForCausalLM.from_pretrained
            whole, told = read(
                checkpoint.path,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        for name, theirs, expected in sorted(told["mismatched_keys"]):  # they, too, would be random
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name}: expected shape {tuple(expected)}, got {tuple(theirs)}"
            )
        missing = sorted(wanted & {str(name) for name in told["missing_keys"]})
        if missing:  # which the library would fill with random numbers
            raise CheckpointError(f"{checkpoint.path}: tensor {missing[0]} is missing, of {len(missing)} that are")
        for name, tensor in whole.named_parameters(remove_duplicate=False):
            if name in wanted:
                if own[name].shape != tensor.shape:
                    raise CheckpointError(
                        f"{checkpoint.path}: tensor {name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
                    )
                own[name].copy_(tensor)

    def embed(self, position: int, token_t: torch.Tensor) -> torch.Tensor:
        """[t, H]: what enters the first layer."""
        self._set(leaves_before=0)
        return self._run(position, input_ids=token_t[None])

    def run(self, session: ForeignSession, position: int, hidden_tH: torch.Tensor) -> torch.Tensor:
        """[t, H] through the own layers; takes effect on the session's cache."""
        assert self.layers is not None
        self._set(hidden_tH[None], enters_at=self.layers[0], leaves_after=self.layers[1], past=session.past)
        return self._run(position, inputs_embeds=torch.zeros_like(hidden_tH)[None])

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, V]: final norm and head, of tokens that need not belong together."""
        self._set(hidden_TH[None], enters_at=0, bypasses=True)
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
        count = given.shape[1]
        if self.past is None and position:  # no cache says where these tokens stand
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
        raise AssertionError("the forward pass went past the place where it was to end")


def _layer_list(model: nn.Module, count: int | None) -> tuple[nn.ModuleList, str]:
    """The list of decoder layers and its name: the first list of so many modules."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and (len(module) == count or isinstance(module[0], _Place)):
            return module, name
    raise CheckpointError(f"{type(model).__name__} has no list of {count} layers; it cannot be cut into actors")


def layer_of(name: str, stack: str) -> int:
    return int(name[len(stack) + 1 :].split(".", 1)[0])


class ForeignBlocks:
    """What `Blocks` is for native layers."""

    def __init__(self, skeleton: Skeleton, cache_tokens: int) -> None:
        self.skeleton = skeleton
        self.look: Look | None = None
        self.cache: KVCache[ForeignSession | WholeSession] = KVCache(cache_tokens, self._session)

    def _session(self, capacity: int) -> ForeignSession | WholeSession:
        whole = self.skeleton.whole
        return ForeignSession(self.skeleton.config, capacity) if whole is None else whole.open(capacity)

    def open(self, session: int, capacity: int) -> None:
        self.cache.open(session, capacity)

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        made = []
        parts = torch.split(hidden_TH, [row.tokens for row in rows])
        for row, unaligned in zip(rows, parts, strict=True):
            part = aligned(unaligned)  # what lies before it in the batch changes nothing
            session = self.cache.at(row.session, row.position, row.tokens)
            self.skeleton.look, self.skeleton.rows = self.look, (row,)
            if isinstance(session, WholeSession):
                whole = self.skeleton.whole
                assert whole is not None
                with whole.watched(row, self.look) if self.look is not None else contextlib.nullcontext():
                    made.append(whole.logits(session, part))
            else:
                made.append(self.skeleton.run(session, row.position, part))
            session.length = row.position + row.tokens
        return torch.cat(made)

    def held_bytes(self) -> int:
        return self.skeleton.held_bytes


class ForeignEmbedding(Embedding):
    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.use(Skeleton(checkpoint, None, True, dtype, context.progress))

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
    rewind = Actor.rewind  # their caches may hold no more than a window, or sums over all positions

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.blocks = ForeignBlocks(
            Skeleton(checkpoint, context.layers, False, dtype, context.progress), context.cache_tokens
        )


class ForeignHead(Head):
    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        self.use(Skeleton(checkpoint, None, True, dtype, context.progress))

    def use(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.streams = {}

    def logits(self, picked_TH: torch.Tensor) -> torch.Tensor:
        if self.skeleton.whole is not None:
            return picked_TH.float()  # what came of the blocks are logits already
        return self.skeleton.logits(picked_TH).float()

    def held_bytes(self) -> int:
        return self.skeleton.held_bytes


class ForeignStage(Stage):
    rewind = Actor.rewind

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        layers = context.layers or (0, checkpoint.config.layers - 1)
        skeleton = Skeleton(checkpoint, layers, True, dtype, context.progress)
        self.embedding = ForeignEmbedding() if self.begins else None
        self.head = ForeignHead() if self.ends else None
        if isinstance(self.embedding, ForeignEmbedding):
            self.embedding.use(skeleton)
        if isinstance(self.head, ForeignHead):
            self.head.use(skeleton)
        self.blocks = ForeignBlocks(skeleton, context.cache_tokens)

    def open(self, session: SessionInfo) -> None:
        super().open(session)
        opened = self.blocks.cache.sessions[session.session]
        if isinstance(opened, WholeSession):
            opened.scored = session.score

    def held_bytes(self) -> int:
        return self.blocks.held_bytes()


class ForeignFirstStage(ForeignStage):
    begins = True


class ForeignLastStage(ForeignStage):
    ends = True


class ForeignModel(ForeignStage):
    begins = True
    ends = True
