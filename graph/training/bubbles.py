"""Compute the share of time that stages wait: as measured, and as the schedule predicts from the measured costs."""

from __future__ import annotations

from collections.abc import Mapping

from ranvier.actors.protocol.schedule import BACKWARD, FORWARD, INPUTS, UPDATE, WEIGHTS, Schedule, Stages, bubble, play
from ranvier.actors.protocol.training_spec import WAITED
from ranvier.transport.format.host_id import replica_id

KINDS = (FORWARD, BACKWARD, INPUTS, WEIGHTS, UPDATE)


class Bubbles:
    """Measure how the stages of one training run spend their time.

    A stage computes, handles messages, or waits for a message. The waiting is the bubble.

    Args:
        counters: the counters of the hosts, by `actor.replica`: microseconds and number of each kind of action
            (`F_us`, `F`, …), microseconds of waiting by the role of the link, and microseconds of whole rounds.
    """

    def __init__(self, schedule: Schedule, stages: Stages, counters: Mapping[str, Mapping[str, int]]) -> None:
        own = {replica_id(label).actor: counted for label, counted in counters.items()}
        self._schedule, self._stages = schedule, stages
        self._own = {name: own[name] for name in stages.names if name in own}
        self.costs: dict[tuple[str, str], float] = {}
        """Average microseconds of an action, by stage and kind. All except updates include their messages."""
        for name, counted in self._own.items():
            kinds = [kind for kind in KINDS if counted.get(kind)]
            actions = sum(counted[kind] for kind in kinds if kind != UPDATE)
            for kind in kinds:
                more = 0.0 if kind == UPDATE else self._on_messages(name) / actions
                self.costs[name, kind] = counted[f"{kind}_us"] / counted[kind] + more

    def _waited(self, name: str) -> int:
        return sum(spent for what, spent in self._own[name].items() if what.endswith(WAITED))

    def _computed(self, name: str) -> int:
        return sum(self._own[name].get(f"{kind}_us", 0) for kind in KINDS)

    def _on_messages(self, name: str) -> int:
        return max(self._own[name].get("rounds_us", 0) - self._computed(name) - self._waited(name), 0)

    @property
    def _spans(self) -> dict[str, int]:
        """Return the microseconds from the beginning to the end of rounds, by worker."""
        spans: dict[str, int] = {}
        for name, counted in self._own.items():
            worker = self._stages.worker(name)
            spans[worker] = max(spans.get(worker, 0), counted.get("rounds_us", 0))
        return spans

    def _share(self, spent: int) -> float:
        whole = sum(self._spans.values())
        return spent / whole if whole else 0.0

    @property
    def messages(self) -> float:
        """Return the share of all workers' time that was spent on sending and receiving messages: 0 to 1."""
        return self._share(sum(map(self._on_messages, self._own)))

    @property
    def measured(self) -> float:
        """Return the share of all workers' time that was spent waiting: 0 to 1."""
        if not self._spans:
            return 0.0
        return 1 - self._share(sum(self._computed(name) + self._on_messages(name) for name in self._own))

    @property
    def computed(self) -> float:
        """Return the share of waiting that the schedule predicts for these costs: 0 to 1."""
        return bubble(play(self._schedule, self._stages, self.costs), self._stages)
