"""Run a host that trains: it executes its line of the schedule, action by action, and waits for the inputs of each.

All hosts follow the same programme: rounds of the schedule, with pauses for validation and for saving. Each host
counts the rounds itself, so no message has to announce the next part. See `schedule.py` for the actions and
`stage.py` for what they do.
"""

from __future__ import annotations

import gc
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ranvier.transport.links.link_state import Received
from ranvier.transport.links.wire import ProcessWire

from ..component.actor import REPLAYED
from ..component.devices import CPU, seed, wait_for_memory
from ..component.kinds import BUILT_IN
from ..errors import describe
from ..host.loading import context_of, load
from ..host.process import Stopped, live
from ..protocol.control_protocol import Ready, Saved
from ..protocol.host_spec import GATEWAY, HostSpec
from ..protocol.schedule import BACKWARD, FORWARD, UPDATE, WEIGHTS, Action, Stages, parse
from ..protocol.training_spec import (
    INPUT,
    INPUT_GRADIENT,
    LOSS,
    NORM,
    OUTPUT,
    OUTPUT_GRADIENT,
    RING,
    SHARED,
    TARGET,
    TRAINING,
    VALIDATION,
    TrainingSpec,
)
from . import mixture, optimizer, shards
from .inbox import Key
from .layers import NativeStage
from .stage import Learner, TermValue, TrainedStage, Wrapped
from .training_process import Mail

FULL_DEADLINE_S = 60.0
"""Seconds for which the last save of a run is retried, for example while the disk is full."""


def main(spec: HostSpec, lifeline: int) -> int:
    """Run a host that trains from start to end; return the exit code."""
    return live(TrainingHost, spec, lifeline)


