"""Measure what hedging saves: of two replicas, one stands still for 50 ms in a tenth of its steps, at random.

Every policy has its own run. All runs stand ready from the start, and take turns of sixty calls, one call after the
other. All get the same inputs and must give the same answers. The figure is the 99th percentile of milliseconds per
step, over all rounds.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import Answer, Goal

import ranvier

GRAPH = Path(__file__).parent.parent / "examples" / "hedge" / "hedge.yaml"
CALLS = 60
POLICIES = {
    "sticky": "sticky",
    "round robin": "round_robin",
    "least queued": "least_queued",
    "lowest latency": "lowest_latency",
    "hedge: 2": "{hedge: 2}",
    "hedge: 2, after: p95": "{hedge: 2, after: p95}",
}


def percentile(times: list[float], share: int) -> float:
    """Return a percentile by nearest rank."""
    return sorted(times)[math.ceil(share / 100 * len(times)) - 1]


def ask(rounds: int) -> Answer:
    parts = 2 * rounds
    inputs = torch.linspace(-1, 1, parts * CALLS * 64).reshape(-1, 1, 64)
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in POLICIES}
    with tempfile.TemporaryDirectory(prefix="rv-") as folder, contextlib.ExitStack() as stack:
        runs = {}
        for name, policy in POLICIES.items():
            graph = ranvier.load(GRAPH, allow_code=True, overrides={"actors.work.policy": policy})
            runs[name] = stack.enter_context(ranvier.start(graph, runs=Path(folder)))
        for part in inputs.split(CALLS):
            for name, run in runs.items():
                for x in part:
                    began = time.perf_counter()
                    answers[name].append(run.call(x=x)["y"])
                    times[name].append((time.perf_counter() - began) * 1000)
    if not all(torch.equal(torch.cat(answers["sticky"]), torch.cat(other)) for other in answers.values()):
        sys.exit("hedge: the answers are NOT the same under every policy")
    notes = [f"{name}: p50 {percentile(of, 50):.2f}, p95 {percentile(of, 95):.2f}" for name, of in times.items()]
    goals = [
        Goal("hedge: 2", "sticky", 0.5, less=True),
        *(Goal(name, "sticky", less=True) for name in list(POLICIES)[1:]),
    ]
    # one figure per policy: a 99th percentile needs all calls
    return Answer(
        f"milliseconds, p99 of {len(inputs)} steps", {name: [percentile(of, 99)] for name, of in times.items()}, goals,
        ["the answers are the same under every policy", *notes],
    )  # fmt: skip
