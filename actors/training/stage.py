"""Train one stage without I/O: run forwards and keep them, run backwards in any order, and apply updates.

Any actor made of torch modules can learn: the modules that it holds are its weights, its `step` is its forward pass. With
asynchronous updates, a forward's version of the weights is kept until its backward is done (weight stashing, PipeDream,
Narayanan et al. 2019). The gradients are applied to the newest version.
"""

from __future__ import annotations

import math
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
    """Compute the outputs of a stage, by port, from a batch."""

    splits = False
    """True if its matrix products can put off their weights' gradients (linear.py)."""
    writes = True
    """True if it may change its inputs in place."""

    def stays(self, name: str) -> bool:
        """Return whether a parameter stays as it is even if the actor learns."""
        return False

    @abstractmethod
    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights `held` under the names that a checkpoint gives them."""


class Wrapped(Learner):
    """Wrap an actor's modules, if any, as one module whose forward pass is the actor's step."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self._step = actor.step
        self.held = held(actor)

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        made = self._step(batch)
        return {port: value[port] if isinstance(value, Batch) else value for port, value in made.items()}

    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return each tensor under all its names, which `weights:` of a graph file and `load_state_dict` read."""
        return tensors_of(self.held)


class _Kept(NamedTuple):
    """Hold a micro-batch between its forward and its backward."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    losses: Sequence[torch.Tensor]
    version: int


class TermValue(NamedTuple):
    """Hold a loss of one micro-batch, and the share of correct answers (NaN if the loss has none)."""

    loss: float
    correct: float


