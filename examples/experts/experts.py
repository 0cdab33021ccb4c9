"""Train a mixture of four experts in plain torch, then let each be an actor of its own: `python experts.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from parts import EXPERTS, PORTS, Expert, choose
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import ranvier

HERE = Path(__file__).parent


def together(parts: nn.ModuleDict, pixels: torch.Tensor) -> torch.Tensor:
    """The same in one process, the dense way: every expert sees every picture, most of them for nothing."""
    weight, index = choose(parts["gate"], pixels)
    answers = torch.stack([parts[port](pixels)["logits"] for port in PORTS], 1)
    chosen = answers.gather(1, index[:, :, None].expand(-1, -1, 10))
    return (chosen * weight[:, :, None]).sum(1)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    pixels, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    parts = nn.ModuleDict({"gate": nn.Linear(64, EXPERTS), **{port: Expert() for port in PORTS}})
    optimiser = torch.optim.Adam(parts.parameters(), lr=3e-3)
    for _ in range(60):
        for batch in torch.randperm(1400).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(together(parts, pixels[batch]), digits[batch]).backward()
            optimiser.step()
    save_file(parts.state_dict(), HERE / "experts.safetensors")

    with ranvier.start(ranvier.load(HERE / "experts.yaml", allow_code=True)) as run:
        logits = run.call(pixels=pixels[1400:])["logits"]
    with torch.inference_mode():
        off = float((logits - together(parts, pixels[1400:])).abs().max())
        load = [int((choose(parts["gate"], pixels[1400:])[1] == number).sum()) for number in range(EXPERTS)]
    right = float((logits.argmax(1) == digits[1400:]).float().mean())
    print(f"{len(logits)} pictures that were not trained on: {right:.1%} right; off the single process by {off:.0e}")
    print(f"pictures that travelled to each expert: {load}")


if __name__ == "__main__":
    main()