class TrainingHost(Mail):
    """Run one stage and its line of the schedule, in the step thread."""

    def mode(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prepare(self, address: str) -> Ready:
        spec = self.spec
        assert spec.training is not None
        self.training: TrainingSpec = spec.training
        training = self.training
        self.begin(training.links)
        # each actor has its own seed; replicas of one actor share it
        self._seed = zlib.crc32(f"{training.seed} {spec.actor}".encode())
        torch.manual_seed(self._seed)
        self.stage = TrainedStage(
            spec.label,
            self._module(),
            training.losses,
            given_back=list(dict.fromkeys(link.port for link in self.of(INPUT_GRADIENT))),
            wanted=list(dict.fromkeys(link.port for link in self.of(OUTPUT_GRADIENT))),
            trains=training.trains,
            stashes=training.stashes,
            recompute=training.recompute,
        )
        weights = list(self.stage.weights.values())
        self.optimizer = optimizer.make(training.optimizer, weights) if weights else None
        self._update = 0
        self._batch: tuple[Key, list[torch.Tensor], list[Received]] = Key(0, -1), [], []
        self._values: list[torch.Tensor] = []
        if training.resume is not None:
            self._update = shards.read(Path(training.resume), self._shard, self.stage, self.optimizer)
        stages = Stages((spec.actor,), (), {})
        line = parse(f"{spec.actor}: {' '.join(training.actions)}", stages).stages[spec.actor]
        self._actions = [action for action in line if action.kind == UPDATE or self._mine(action.micro_batch)]
        held = sum(weight.nbytes for weight in self.stage.module.parameters())
        return Ready(address, None, held, REPLAYED)

    def _module(self) -> Learner:
        """Return the module to train: the training form of a built-in kind, or any other actor's wrapped modules."""
        kind = self.training.kind
        if kind in BUILT_IN:
            context = context_of(self.spec, self.progress)
            if context.device != CPU:
                wait_for_memory(context.device, self.spec.device_bytes)
            made_of = mixture.STAGES.get(kind, NativeStage)
            made: Learner = made_of(BUILT_IN[kind], context, self.training.context, self.training.lora)
            self.progress(1.0)
        else:
            made = Wrapped(load(self.spec, self.progress, stays=True))
        made.train(True)
        self.core.device = context_of(self.spec, self.progress).device
        return made

    def _mine(self, number: int) -> bool:
        """Return whether this replica computes micro-batch `number`."""
        return number % self.training.replicas == self.spec.replica

    @property
    def _shard(self) -> str:
        """Return the name of this replica's files in a training checkpoint."""
        return self.spec.actor if self.spec.replica == 0 else self.spec.label

    # -- the programme --------------------------------------------------------------------------------------------

    def work(self, wire: ProcessWire) -> None:
        try:
            self._programme(wire)
            while True:
                self.take_in_more(wire)
        except Stopped:
            self.drain(wire)

    def _programme(self, wire: ProcessWire) -> None:
        training = self.training
        for number in range(training.first, training.rounds):
            self._round(wire, number)
            done = number + 1
            if training.validate_every and (done % training.validate_every == 0 or done == training.rounds):
                self._validate(wire, number)
            if (training.save_every and done % training.save_every == 0) or done == training.rounds:
                self._save(done)
            gc.collect(0)

    def _save(self, done: int) -> None:
        """Save this host's shard of a training checkpoint.

        If that fails, for example on a full disk, the previous checkpoint remains and training continues. Only the last
        save of a run is retried, for `FULL_DEADLINE_S`.

        Raises:
            OSError, SafetensorError: the last shard cannot be written.
        """
        until_s = time.monotonic() + (FULL_DEADLINE_S if done == self.training.rounds else 0.0)
        while True:
            try:
                shards.write(Path(self.training.folder), done, self._shard, self.stage, self.optimizer, self._update)
                break
            except (OSError, SafetensorError) as error:
                self.core.counters["saves_failed"] += 1
                self.warn(f"round {done} could not be saved: {describe(error)}")
                if time.monotonic() < until_s:
                    time.sleep(1.0)
                elif done == self.training.rounds:
                    raise
                else:
                    return
        self.crossing.report(Saved(done))
        self.owed.clear()  # a run that resumes from this checkpoint starts without codec losses, too

    def _round(self, wire: ProcessWire, number: int) -> None:
        first = number * self.training.micro_batches
        began_ns = time.monotonic_ns()
        for action in self._actions:
            key = Key(TRAINING, first + action.micro_batch)
            if action.kind == FORWARD:
                self._forward(wire, key)
            elif action.kind == UPDATE:
                self._make_update(wire)
            elif action.kind == WEIGHTS:
                self.timed(action, partial(self.stage.backward_weights, key.number))
            else:
                self._backward(wire, key, action)
            self.crossing.steps += 1
        self.core.counters["rounds"] += 1
        self.core.counters["rounds_us"] += (time.monotonic_ns() - began_ns) // 1000
        self._count()

    def _forward(self, wire: ProcessWire, key: Key) -> None:
        inputs, targets, messages = self._inputs(wire, key)
        seed(self._seed * 1_000_003 + key.number + 1)  # random draws depend only on the micro-batch
        share = self.training.share
        outputs, values = self.timed(
            Action(FORWARD, key.number), lambda: self.stage.forward(key.number, inputs, targets, share), messages
        )
        self._send_outputs(key, outputs, values, self.training.of_step)
        self.exchange.drain(wire.send)

    def _inputs(
        self, wire: ProcessWire, key: Key
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[Received]]:
        size = self.training.of_step if key.session == TRAINING else self.training.validation
        whole = Key(key.session, key.number // size)
        given: dict[str, dict[str, torch.Tensor]] = {INPUT: {}, TARGET: {}}
        fed = [link for role in given for link in self.of(role) if link.link.source.actor == GATEWAY]
        if self._batch[0] != whole:  # the gateway sends a whole step's data; it is cut here
            self.until(wire, fed, whole)
            self._batch = whole, *self.core.take(fed, whole)
        index = key.number % size
        for link, tensor in zip(fed, self._batch[1], strict=True):
            given[link.role][link.port] = tensor.chunk(size)[index]
        links = [link for link in self.of(INPUT, key.number) if link.link.source.actor != GATEWAY]
        self.until(wire, links, key)
        came, messages = self.core.take(links, key)
        given[INPUT] |= {link.port: tensor for link, tensor in zip(links, came, strict=True)}
        return given[INPUT], given[TARGET], messages + (self._batch[2] if index == self.spec.replica else [])

    def _send_outputs(
        self, key: Key, outputs: Mapping[str, torch.Tensor], values: Sequence[TermValue], size: int
    ) -> None:
        for link in self.of(OUTPUT, key.number):
            self.send(link, key, outputs[link.port])
        for link in self.of(LOSS):
            self._values.append(torch.tensor(values, dtype=torch.float64).view(-1, 2))
            if len(self._values) == size // self.training.replicas:  # once per step: the receiver shares a core
                self.send(link, Key(key.session, key.number // size), torch.stack(self._values))
                self._values.clear()

    def _backward(self, wire: ProcessWire, key: Key, action: Action) -> None:
        links = self.of(OUTPUT_GRADIENT, key.number)
        self.until(wire, links, key)
        came, messages = self.core.take(links, key)
        gradients: dict[str, torch.Tensor] = {}
        for link, gradient in zip(links, came, strict=True):  # branches are summed in the order of the edges
            gradients[link.port] = gradients[link.port] + gradient if link.port in gradients else gradient
        take = self.stage.backward if action.kind == BACKWARD else self.stage.backward_inputs
        made = self.timed(action, lambda: take(key.number, gradients), messages)
        for link in self.of(INPUT_GRADIENT, key.number):
            self.send(link, key, made[link.port])
        self.exchange.drain(wire.send)

    def _validate(self, wire: ProcessWire, number: int) -> None:
        """Run the forwards of one validation, on samples that are held out of training."""
        self.stage.module.train(False)
        every, count = self.training.validate_every, self.training.validation
        first = (number // every) * count
        for index in filter(self._mine, range(first, first + count)):
            key = Key(VALIDATION, index)
            inputs, targets, messages = self._inputs(wire, key)
            action = Action(FORWARD, index)
            outputs, values = self.timed(action, partial(self.stage.evaluate, inputs, targets), messages, "validation")
            self._send_outputs(key, outputs, values, count)
            self.exchange.drain(wire.send)
        self.stage.module.train(True)

    # -- updates --------------------------------------------------------------------------------------------------

    def _make_update(self, wire: ProcessWire) -> None:
        settings, key = self.training.optimizer, Key(TRAINING, self._update)
        replicated = self.training.replicas > 1 and not self.training.average_every
        if replicated:
            self._sum_over_ring(wire, [self._gradient(weight) for weight in self.stage.weights.values()], self._update)
        self._sum_shared(wire, key)
        clips = settings.clip is not None
        squares = self.counting(self._squares) if clips else 0.0
        if clips and not self.training.stashes:  # asynchronous stages do not wait: each uses its own norm
            squares = self._squares_of_all(wire, key, squares)
        self.timed(Action(UPDATE), partial(self._apply, squares**0.5))
        every = self.training.average_every
        if every and self._update % every == 0:
            held = [weight.detach() for weight in self.stage.weights.values()]
            self._sum_over_ring(wire, held, self._update)
            torch._foreach_mul_(held, 1 / self.training.replicas)
            self.stage.refresh()

    def _gradient(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _sum_over_ring(self, wire: ProcessWire, tensors: Sequence[torch.Tensor], round_: int) -> None:
        """Replace tensors by their sums over all replicas, by a ring all-reduce (Patarasuk and Yuan 2009).

        Each part of the data goes round the ring twice: first it is summed up, then the sum is copied to every replica.
        """
        if not tensors:
            return
        count, own = self.training.replicas, self.spec.replica
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        parts = list(torch.nn.functional.pad(flat, (0, -len(flat) % count)).chunk(count))
        [out] = [link for link in self.of(RING) if link.outgoing]
        back = [link for link in self.of(RING) if not link.outgoing]
        for turn in range(2 * (count - 1)):
            key = Key(TRAINING, 2 * (count - 1) * round_ + turn)
            summing = turn < count - 1
            going, coming = (
                (own - turn, own - turn - 1) if summing else (own + 1 - turn + count - 1, own - turn + count - 1)
            )
            self.send(out, key, parts[going % count].clone())  # the message may be in transit when the part changes
            self.until(wire, back, key)
            [came], _ = self.core.take(back, key)
            parts[coming % count] = parts[coming % count] + came if summing else came.clone()
        flat, start = torch.cat(parts), 0
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def _squares(self) -> float:
        own = {key: gradient for key, gradient in self.stage.gradients().items() if self._counts(key)}
        made = optimizer.squares(own.values())
        if not math.isfinite(made):
            key = next(key for key, gradient in own.items() if not bool(torch.isfinite(gradient).all()))
            raise ArithmeticError(f"{self.spec.label}: the gradient of {key!r} is not finite in update {self._update}")
        return made

    def _squares_of_all(self, wire: ProcessWire, key: Key, own: float) -> float:
        """Return the sum over all stages. Each stage sends its own part to every other stage, so this takes one hop."""
        there = [link for link in self.of(NORM) if link.outgoing]
        for link in there:
            if link.port != GATEWAY:
                self.send(link, key, torch.tensor([own], dtype=torch.float64))
        self.exchange.drain(wire.send)
        back = [link for link in self.of(NORM) if not link.outgoing]
        self.until(wire, back, key)
        came, _ = self.core.take(back, key)
        total = math.fsum([*([own] if self.spec.replica == 0 else []), *map(float, came)])
        for link in there:
            if link.port == GATEWAY:
                self.send(link, key, torch.tensor([total**0.5], dtype=torch.float64))
        return total

    def _apply(self, norm: float) -> None:
        self.core.counters["staleness"] = self.stage.stalest
        scale = optimizer.clipping(self.training.optimizer, norm)
        if self.optimizer is not None:
            gradients = list(self.stage.gradients().values())
            if scale < 1.0 and gradients:
                torch._foreach_mul_(gradients, scale)
            for group in self.optimizer.param_groups:
                group["lr"] = optimizer.pace(self.training.optimizer, self._update, self.training.updates)
            self.optimizer.step()
        self.stage.updated()
        self._update += 1

    def _counts(self, key: str) -> bool:
        """Return whether this stage counts the norm of a weight's gradient; of a shared weight, only the owner does."""
        return self.training.shared.get(key, self.spec.actor) == self.spec.actor

    def _sum_shared(self, wire: ProcessWire, key: Key) -> None:
        """Sum the gradients of weights that several stages hold: the first of these stages sends the sum back."""
        for name, owner in self.training.shared.items():
            weight = self.stage.weights[name]
            own = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            out = [link for link in self.of(SHARED) if link.outgoing and link.port.partition("/")[2] == name]
            back = [link for link in self.of(SHARED) if not link.outgoing and link.port.partition("/")[2] == name]
            if owner != self.spec.actor:
                for link in out:
                    self.send(link, key, own)
                self.exchange.drain(wire.send)
            self.until(wire, back, key)
            came, _ = self.core.take(back, key)
            if owner == self.spec.actor:
                for gradient in came:
                    own = own + gradient
                for link in out:
                    self.send(link, key, own)
                self.exchange.drain(wire.send)
                weight.grad = own
            else:
                weight.grad = came[0].clone()
