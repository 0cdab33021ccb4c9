"""Run all hosts of a training once, from a checkpoint to the end or until the first host is lost.

An attempt sends batches, receives losses, and completes the shards that the hosts save to training checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ranvier.actors.protocol.host_spec import GATEWAY, Restart
from ranvier.actors.protocol.training_spec import LOSS, NORM, OUTPUT, TRAINING, VALIDATION, TrainingLink
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.format.errors import LinkClosed, ProtocolError, ResourceError
from ranvier.transport.format.header import Row
from ranvier.transport.links.exchange import RefusedMessage
from ranvier.transport.links.link_state import Outbound, Received

from ..observe import metrics
from ..run import run_folder
from ..run.chaos import ChaosLink
from ..run.hosts import Hosts
from . import checkpoints
from .checkpoints import TrainingCheckpoint
from .data import Data
from .glance import Glance
from .plan import TrainingPlan

if TYPE_CHECKING:
    import torch

from .steps import OnStarted, OnStep, Step, Trained

AHEAD = 2
"""Number of steps whose batches are sent before the losses of the first of them have come."""


class Attempt:
    """Run all hosts once, from a training checkpoint to the end or until the first host is lost."""

    def __init__(
        self,
        plan: TrainingPlan,
        data: Data,
        out: Path,
        found: TrainingCheckpoint | None,
        trained: Trained,
        on_step: OnStep,
        keep: int,
        bad_links: Sequence[ChaosLink] = (),
        log: str | None = None,
    ) -> None:
        self._bad_links, self._shown = bad_links, log
        self._hosts: Hosts
        self.plan, self.data, self.out, self.found, self.trained = plan, data, out, found, trained
        self.restarts: dict[str, tuple[str, Restart]] = {}
        self._on_step = on_step
        self._keep = keep
        self._first = found.rounds if found is not None else 0
        self._links = plan.links[GATEWAY, 0]
        self._terms = plan.terms
        self._changed = trio.Event()
        self._done_steps = self._first * plan.steps_of_round
        self._losses: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
        self._norm_of: dict[int, float] = {}
        self._unreported: deque[Step] = deque()
        self._saved: dict[int, set[str]] = {}
        self._last_saved = self._first
        self._step_began_s = 0.0

    # -- starting and ending --------------------------------------------------------------------------------------

    async def run(self, runs: Path, on_started: OnStarted, zygote: ZygoteProcess | None) -> None:
        """Train until all rounds are done.

        Raises:
            ActorFailed: a host was lost.
            ResourceError: there is no room for the run's folder, or for a training checkpoint.
        """
        plan, graph = self.plan, self.plan.graph

        def blame(error: OSError) -> BaseException:
            return ResourceError(f"the training cannot continue: {error}; its last checkpoint is kept")

        with run_folder.made(plan.plan, runs, blame) as folder, contextlib.ExitStack() as closing:
            self.trained.run_dir = folder.path
            resume = self.found.folder if self.found is not None else None
            specs = plan.hosts(folder.path, folder.sockets, self.out.absolute(), self._first, resume)
            self._labels = {spec.label for spec in specs}
            self.restarts = {spec.label: (spec.actor, spec.restart) for spec in specs}
            hosts = self._hosts = Hosts(
                plan.plan, folder, specs, [link.link for link in self._links],
                zygote=zygote, bad_links=self._bad_links, shown=self._shown, by_position=True,
            )  # fmt: skip
            closing.callback(hosts.close)
            hosts.supervisor.on_saved = self._on_saved
            glance = Glance(plan)
            hosts.status.more = lambda: {
                "recoveries": len(self.trained.losses),
                "restarts": Counter(lost.partition(".")[0] for lost in self.trained.losses),
                "training": self._progress() | glance.look(self.trained.history, hosts.supervisor.supervision.counters),
            }
            self._exchange = hosts.end.exchange
            self._by_link = {self._exchange.receiver(link.link): link for link in self._links if not link.outgoing}
            try:
                async with (
                    hosts.up() as nursery,
                    metrics.served(graph.file.telemetry.metrics, graph.name, self._at_a_glance, hosts.log),
                ):
                    await hosts.link(nursery, self)
                    on_started(dict(hosts.supervisor.pids))
                    nursery.start_soon(self._watch)
                    self._step_began_s = time.monotonic()
                    await self._feed()
                    await self._until(lambda: self._last_saved >= plan.rounds)
            finally:
                self.trained.counters = hosts.counters
                folder.outcome(counters=self.trained.counters)

    def _at_a_glance(self) -> dict[str, Any]:
        """Return what is known at this moment, as `Run.status` does, without asking a host."""
        return {
            **self._hosts.status.snapshot(), "counters": self._hosts.supervisor.supervision.counters,
            "recoveries": len(self.trained.losses), "training": self._progress(),
        }  # fmt: skip

    def _progress(self) -> dict[str, Any]:
        """Return the figures of the last step and of the last validation."""
        last, validated = self._latest(validation=False), self._latest(validation=True)
        return {name: last[name] for name in ("step", "loss", "accuracy", "norm", "seconds") if name in last} | {
            f"validation_{name}": validated[name] for name in ("loss", "accuracy") if name in validated
        }

    def _latest(self, *, validation: bool) -> Mapping[str, Any]:
        entry = (step for step in reversed(self.trained.history) if step.get("validation", False) is validation)
        return next(entry, {})

    async def _watch(self) -> None:
        """End the attempt when the first host is lost."""
        lost = await self._hosts.supervisor.next_lost(())
        assert lost.lost is not None
        raise lost.lost

    # -- sending batches ------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        """Send the batches of all rounds, some steps ahead of their losses."""
        plan, section = self.plan, self.plan.section
        for number in range(self._first, plan.rounds):
            for step in range(number * plan.steps_of_round, (number + 1) * plan.steps_of_round):
                await self._until(lambda step=step: step - self._done_steps < AHEAD * self._patience)  # type: ignore[misc]
                batch = await trio.to_thread.run_sync(self.data.training, step)
                self._send(TRAINING, step, batch)
            done = number + 1
            if self._pauses(done):
                assert section.validate_ is not None
                parts = [self.data.validation(index) for index in range(section.validate_.batches)]
                self._send(VALIDATION, number // plan.validate_rounds, _together(parts))
        await self._until(lambda: self._done_steps >= section.steps)

    @property
    def _patience(self) -> int:
        """Return the factor of `AHEAD` for this training.

        Asynchronous stages never wait for a step to end, so more steps are in flight.
        """
        return max(1, -(-len(self.plan.stages.names) // self.plan.section.micro_batches))

    def _pauses(self, done: int) -> bool:
        every = self.plan.validate_rounds
        return bool(every) and (done % every == 0 or done == self.plan.rounds)

    def _send(self, session: int, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        from ranvier.transport.format.tensors import to_buffer

        for link in self._links:
            if link.role == OUTPUT:
                tensor = tensors[link.port].contiguous()
                meta, buffer = to_buffer(link.link.tensors[0][0], tensor)
                sending = self._exchange.sender(link.link)
                row = Row(session, 1, number, len(tensor))
                self._exchange.send(sending, Outbound((row,), (meta,), (buffer,), time.monotonic_ns()))
        self.flush()

    # -- receiving losses -----------------------------------------------------------------------------------------

    @property
    def due_ns(self) -> int | None:
        """Return None: a training has nothing to do at a certain time."""
        return None

    def on_due(self, now_ns: int) -> None:
        """Do nothing."""

    def on_tick(self) -> None:
        """Do nothing."""

    def on_refused(self, error: ProtocolError) -> None:
        """Log a refused message. If it was damaged on the way, its sender repeats it.

        Raises:
            RefusedMessage: the message does not fit its edge, and training must not skip a row.
        """
        if isinstance(error, RefusedMessage):
            raise error
        self._hosts.supervisor.refused(GATEWAY, str(error))

    def flush(self) -> None:
        """Send waiting messages, and wake the tasks that wait for a change."""
        with contextlib.suppress(LinkClosed):
            self._exchange.drain(self._hosts.end.wire.send)
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._changed.wait()

    def on_message(self, received: Received) -> None:
        """Handle a message with the losses of a step, or with its norm."""
        from ranvier.transport.format.tensors import from_buffer

        link, row = self._by_link[received.link], received.header.rows[0]
        values = from_buffer(received.header.tensors[0], received.buffers[0]).tolist()
        self._exchange.consumed(received.link, received.nbytes)
        if link.role == LOSS:
            self._on_losses(link, row, values)
        elif link.role == NORM:
            self._norm_of[row.position] = float(values[0])
            self._report_steps()
        else:
            raise ProtocolError(f"edge {link.link.name}: expected a loss or a norm, got {link.role}")

    def _on_losses(self, link: TrainingLink, row: Row, values: list[list[list[float]]]) -> None:
        """Collect the losses of one actor in one step, of shape [micro-batches, terms, 2].

        The step is done when all losses have come.
        """
        key = (row.session, row.position)
        terms = self._losses.setdefault(key, {})
        for index, (name, _) in enumerate(self._terms[link.port]):
            terms.setdefault(name, []).extend((entry[index][0], entry[index][1]) for entry in values)
        section = self.plan.section
        size = section.micro_batches
        if row.session == VALIDATION:
            assert section.validate_ is not None
            size = section.validate_.batches
        if len(terms) == sum(map(len, self._terms.values())) and all(len(each) == size for each in terms.values()):
            self._on_step_done(key, self._losses.pop(key))

    def _on_step_done(self, key: tuple[int, int], terms: Mapping[str, list[tuple[float, float]]]) -> None:
        plan = self.plan
        means = {name: math.fsum(loss for loss, _ in each) / len(each) for name, each in terms.items()}
        weights = {name: weight for terms_of in self._terms.values() for name, weight in terms_of}
        right = [share for each in terms.values() for _, share in each if share == share]
        accuracy = math.fsum(right) / len(right) if right else math.nan
        total = math.fsum(weights[name] * mean for name, mean in means.items())
        now_s = time.monotonic()
        session, number = key
        if session == VALIDATION:
            at = min((number + 1) * plan.validate_rounds * plan.steps_of_round, plan.section.steps)
            step = Step(at, total, means, accuracy, 0.0, validation=True)
        else:
            step = Step(number + 1, total, means, accuracy, now_s - self._step_began_s)
            self._step_began_s = now_s
            self._done_steps = max(self._done_steps, number + 1)
        self._unreported.append(step)
        self._report_steps()

    def _report_steps(self) -> None:
        """Report finished steps in their order. A step is reported once its norm has come, if norms are computed."""
        clips = any(link.role == NORM for link in self._links)
        while self._unreported:
            step = self._unreported[0]
            if clips and not step.validation:
                if step.step - 1 not in self._norm_of:
                    return
                step.norm = self._norm_of.pop(step.step - 1)
            self._unreported.popleft()
            self.trained.history.append(step.to_plain())
            self._on_step(step)
        self._finish_saved()

    def _on_saved(self, label: str, rounds: int) -> None:
        self._saved.setdefault(rounds, set()).add(label)
        self._finish_saved()

    def _finish_saved(self) -> None:
        """Complete the checkpoints that all hosts have saved, once all losses up to them are known.

        Losses come over links, and the notices of saved shards over the control socket, so either may come first.
        """
        for rounds, saved in list(self._saved.items()):
            at = rounds * self.plan.steps_of_round
            known = {(entry["step"], "validation" in entry) for entry in self.trained.history}
            if saved != self._labels or (at, False) not in known:
                continue  # a host without disk space may never save its shard
            if self._pauses(rounds) and (at, True) not in known:
                continue
            self._saved = {other: entry for other, entry in self._saved.items() if other > rounds}
            history = [entry for entry in self.trained.history if entry["step"] <= at]
            try:
                self.trained.folder = checkpoints.finish(self.out, self.plan, rounds, history, self._keep)
            except OSError as error:  # the disk is full: the previous checkpoint remains
                if rounds == self.plan.rounds:
                    raise
                self._hosts.supervisor.note("checkpoint not finished", round=rounds, what=str(error))
                continue
            self._last_saved = rounds
            self._changed.set()
            self._changed = trio.Event()


def _together(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
