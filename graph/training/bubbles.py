"""How much of the stages' time was spent waiting, as measured and as the schedule has it with the costs that were measured."""

from __future__ import annotations

from collections.abc import Mapping

from ranvier.actors.training.schedule import BACKWARD, FORWARD, INPUTS, UPDATE, WEIGHTS, bubble, play

from .plan import TrainingPlan

KINDS = (FORWARD, BACKWARD, INPUTS, WEIGHTS, UPDATE)


class Bubbles:
    """Of one training run.

    Args:
        counters: what the hosts have counted, by `actor.replica`: microseconds and number of each kind of action (`F_us`, `F`,
            …), and of whole rounds.
    """

    def __init__(self, plan: TrainingPlan, counters: Mapping[str, Mapping[str, int]]) -> None:
        own = {label.partition(".")[0]: counted for label, counted in counters.items()}
        self._plan = plan
        self._own = {name: own[name] for name in plan.stages.names if name in own}
        self.costs = {
            (name, kind): counted[f"{kind}_us"] / counted[kind]
            for name, counted in self._own.items()
            for kind in KINDS
            if counted.get(kind)
        }
        """Microseconds that an action of a stage took, on average."""

    @property
    def measured(self) -> float:
        """0 to 1, of all workers' time from the beginning to the end of rounds."""
        workers: dict[str, list[int]] = {}
        for name, counted in self._own.items():
            busy = sum(counted.get(f"{kind}_us", 0) for kind in KINDS)
            spent = workers.setdefault(self._plan.stages.worker(name), [0, 0])
            spent[0] += busy
            spent[1] = max(spent[1], counted.get("rounds_us", 0))
        spans = sum(span for _, span in workers.values())
        return 1 - sum(busy for busy, _ in workers.values()) / spans if spans else 0.0

    @property
    def computed(self) -> float:
        """What the schedule says for these costs."""
        return bubble(play(self._plan.schedule, self._plan.stages, self.costs), self._plan.stages)
