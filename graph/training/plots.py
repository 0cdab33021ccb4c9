"""Draw a training: its losses, and one round of its schedule with the measured costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ranvier.actors.protocol.schedule import play

from ..trace.picture import picture
from .bubbles import Bubbles
from .plan import TrainingPlan

COLOURS = {"F": "#4878a8", "B": "#d1704b", "I": "#d1704b", "W": "#e6b655", "U": "#777777"}
NAMED = {"F": "forward", "B": "backward", "I": "inputs' gradients", "W": "weights' gradients", "U": "update"}
MOST_ACTIONS = 400
"""Limit of drawn actions. More could not be distinguished in the picture."""


def draw(file: Path, plan: TrainingPlan, history: Sequence[Mapping[str, Any]], bubbles: Bubbles | None) -> None:
    """Write a picture. The suffix of the file chooses the format: PNG, or another one that matplotlib knows.

    Raises:
        RequestError: matplotlib is not installed, or cannot write such a file.
    """
    with picture(file, (4, 3) if bubbles is not None else (4,)) as axes:
        _losses(axes[0], plan, history)
        if bubbles is not None:
            _schedule(axes[1], plan, bubbles)


def _losses(axis: Any, plan: TrainingPlan, history: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry for entry in history if "validation" not in entry]
    held = [entry for entry in history if "validation" in entry]
    axis.plot(
        [entry["step"] for entry in steps],
        [entry["loss"] for entry in steps],
        lw=0.8,
        color=COLOURS["F"],
        label="training",
    )
    if held:
        at, losses = [entry["step"] for entry in held], [entry["loss"] for entry in held]
        axis.plot(at, losses, "o-", ms=3, color=COLOURS["B"], label=f"validation, at best {min(losses):.4f}")
    axis.set(xlabel="step", ylabel="loss", title=f"{plan.graph.name}: {plan.section.schedule}")
    axis.legend()
    axis.grid(alpha=0.3)


def _schedule(axis: Any, plan: TrainingPlan, bubbles: Bubbles) -> None:
    played = play(plan.schedule, plan.stages, bubbles.costs)[:MOST_ACTIONS]
    names = list(plan.stages.names)
    for each in played:
        axis.barh(
            names.index(each.stage), (each.ended - each.began) / 1000, left=each.began / 1000, height=0.8,
            color=COLOURS[each.action.kind], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        if len(played) <= 120 and each.action.micro_batch >= 0:
            middle = (each.began + each.ended) / 2000
            axis.text(middle, names.index(each.stage), each.action.micro_batch, ha="center", va="center", fontsize=7)
    for kind in dict.fromkeys(each.action.kind for each in played):
        axis.barh(0, 0, color=COLOURS[kind], label=NAMED[kind])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    title = f"one round: bubble {bubbles.computed:.1%} with these costs, {bubbles.measured:.1%} measured"
    axis.set(xlabel="milliseconds", title=title)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8, ncols=5, frameon=False)
