"""Summarise a training for those who watch it: its losses so far, and its schedule with the costs that were measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ranvier.actors.protocol.schedule import play

from .bubbles import Bubbles
from .plan import TrainingPlan

MOST_POINTS = 300
MOST_ACTIONS = 400
AGAIN_S = 1.0
"""The summary is made anew at most this often."""


class Glance:
    """Summarise one training."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._made_s = 0.0
        self._made: dict[str, Any] = {}

    def look(self, history: Sequence[Mapping[str, Any]], counters: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Return `losses` and `validation` as [step, loss], evenly thinned out, and `schedule`.

        `schedule` has the `stages`, the `actions` as [stage, began µs, ended µs, kind, micro-batch], and the shares of waiting
        (`bubble`) that they predict and that were `measured`.
        """
        now_s = time.monotonic()
        if not self._made or now_s - self._made_s > AGAIN_S:
            self._made_s = now_s
            self._made = {
                "losses": _thinned([[each["step"], each["loss"]] for each in history if "validation" not in each]),
                "validation": _thinned([[each["step"], each["loss"]] for each in history if "validation" in each]),
                "steps": self._plan.section.steps, "schedule": self._schedule(counters),
            }  # fmt: skip
        return self._made

    def _schedule(self, counters: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        plan = self._plan
        bubbles = Bubbles(plan.schedule, plan.stages, counters)
        names = list(plan.stages.names)
        return {
            "name": str(plan.section.schedule), "stages": names, "bubble": bubbles.computed, "measured": bubbles.measured,
            "actions": [
                [names.index(each.stage), each.began, each.ended, each.action.kind, each.action.micro_batch]
                for each in play(plan.schedule, plan.stages, bubbles.costs)[:MOST_ACTIONS]
            ],
        }  # fmt: skip


def _thinned(points: list[list[float]]) -> list[list[float]]:
    step = -(-len(points) // MOST_POINTS) or 1
    return [*points[:-1:step], points[-1]] if points else []
