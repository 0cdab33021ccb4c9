"""Show the progress of a training on standard error: a live line on a terminal, else a line every 10 s or so."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ..sessions.printable import printable
from .plan import TrainingPlan
from .trainer import Step

EVERY_S = 10.0


class TrainingProgress:
    """Show the progress of one training. Use it in a `with`."""

    def __init__(self, plan: TrainingPlan, stream: TextIO) -> None:
        self._plan = plan
        self._stream = stream
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._validation = math.nan
        self._shown_s = -math.inf
        self._pace = 0.0

    def __enter__(self) -> TrainingProgress:
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task("starting", total=self._plan.section.steps)
            self._bar.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, what: str) -> None:
        """Print a message about anything but a step."""
        if self._bar is not None:
            self._bar.console.print(printable(what), markup=False, highlight=False)
        else:
            print(f"ranvier: {what}", file=self._stream, flush=True)

    def show(self, step: Step) -> None:
        """Show the result of a step or a validation."""
        if step.validation:
            self._validation = step.loss
        else:
            self._pace = 0.9 * self._pace + 0.1 * step.seconds if self._pace else step.seconds
        line = self._line(step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=line, completed=step.step)
            return
        now_s = time.monotonic()
        if step.validation or step.step == self._plan.section.steps or now_s >= self._shown_s + EVERY_S:
            self._shown_s = now_s
            print(f"ranvier: {line}", file=self._stream, flush=True)

    def _line(self, step: Step) -> str:
        section = self._plan.section
        unit, size = "examples", section.batch
        if self._plan.graph.checkpoint is not None:
            unit, size = "tokens", section.batch * section.data.context
        parts = [f"step {step.step} of {section.steps}"]
        parts.append(f"{'validation' if step.validation else 'loss'} {step.loss:.4f}")
        if step.accuracy == step.accuracy:
            parts.append(f"right {step.accuracy:.1%}")
        if not step.validation and self._validation == self._validation:
            parts.append(f"validation {self._validation:.4f}")
        if self._pace:
            left_s = (section.steps - step.step) * self._pace
            parts += [f"{size / self._pace:.0f} {unit}/s", f"{left_s:.0f} s left"]
        return ", ".join(parts)