class TrainedStage:
    """Hold the weights of one stage and the micro-batches between forward and backward.

    Args:
        name: the stage's name in errors.
        module: computes the outputs.
        terms: the losses of its outputs.
        given_back: inputs whose gradients go back to earlier stages.
        wanted: outputs for which later stages send gradients.
        trains: whether updates change its weights; otherwise only the gradients of inputs are computed.
        stashes: whether each forward keeps the version of the weights that it ran on.
        recompute: whether the backward computes activations again, instead of keeping them.
    """

    def __init__(
        self, name: str, module: Learner, terms: Sequence[Loss], given_back: Sequence[str], wanted: Sequence[str],
        trains: bool = True, stashes: bool = False, recompute: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.module = module
        self.weights: Weights = {}
        """Tensors that updates change: the parameters or, for parameters in half precision, float32 masters of them."""
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
        """Largest number of updates between a forward and its backward so far."""
        self._terms = terms
        self._given_back, self._wanted = given_back, wanted
        self._stashes = stashes
        self._recompute = recompute
        self._versions: dict[int, Weights] = {}
        self._under_way: dict[int, _Kept] = {}
        self._put_off: dict[int, tuple[list[torch.Tensor], list[torch.Tensor | None]]] = {}
        self._late: dict[int, Late] = {}

    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights under a checkpoint's names, as `Learner.exported` does."""
        return self.module.exported(held)

    def forward(
        self, number: int, inputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], share: float
    ) -> tuple[dict[str, torch.Tensor], list[TermValue]]:
        """Run the forward of micro-batch `number`; return outputs by port, and the losses.

        `share` is the weight of one micro-batch in an update.

        Raises:
            ArithmeticError: an output or a loss is not finite; the message names actor, tensor and micro-batch.
            ValueError: an output for which later stages send a gradient cannot be differentiated.
        """
        given = {port: tensor.detach().requires_grad_(port in self._given_back) for port, tensor in inputs.items()}
        with torch.enable_grad():
            outputs = self._computed(given)
            made = self._losses(outputs, targets)
            terms = [loss * (term.weight * share) for term, loss in zip(self._terms, made, strict=True)]
        values = self._looked(f"of micro-batch {number}", outputs, targets, made)
        self._look_for_gradients(outputs)
        self._under_way[number] = _Kept(given, outputs, terms, self.version)
        return {port: tensor.detach() for port, tensor in outputs.items()}, values

    def _computed(self, given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        held = self._stash() if self._stashes else None

        def run() -> Mapping[str, torch.Tensor]:
            # the module may write to its inputs, which autograd allows only on copies of tensors that want gradients
            batch = _batch({port: tensor.clone() if self.module.writes else tensor for port, tensor in given.items()})
            made: Mapping[str, torch.Tensor]
            made = self.module(batch) if held is None else functional_call(self.module, held, (batch,))
            return made

        if not self._recompute:
            return run()
        # the inputs only tell torch which devices' random numbers to repeat
        made: Mapping[str, torch.Tensor] = recomputed(lambda *_: run(), *given.values(), use_reentrant=False)
        return made

    def _stash(self) -> Weights:
        if self.version not in self._versions:
            self._versions[self.version] = {
                key: weight.detach().clone().requires_grad_() for key, weight in self._live.items()
            }
        return self._versions[self.version]

    def _losses(self, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [losses.KINDS[term.kind](outputs[term.port], _target(term, targets)) for term in self._terms]

    def _looked(
        self, which: str, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor],
        made: Sequence[torch.Tensor],
    ) -> list[TermValue]:  # fmt: skip
        """Return the values of the losses `made`, after a check that they and all outputs are finite.

        All numbers come from the device at once: each look at one would wait for it.

        Raises:
            ArithmeticError: an output or a loss is not finite.
        """
        floats = {port: tensor.detach() for port, tensor in outputs.items() if tensor.is_floating_point()}
        numbers = [tensor.isfinite().all() for tensor in floats.values()]
        for term, loss in zip(self._terms, made, strict=True):
            numbers += [loss.detach(), losses.correct(term.kind, outputs[term.port].detach(), _target(term, targets))]
        found = torch.stack([number.double() for number in numbers]).tolist() if numbers else []
        for port, finite in zip(floats, found, strict=False):
            if not finite:
                raise ArithmeticError(f"{self.name}: output {port!r} {which} is not finite")
        values = [TermValue(*pair) for pair in zip(found[len(floats) :: 2], found[len(floats) + 1 :: 2], strict=True)]
        for term, value in zip(self._terms, values, strict=True):
            if not math.isfinite(value.loss):
                raise ArithmeticError(f"{self.name}: the {term.kind} loss of {term.port!r}, {which}, is {value.loss}")
        return values

    def _look_for_gradients(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Check that the outputs for which gradients arrive can be differentiated.

        A stage that sends gradients back needs all these outputs. A stage that only has weights needs one of them, or a
        loss: a router may pass an input on.
        """
        without = [port for port in self._wanted if not outputs[port].requires_grad]
        learned = len(without) < len(self._wanted) or any(outputs[term.port].requires_grad for term in self._terms)
        if without and (self._given_back or (self.weights and not learned)):
            raise ValueError(
                f"{self.name}: output {without[0]!r} cannot be differentiated: it depends on no weight and no input in a way "
                "that has a gradient; leave the actor out of training (frozen), or fix its step"
            )

    def evaluate(
        self, inputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], list[TermValue]]:
        """Return outputs and losses, and keep nothing for a backward."""
        with torch.no_grad():
            outputs = self.module(_batch(inputs))
            values = self._looked("of validation", outputs, targets, self._losses(outputs, targets))
        return outputs, values

    def backward(self, number: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradients of inputs by port, and add the gradients of weights to those already there."""
        kept = self._under_way.pop(number)
        roots, given = self._roots(kept, gradients)
        if roots:
            torch.autograd.backward(roots, given)
        self._applied(kept)
        return self._returned(kept.inputs, [tensor.grad for tensor in self._differentiated(kept)])

    def backward_inputs(self, number: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradients of inputs by port; `backward_weights` must follow.

        A module that cannot put off its weights' gradients is differentiated twice.
        """
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
        """Compute the gradients of weights that `backward_inputs` has put off."""
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
        """Add the gradients of stashed or half-precision weights to `weights`, and drop versions no longer needed."""
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
        """Copy the masters, if any, to the parameters that forwards compute with."""
        if self._masters:
            with torch.no_grad():
                for key, weight in self._live.items():
                    weight.copy_(self.weights[key])

    def state(self) -> dict[str, torch.Tensor]:
        """Return what training changes, by the module's names: the weights, or their masters, and the buffers."""
        own = {key: weight.detach() for key, weight in self.weights.items()}
        return {**dict(self.module.named_buffers()), **own}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients that exist, by weight."""
        return {key: weight.grad for key, weight in self.weights.items() if weight.grad is not None}

    def updated(self) -> None:
        """Begin a new version after an update has changed the weights."""
        self.version += 1
        self.refresh()
        for weight in self.weights.values():
            weight.grad = None
        under_way = {kept.version for kept in self._under_way.values()}
        for version in [version for version in self._versions if version not in under_way]:
            del self._versions[version]


def _batch(inputs: Mapping[str, torch.Tensor]) -> Batch:
    """Return a micro-batch as one row; a port with fewer tokens than this row has a separate row."""
    lengths = {port: len(tensor) if tensor.dim() else 1 for port, tensor in inputs.items()}
    row = Row(1, 1, 0, max(lengths.values(), default=1))
    own = {port: (row._replace(tokens=length),) for port, length in lengths.items() if length != row.tokens}
    return Batch((row,), inputs, own)


def _target(term: Loss, targets: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    return targets.get(term.target) if term.target is not None else None
