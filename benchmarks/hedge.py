"""What does hedging save? Two replicas of which one stands still for 50 ms at random in one step of ten.

Every policy has a run of its own; all stand ready from the start and take turns of a few dozen calls, so that a machine
that drifts treats all alike. A step is one call of the graph, one after the other; all policies get the same inputs, and
their answers are compared. `python benchmarks/hedge.py --rounds 10` prints and saves.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path

import report
import torch

import ranvier

GRAPH = Path(__file__).parent.parent / "examples" / "hedge" / "hedge.yaml"
POLICIES = {
    "sticky": "sticky",
    "round robin": "round_robin",
    "least queued": "least_queued",
    "lowest latency": "lowest_latency",
    "hedge: 2": "{hedge: 2}",
    "hedge: 2, after: p95": "{hedge: 2, after: p95}",
}


def percentile(times: list[float], share: int) -> float:
    """By nearest rank."""
    return sorted(times)[math.ceil(share / 100 * len(times)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=60, help="calls of each policy in each round")
    options = parser.parse_args()
    inputs = torch.linspace(-1, 1, options.rounds * options.calls * 64).reshape(-1, 1, 64)
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in POLICIES}
    with tempfile.TemporaryDirectory(prefix="rv-") as folder, contextlib.ExitStack() as stack:
        runs = {}
        for name, policy in POLICIES.items():
            graph = ranvier.load(GRAPH, allow_code=True, overrides={"actors.work.policy": policy})
            runs[name] = stack.enter_context(ranvier.start(graph, runs=Path(folder)))
        for part in inputs.split(options.calls):
            for name, run in runs.items():
                for x in part:
                    began = time.perf_counter()
                    answers[name].append(run.call(x=x)["y"])
                    times[name].append((time.perf_counter() - began) * 1000)
    same = all(torch.equal(torch.cat(answers["sticky"]), torch.cat(other)) for other in answers.values())
    told = {
        name: {f"p{share}_ms": round(percentile(of, share), 2) for share in (50, 95, 99)} for name, of in times.items()
    }
    print(f"milliseconds of a step over {len(inputs)} steps (two replicas, one stands still for 50 ms in one of ten)")
    for name, figures in told.items():
        ratio = figures["p99_ms"] / told["sticky"]["p99_ms"]
        print(
            f"  {name:22}  p50 {figures['p50_ms']:6.2f}   p95 {figures['p95_ms']:6.2f}   p99 {figures['p99_ms']:6.2f}   "
            f"p99 against sticky {ratio:.2f}"
        )
    print(f"the answers are {'the same' if same else 'NOT the same'}")
    print(f"saved {report.save('hedge', {'steps': len(inputs), 'policies': told, 'same_answers': same})}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
