"""Compare the latency of 200 calls, each sent to one replica or to both: `python hedge.py`."""

import time
from pathlib import Path

import torch

import ranvier

CALLS = 200


def timed(policy: str) -> tuple[list[float], torch.Tensor]:
    """Return the milliseconds of each call, sorted, and all answers."""
    graph = ranvier.load(
        Path(__file__).parent / "hedge.yaml", allow_code=True, overrides={"actors.work.policy": policy}
    )
    times, answers = [], []
    with ranvier.start(graph) as run:
        for x in torch.linspace(-1, 1, CALLS * 64).reshape(CALLS, 1, 64):
            began = time.perf_counter()
            answers.append(run.call(x=x)["y"])
            times.append((time.perf_counter() - began) * 1000)
    return sorted(times), torch.cat(answers)


def main() -> None:
    answers = {}
    for policy in ("sticky", "{hedge: 2}"):
        times, answers[policy] = timed(policy)
        print(
            f"{policy:12} of {CALLS} calls: median {times[CALLS // 2]:5.1f} ms, p99 {times[CALLS * 99 // 100]:5.1f} ms"
        )
    print("the answers are", "the same" if torch.equal(*answers.values()) else "NOT the same")


if __name__ == "__main__":
    main()
