"""One stage that learns, without I/O: forwards that are kept, backwards in any order, updates.

Any actor made of torch modules will do: the modules that it holds are its weights, its `step` is its forward pass. Where
updates are asynchronous a forward runs on a version of the weights that is kept until its backward is done (weight stashing,
PipeDream, Narayanan et al. 2019), and the gradients are applied to the newest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed

from ranvier.transport.format.header import Row

from ..component.actor import Actor, Batch
from ..component.module import held, tensors_of
from ..protocol.training_spec import Loss
from . import losses
from .linear import Late, make_up, put_off

Weights = dict[str, torch.Tensor]


class Learner(nn.Module, ABC):
    """What a stage computes: a batch in, tensors by port out."""

    splits = False
    """Whether its matrix products can put off their weights' gradients (linear.py)."""
    writes = True
    """Whether it may change its inputs in place."""

    def stays(self, name: str) -> bool:
        """Whether a parameter is not to learn, whatever the actor does."""
        return False

    @abstractmethod
    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """These weights by the names that a checkpoint has for them."""


class Wrapped(Learner):
    """An actor's modules as one, whose forward pass is the actor's step. It may hold none: gradients go through it."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self._step = actor.step
        self.held = held(actor)

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        made = self._step(batch)
        return {port: value[port] if isinstance(value, Batch) else value for port, value in made.items()}

    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `weights:` of the graph file reads them again, and torch's `load_state_dict`: by every name that a tensor has."""
        return tensors_of(self.held)


