"""What comes of a training: a line a step, and all of it at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Step:
    """What came of one step, or of one validation after it. `losses` are the terms by `actor.port`; `loss` is their weighted
    sum; `accuracy` is NaN where there is no such; `norm` that of all gradients, where it was asked for."""

    step: int
    loss: float
    losses: Mapping[str, float]
    accuracy: float
    seconds: float
    norm: float = math.nan
    validation: bool = False

    def to_plain(self) -> dict[str, Any]:
        plain = {"step": self.step, "loss": self.loss, "losses": dict(self.losses), "seconds": round(self.seconds, 3)}
        plain |= {name: value for name, value in (("accuracy", self.accuracy), ("norm", self.norm)) if value == value}
        return {**plain, "validation": True} if self.validation else plain


OnStep = Callable[[Step], None]
OnStarted = Callable[[Mapping[str, int]], None]


@dataclass(slots=True)
class Trained:
    """What a training came to: all steps and validations in order, the last checkpoint, what was lost on the way, how long
    stages were busy and waited (`counters` of `actor.replica`)."""

    history: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    losses: list[str] = field(default_factory=list)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    run_dir: Path | None = None
