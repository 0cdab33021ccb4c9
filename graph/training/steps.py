"""Define the results of a training: one for each step, and all of them together at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Step:
    """Hold the result of one step, or of one validation after it.

    `losses` are the terms by `actor.port`; `loss` is their weighted sum. `accuracy` is NaN if there is none. `norm` is
    the norm of all gradients; it is NaN if norms are not computed.
    """

    step: int
    loss: float
    losses: Mapping[str, float]
    accuracy: float
    seconds: float
    norm: float = math.nan
    validation: bool = False

    def to_plain(self) -> dict[str, Any]:
        plain = {"step": self.step, "loss": self.loss, "losses": dict(self.losses), "seconds": round(self.seconds, 6)}
        plain |= {name: value for name, value in (("accuracy", self.accuracy), ("norm", self.norm)) if value == value}
        return {**plain, "validation": True} if self.validation else plain


OnStep = Callable[[Step], None]
OnStarted = Callable[[Mapping[str, int]], None]


@dataclass(slots=True)
class Trained:
    """Hold the results of a training.

    `history` has all steps and validations in order. `folder` is the last checkpoint. `losses` lists the hosts that
    were lost, with the reason. `counters` say how long stages computed and waited, by `actor.replica`.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    losses: list[str] = field(default_factory=list)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    run_dir: Path | None = None
