"""Compute the square roots of ten numbers with a loop in a graph: `python refine.py`."""

from pathlib import Path

import torch

import ranvier


def main() -> None:
    numbers = torch.arange(1.0, 11.0, dtype=torch.float64)
    graph = ranvier.load(Path(__file__).parent / "refine.yaml", allow_code=True)
    with ranvier.start(graph) as run:
        roots = run.call(state=torch.stack((numbers, numbers), 1))["state"][:, 1]
    for number, root in zip(numbers.tolist(), roots.tolist(), strict=True):
        print(f"{number:4.0f}  {root:.9f}")


if __name__ == "__main__":
    main()
