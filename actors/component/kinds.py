"""Register the kinds that `kind:` in a graph file may name. Nothing else can be started.

A kind is built in, or an installed package offers it through the entry-point group `ranvier.actors`. It may also be a class
in a Python file of the graph's own folder (`./file.py:Class`), which is imported only if the user allows code. This module does
not import torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranvier.transport.format.errors import RanvierError
from ranvier.transport.format.tensor_spec import TensorSpec

from ..checkpoint.config import ModelConfig
from . import own_code
from .inside import READS
from .session import MOST_LOGPROBS

if TYPE_CHECKING:
    from .actor import Actor

ENTRY_POINTS = "ranvier.actors"
Ports = tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]


class KindError(RanvierError):
    """Report a kind that does not exist or may not be used."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Describe one kind.

    `implementation` is `module:Class`, or `file.py:Class` relative to `folder`. `foreign` is the implementation for models that
    run with transformers' own layers, and `seq2seq` the one for the decoder of an encoder–decoder model.

    These fields say how the built-in kinds differ, so that no code compares names: `begins` holds the embedding of a model, or
    of its encoder; `ends` makes logits; `whole` holds all layers; `one_layer` is a part of one mixture-of-experts layer;
    `encodes` belongs to an encoder; `keeps_nothing` has no weights; `learns` can be trained.

    `once` inputs arrive once per session, before its first step (see `Actor.once`). `optional` outputs need not be connected.
    `from_gateway` inputs and `to_gateway` outputs are connected to the gateway without an edge in the file.
    """

    name: str
    implementation: str
    folder: str | None = None
    foreign: str | None = None
    seq2seq: str | None = None
    uses_model: bool = False
    uses_layers: bool = False
    caches: bool = False
    uses_experts: bool = False
    begins: bool = False
    ends: bool = False
    whole: bool = False
    one_layer: bool = False
    encodes: bool = False
    keeps_nothing: bool = False
    learns: bool = False
    ports_of: Callable[[ModelConfig, str, tuple[int, int]], Ports] | None = None
    from_gateway: tuple[str, ...] = ()
    to_gateway: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    @property
    def holds_blocks(self) -> bool:
        """Return whether an actor of this kind holds whole decoder layers: attention and the feed-forward part."""
        return self.caches and not self.one_layer

    @property
    def has_decoder_memory(self) -> bool:
        """Return whether this kind exists only in encoder–decoder models."""
        return self.encodes or "memory" in self.once


def _hidden(config: ModelConfig, dtype: str) -> TensorSpec:
    return TensorSpec(dtype, ("tokens", config.hidden))


_TOKENS = TensorSpec("int64", ("tokens",))
_READS = {READS: TensorSpec("float32", ("tokens",))}
"""Carries what requests read inside an actor: so many numbers (see `model/inside.py`)."""
_CHOSEN = TensorSpec("int64", ("rows",))


def _head_outputs(config: ModelConfig) -> Mapping[str, TensorSpec]:
    logits = TensorSpec("float32", ("rows", config.vocab))
    return {
        "token": _CHOSEN,
        "sampled": _CHOSEN,
        "logits": logits,
        "logprobs": TensorSpec("float32", ("rows", 2 * (MOST_LOGPROBS + 1))),
        "scores": TensorSpec("float32", ("tokens",)),
        **_READS,
    }


def _choices(config: ModelConfig) -> Mapping[str, TensorSpec]:
    shape = ("tokens", config.experts_per_token)
    return {"index": TensorSpec("int64", shape), "weight": TensorSpec("float32", shape)}


def _experts(config: ModelConfig, dtype: str, numbers: tuple[int, int]) -> Mapping[str, TensorSpec]:
    return {f"expert{number}": _hidden(config, dtype) for number in range(numbers[0], numbers[1] + 1)}


_EXPERTS = "ranvier.actors.model.experts"
_HEAD_PORTS: Mapping[str, Any] = {
    "to_gateway": ("sampled", "logits", "logprobs", "scores", READS),
    "optional": ("token", READS),
}
_PARTS = "ranvier.actors.model.causal"
_FOREIGN = "ranvier.actors.model.hf_layers"
_SEQ2SEQ = "ranvier.actors.model.seq2seq"
BUILT_IN: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "embedding",
            f"{_PARTS}:Embedding",
            foreign=f"{_FOREIGN}:ForeignEmbedding",
            seq2seq=f"{_SEQ2SEQ}:SourceEmbedding",
            uses_model=True,
            begins=True,
            learns=True,
            ports_of=lambda config, dtype, _: ({"token": _TOKENS}, {"hidden": _hidden(config, dtype), **_READS}),
            from_gateway=("token",),
            to_gateway=(READS,),
            optional=(READS,),
        ),
        Kind(
            "blocks",
            f"{_PARTS}:BlocksActor",
            foreign=f"{_FOREIGN}:ForeignBlocksActor",
            uses_model=True,
            learns=True,
            uses_layers=True,
            caches=True,
            ports_of=lambda config, dtype, _: (
                {"hidden": _hidden(config, dtype)},
                {"hidden": _hidden(config, dtype), **_READS},
            ),
            to_gateway=(READS,),
            optional=(READS,),
        ),
        Kind(
            "attention",
            f"{_EXPERTS}:Attention",
            uses_model=True,
            one_layer=True,
            learns=True,
            uses_layers=True,
            caches=True,
            ports_of=lambda config, dtype, _: (
                {"hidden": _hidden(config, dtype)},
                {
                    "residual": _hidden(config, dtype),
                    **_choices(config),
                    **_experts(config, dtype, (0, config.experts - 1)),
                },
            ),
        ),
        Kind(
            "experts",
            f"{_EXPERTS}:Experts",
            uses_model=True,
            one_layer=True,
            learns=True,
            uses_layers=True,
            uses_experts=True,
            ports_of=lambda config, dtype, experts: (
                _experts(config, dtype, experts),
                _experts(config, dtype, experts),
            ),
        ),
        Kind(
            "combine",
            f"{_EXPERTS}:Combine",
            uses_model=True,
            one_layer=True,
            keeps_nothing=True,
            learns=True,
            uses_layers=True,
            ports_of=lambda config, dtype, _: (
                {
                    "residual": _hidden(config, dtype),
                    **_choices(config),
                    **_experts(config, dtype, (0, config.experts - 1)),
                },
                {"hidden": _hidden(config, dtype)},
            ),
        ),
        Kind(
            "head",
            "ranvier.actors.model.head:Head",
            foreign=f"{_FOREIGN}:ForeignHead",
            seq2seq=f"{_SEQ2SEQ}:Seq2SeqHead",
            uses_model=True,
            ends=True,
            learns=True,
            ports_of=lambda config, dtype, _: ({"hidden": _hidden(config, dtype)}, _head_outputs(config)),
            **_HEAD_PORTS,
        ),
        Kind(
            "encoder_embedding",
            f"{_SEQ2SEQ}:EncoderEmbedding",
            seq2seq=f"{_SEQ2SEQ}:EncoderEmbedding",
            uses_model=True,
            begins=True,
            encodes=True,
            ports_of=lambda config, dtype, _: ({"prompt": _TOKENS}, {"hidden": _hidden(config, dtype)}),
            from_gateway=("prompt",),
        ),
        Kind(
            "encoder",
            f"{_SEQ2SEQ}:Encoder",
            seq2seq=f"{_SEQ2SEQ}:Encoder",
            uses_model=True,
            encodes=True,
            uses_layers=True,
            ports_of=lambda config, dtype, _: ({"hidden": _hidden(config, dtype)}, {"hidden": _hidden(config, dtype)}),
        ),
        Kind(
            "decoder",
            f"{_SEQ2SEQ}:Decoder",
            seq2seq=f"{_SEQ2SEQ}:Decoder",
            uses_model=True,
            uses_layers=True,
            caches=True,
            ports_of=lambda config, dtype, _: (
                {"hidden": _hidden(config, dtype), "memory": _hidden(config, dtype)},
                {"hidden": _hidden(config, dtype)},
            ),
            once=("memory",),
        ),
        Kind(
            "first_stage",
            f"{_PARTS}:FirstStage",
            foreign=f"{_FOREIGN}:ForeignFirstStage",
            uses_model=True,
            begins=True,
            learns=True,
            uses_layers=True,
            caches=True,
            ports_of=lambda config, dtype, _: ({"token": _TOKENS}, {"hidden": _hidden(config, dtype), **_READS}),
            from_gateway=("token",),
            to_gateway=(READS,),
            optional=(READS,),
        ),
        Kind(
            "last_stage",
            f"{_PARTS}:LastStage",
            foreign=f"{_FOREIGN}:ForeignLastStage",
            uses_model=True,
            ends=True,
            learns=True,
            uses_layers=True,
            caches=True,
            ports_of=lambda config, dtype, _: ({"hidden": _hidden(config, dtype)}, _head_outputs(config)),
            **_HEAD_PORTS,
        ),
        Kind(
            "model",
            f"{_PARTS}:Model",
            foreign=f"{_FOREIGN}:ForeignModel",
            uses_model=True,
            begins=True,
            ends=True,
            whole=True,
            learns=True,
            caches=True,
            ports_of=lambda config, dtype, _: ({"token": _TOKENS}, _head_outputs(config)),
            from_gateway=("token",),
            **_HEAD_PORTS,
        ),
    )
}


def known() -> list[str]:
    """Return the names that `kind:` accepts besides `./file.py:Class`."""
    return sorted({*BUILT_IN, *(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def find(name: str, folder: Path, allow_code: bool) -> Kind:
    """Return the kind called `name` in a graph file in `folder`.

    Raises:
        KindError: the kind does not exist, its file is outside the folder, or it is code that was not allowed.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            return Kind(name, entry.value)
    if not name.startswith("./"):
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known())}, or ./file.py:Class"
        raise KindError(f"kind {name!r} does not exist; {hint}")
    file, separator, attribute = name.partition(":")
    if not separator or not attribute.isidentifier() or not file.endswith(".py"):
        raise KindError(f"kind {name!r}: expected ./file.py:Class")
    path = inside(folder, file)
    if not allow_code:
        raise KindError(f"kind {name!r} is code of the graph's own folder; pass --allow-code if you trust it")
    return Kind(name, f"{path.relative_to(folder.resolve())}:{attribute}", str(folder.resolve()))


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`, with links resolved.

    Raises:
        KindError: the file does not exist, or lies outside the folder.
    """
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise KindError(f"{name}: lies outside the graph's folder")
    if not path.is_file():
        raise KindError(f"{name}: no such file in the graph's folder")
    return path


def is_offered(implementation: str) -> bool:
    """Return whether an implementation belongs to a built-in kind, or to a kind that an installed package offers.

    A graph file may name these without `--allow-code`.
    """
    built_in = {name for kind in BUILT_IN.values() for name in (kind.implementation, kind.foreign, kind.seq2seq)}
    return implementation in built_in or any(
        entry.value == implementation for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)
    )


def make(implementation: str, folder: str | None) -> Actor:
    """Create an actor of a kind, without loading it.

    Raises:
        KindError: the file has no such class, or the class is neither an `Actor` nor a `torch.nn.Module`.
    """
    made = load_class(implementation, folder)
    if is_module(made):
        from .module import ModuleActor

        return ModuleActor(made)
    actor: Actor = made()
    return actor


def is_module(made: type[Any]) -> bool:
    """Return whether a class is a plain `torch.nn.Module`. If nothing has imported torch yet, no class is."""
    torch = sys.modules.get("torch")
    return torch is not None and issubclass(made, torch.nn.Module)


def load_class(implementation: str, folder: str | None) -> type[Any]:
    """Import the class of a kind: an `Actor` or a `torch.nn.Module`.

    Raises:
        KindError: the file has no such class, or the class is neither.
    """
    from .actor import Actor

    made = import_name(implementation, folder)
    if not isinstance(made, type) or not (issubclass(made, Actor) or is_module(made)):
        raise KindError(
            f"kind {implementation!r}: expected a class that derives from ranvier.Actor or torch.nn.Module, got {made!r:.80}"
        )
    return made


def import_name(implementation: str, folder: str | None) -> Any:
    """Import `module:Name`, or `file.py:Name` in a folder, and return the object; None if there is no such name.

    Raises:
        KindError: the file does not exist, or lies outside the folder.
    """
    where, _, attribute = implementation.partition(":")
    module = importlib.import_module(where) if folder is None else own_code.module(inside(Path(folder), where))
    return getattr(module, attribute, None)