class _Kept(NamedTuple):
    """A micro-batch between its forward and its backward."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    losses: Sequence[torch.Tensor]
    version: int


class Told(NamedTuple):
    """A loss of one micro-batch, and the share of right answers (NaN where there is no such)."""

    loss: float
    correct: float


class Stage:
    """The weights of one stage and the micro-batches under way.

    Args:
        name: for errors.
        module: what is computed.
        terms: the losses that are taken of its outputs.
        given_back: inputs whose gradients others want.
        wanted: outputs whose gradients others send.
        trains: whether it learns; else only gradients of inputs are made.
        stashes: whether each forward keeps the version of weights that it ran on.
        recompute: whether activations are computed again in the backward instead of being kept.
    """

    def __init__(
        self, name: str, module: Learner, terms: Sequence[Loss], given_back: Sequence[str], wanted: Sequence[str],
        trains: bool = True, stashes: bool = False, recompute: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.module = module
        self.weights: Weights = {}
        """What is updated: the parameters themselves or, of those in half precision, float32 masters of them."""
        self._live: Weights = {}
        for key, weight in module.named_parameters():
            learns = trains and not module.stays(key)
            weight.requires_grad_(learns)
            if learns:
                self._live[key] = weight
                self.weights[key] = weight if weight.dtype is torch.float32 else weight.detach().float()
        self._masters = any(self.weights[key] is not weight for key, weight in self._live.items())
        self.version = 0
        self.stalest = 0
        """The most updates that lay between a forward and its backward."""
        self._terms = terms
        self._given_back, self._wanted = given_back, wanted
        self._stashes = stashes
        self._recompute = recompute
        self._versions: dict[int, Weights] = {}
        self._under_way: dict[int, _Kept] = {}
        self._put_off: dict[int, tuple[list[torch.Tensor], list[torch.Tensor | None]]] = {}
        self._late: dict[int, Late] = {}

    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Learner.exported`."""
        return self.module.exported(held)

    def forward(
        self, number: int, inputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], share: float
    ) -> tuple[dict[str, torch.Tensor], list[Told]]:
        """Outputs by port, and the losses. `share`: what a micro-batch counts of an update.

        Raises:
            ArithmeticError: an output is not finite; names actor, tensor, micro-batch.
            ValueError: an output that others send a gradient for cannot be differentiated.
        """
        given = {port: tensor.detach().requires_grad_(port in self._given_back) for port, tensor in inputs.items()}
        with torch.enable_grad():
            outputs = self._computed(given)
            told, terms = [], []
            for term in self._terms:
                target = targets.get(term.target) if term.target is not None else None
                loss = losses.KINDS[term.kind](outputs[term.port], target)
                terms.append(loss * (term.weight * share))
                right = losses.correct(term.kind, outputs[term.port].detach(), target)
                told.append(Told(float(loss.detach()), float(right)))
        self._look(f"of micro-batch {number}", outputs, told)
        self._under_way[number] = _Kept(given, outputs, terms, self.version)
        return {port: tensor.detach() for port, tensor in outputs.items()}, told

    def _computed(self, given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        held = self._stash() if self._stashes else None

        def run() -> Mapping[str, torch.Tensor]:
            # what is given may be written to in place: of a tensor that wants a gradient that needs a copy
            batch = _batch({port: tensor.clone() if self.module.writes else tensor for port, tensor in given.items()})
            made: Mapping[str, torch.Tensor]
            made = self.module(batch) if held is None else functional_call(self.module, held, (batch,))
            return made

        if not self._recompute:
            return run()
        made: Mapping[str, torch.Tensor] = recomputed(run, use_reentrant=False)
        return made

    def _stash(self) -> Weights:
        if self.version not in self._versions:
            self._versions[self.version] = {
                key: weight.detach().clone().requires_grad_() for key, weight in self._live.items()
            }
        return self._versions[self.version]

    def _look(
        self, which: str, outputs: Mapping[str, torch.Tensor], told: Sequence[Told], differentiable: bool = True
    ) -> None:
        for port, tensor in outputs.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
                raise ArithmeticError(f"{self.name}: output {port!r} {which} is not finite")
        if differentiable:
            self._look_for_gradients(outputs)
        for term, (loss, _) in zip(self._terms, told, strict=True):
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise ArithmeticError(f"{self.name}: the {term.kind} loss of {term.port!r}, {which}, is {loss}")

    def _look_for_gradients(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Whoever gives gradients back needs every output that has some; whoever has weights alone, one: a router may pass on
        what it was given."""
        without = [port for port in self._wanted if not outputs[port].requires_grad]
        learned = len(without) < len(self._wanted) or any(outputs[term.port].requires_grad for term in self._terms)
        if without and (self._given_back or (self.weights and not learned)):
            raise ValueError(
                f"{self.name}: output {without[0]!r} cannot be differentiated: it depends on no weight and no input in a way "
                "that has a gradient; leave the actor out of training (frozen), or mend its step"
            )

    def evaluate(
        self, inputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], list[Told]]:
        """Outputs and losses, keeping nothing."""
        with torch.no_grad():
            outputs = self.module(_batch(inputs))
            told = []
            for term in self._terms:
                target = targets.get(term.target) if term.target is not None else None
                loss = losses.KINDS[term.kind](outputs[term.port], target)
                told.append(Told(float(loss), float(losses.correct(term.kind, outputs[term.port], target))))
        self._look("of validation", outputs, told, differentiable=False)
        return outputs, told

    def backward(self, number: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of inputs by port; those of weights are added to what is there."""
        kept = self._under_way.pop(number)
        roots, given = self._roots(kept, gradients)
        if roots:
            torch.autograd.backward(roots, given)
        self._applied(kept)
        return self._returned(kept.inputs, [tensor.grad for tensor in self._differentiated(kept)])

    def backward_inputs(self, number: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of inputs alone. `backward_weights` follows. What cannot put off its weights' is gone through twice."""
        kept = self._under_way[number]
        roots, given = self._roots(kept, gradients)
        if self.module.splits:
            with put_off() as self._late[number]:
                if roots:
                    torch.autograd.backward(roots, given)
            return self._returned(kept.inputs, [tensor.grad for tensor in self._differentiated(kept)])
        self._put_off[number] = roots, given
        wanted = self._differentiated(kept)
        made = (
            torch.autograd.grad(roots, wanted, given, retain_graph=True, allow_unused=True) if wanted and roots else ()
        )
        return self._returned(kept.inputs, made or [None] * len(wanted))

    def backward_weights(self, number: int) -> None:
        """The gradients of weights that `backward_inputs` has left."""
        kept = self._under_way.pop(number)
        if self.module.splits:
            make_up(self._late.pop(number))
            self._applied(kept)
            return
        roots, given = self._put_off.pop(number)
        held = list((self._versions[kept.version] if self._stashes else self._live).values())
        if held and roots:
            torch.autograd.backward(roots, given, inputs=held)
        self._applied(kept)

    def _differentiated(self, kept: _Kept) -> list[torch.Tensor]:
        return [kept.inputs[port] for port in self._given_back]

    def _roots(
        self, kept: _Kept, gradients: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        roots: list[torch.Tensor] = []
        given: list[torch.Tensor | None] = []
        for port, gradient in gradients.items():
            if kept.outputs[port].requires_grad:
                roots.append(kept.outputs[port])
                given.append(gradient)
        for loss in kept.losses:
            if loss.requires_grad:
                roots.append(loss)
                given.append(None)
        return roots, given

    def _returned(
        self, inputs: Mapping[str, torch.Tensor], made: Sequence[torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        return {
            port: torch.zeros_like(inputs[port]) if gradient is None else gradient
            for port, gradient in zip(self._given_back, made, strict=True)
        }

    def _applied(self, kept: _Kept) -> None:
        """Where others than `weights` were computed with, add their gradients to those, and drop what is done with."""
        self.stalest = max(self.stalest, self.version - kept.version)
        if not (self._stashes or self._masters):
            return
        for key, weight in (self._versions[kept.version] if self._stashes else self._live).items():
            master = self.weights[key]
            if weight.grad is not None and weight is not master:
                wide = weight.grad.float()
                master.grad = wide.clone() if master.grad is None else master.grad + wide
                weight.grad = None
        under_way = {other.version for other in self._under_way.values()}
        for version in [version for version in self._versions if version not in under_way and version != self.version]:
            del self._versions[version]

    def refresh(self) -> None:
        """Compute with what the masters are now."""
        if self._masters:
            with torch.no_grad():
                for key, weight in self._live.items():
                    weight.copy_(self.weights[key])

    def state(self) -> dict[str, torch.Tensor]:
        """What changes, by the module's own names: the weights, or their masters, and buffers."""
        own = {key: weight.detach() for key, weight in self.weights.items()}
        return {**dict(self.module.named_buffers()), **own}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those that there are, by weight."""
        return {key: weight.grad for key, weight in self.weights.items() if weight.grad is not None}

    def updated(self) -> None:
        """The weights have changed: what follows is a new version."""
        self.version += 1
        self.refresh()
        for weight in self.weights.values():
            weight.grad = None
        under_way = {kept.version for kept in self._under_way.values()}
        for version in [version for version in self._versions if version not in under_way]:
            del self._versions[version]


def _batch(inputs: Mapping[str, torch.Tensor]) -> Batch:
    """A micro-batch is one row; a port that got only some of its tokens has a row of its own."""
    lengths = {port: len(tensor) if tensor.dim() else 1 for port, tensor in inputs.items()}
    row = Row(1, 1, 0, max(lengths.values(), default=1))
    own = {port: (row._replace(tokens=length),) for port, length in lengths.items() if length != row.tokens}
    return Batch((row,), inputs, own)
