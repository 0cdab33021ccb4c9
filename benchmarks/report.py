"""What all benchmarks share: rounds in turn, medians, ratios, and the file under results/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "pyzmq")},
    }


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contestant once a round, in turn, so that a machine that drifts treats all alike."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            figures[name].append(measure())
    return figures


def ratios(figures: Mapping[str, list[float]], ours: str, peer: str) -> list[float]:
    """Ours over the peer's, round by round."""
    return [mine / theirs for mine, theirs in zip(figures[ours], figures[peer], strict=True)]


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):9.1f} {unit}  ({min(values):.1f} to {max(values):.1f})"


def save(name: str, told: dict[str, Any]) -> Path:
    """Write `results/<name>.json` with the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.write_text(json.dumps({"benchmark": name, "date": stamp, "machine": machine(), **told}, indent=1) + "\n")
    return file
