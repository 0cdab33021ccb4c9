"""Define what all questions share: turns, medians, ratios and their bounds, the table, and the file under results/."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Names = str | Sequence[str]


class Ended(Exception):
    """Tell that a contestant has ended, and how: by which signal, or with which exit code."""


class Figures(dict[str, list[float]]):
    """Hold the figures of each contestant, one per round. `ended` says why contestants are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, str] = {}

    def end(self, name: str, why: object) -> None:
        """Take a contestant out, since it has ended."""
        self.pop(name, None)
        self.ended[name] = str(why)


@dataclass(frozen=True, slots=True)
class Goal:
    """Compare `ours` with `peer` as a ratio, round by round. Of several names, the best of each round counts.

    Names without figures are left out: those contestants have ended.

    `bound` is what the median ratio should be at least, or at most if `less` is better. None only reports the ratio.
    """

    ours: Names
    peer: Names
    bound: float | None = None
    less: bool = False

    def ratios(self, figures: Mapping[str, list[float]]) -> list[float]:
        return [
            mine / theirs
            for mine, theirs in zip(self._best(figures, self.ours), self._best(figures, self.peer), strict=False)
        ]

    def _best(self, figures: Mapping[str, list[float]], names: Names) -> list[float]:
        best = min if self.less else max
        return [
            best(turn) for turn in zip(*(figures[name] for name in _several(names) if name in figures), strict=True)
        ]

    def __str__(self) -> str:
        return f"{_any_of(self.ours)} / {_any_of(self.peer)}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold the figures of each contestant, one per round, and the goals. `notes` are further lines to print."""

    unit: str
    figures: Figures
    goals: Sequence[Goal]
    notes: Sequence[str] = field(default_factory=tuple)


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int, figures: Figures | None = None) -> Figures:
    """Measure each contestant once per round, in turn, so that a machine whose speed drifts treats all alike.

    A contestant that ends is left out from then on.
    """
    figures = Figures() if figures is None else figures
    figures.update({name: [] for name in contestants})
    for _ in range(rounds):
        for name, measure in contestants.items():
            if name not in figures:
                continue
            try:
                figures[name].append(measure())
            except Ended as why:
                figures.end(name, why)
    return figures


def tell(name: str, question: str, answer: Answer) -> None:
    """Print the table and write `results/<kind of processor>/<name>.json` with machine, versions and date."""
    rounds = len(next(iter(answer.figures.values()), []))
    where = machine()
    print(f"{name}: {question.strip()}\n\n{where['processor']} ({', '.join(where['vectors'])})")
    print(f"{rounds} rounds in turn, {answer.unit}: median (least to most)")
    width = max(map(len, [*answer.figures, *answer.figures.ended, *map(str, answer.goals)]))
    for each, values in answer.figures.items():
        print(f"  {each:{width}} {statistics.median(values):10.2f}  ({min(values):.2f} to {max(values):.2f})")
    for each, why in answer.figures.ended.items():
        print(f"  {each:{width}} has ended: {why}")
    ratios = []
    for goal in answer.goals:
        found = goal.ratios(answer.figures)
        if not found:
            ratios.append(
                {"of": str(goal), "median": None, "rounds": [], "bound": goal.bound, "less_is_better": goal.less}
            )
            print(f"  {goal!s:{width}}          -  not measured: a side has ended")
            continue
        ratio = statistics.median(found)
        ratios.append({
            "of": str(goal), "median": round(ratio, 3), "rounds": [round(one, 3) for one in found], "bound": goal.bound,
            "less_is_better": goal.less,
        })  # fmt: skip
        print(f"  {goal!s:{width}} {ratio:10.2f}  ({min(found):.2f} to {max(found):.2f}){_verdict(goal, ratio)}")
    for note in answer.notes:
        print(f"  {note}")
    folder = RESULTS / kind_of(where)
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "question": question.strip(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": where, "rounds": rounds, "unit": answer.unit, "figures": answer.figures, "ended": answer.figures.ended,
        "ratios": ratios,
        "notes": list(answer.notes),
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(flush=True)


def _verdict(goal: Goal, ratio: float) -> str:
    if goal.bound is None:
        return ""
    holds = ratio <= goal.bound if goal.less else ratio >= goal.bound
    return f"  {'at most' if goal.less else 'at least'} {goal.bound}: {'holds' if holds else 'MISSED'}"


def _several(names: Names) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _any_of(names: Names) -> str:
    """Return a name, or what the names have in common."""
    if isinstance(names, str):
        return names
    parts = zip(*(name.split(", ") for name in names), strict=False)
    common = [part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts)]
    return ", ".join(common) or f"best of {len(names)}"


def kind_of(where: Mapping[str, Any]) -> str:
    """Return the folder of a processor's results: its maker and its widest instructions, such as `amd-avx2`."""
    maker = re.sub(r"\(.*?\)", "", str(where["processor"])).split()[0].lower()
    return f"{maker}-{where['vectors'][-1] if where['vectors'] else 'other'}"


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores, and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "processor": model,
        "vectors": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "pyzmq", "transformers")},
    }
