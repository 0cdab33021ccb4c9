"""Train the three parts together in plain torch, then let them collaborate as three actors: `python digits.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from parts import Half, Joint
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import ranvier

HERE = Path(__file__).parent


def train(parts: nn.ModuleDict, pixels: torch.Tensor, digits: torch.Tensor) -> None:
    optimiser = torch.optim.Adam(parts.parameters(), lr=3e-3)
    for _ in range(60):
        for batch in torch.randperm(len(pixels)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(together(parts, pixels[batch]), digits[batch]).backward()
            optimiser.step()


def together(parts: nn.ModuleDict, pixels: torch.Tensor) -> torch.Tensor:
    """The same in one process."""
    top, bottom = parts["top"](pixels)["features"], parts["bottom"](pixels)["features"]
    return parts["joint"](top, bottom)["logits"]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    pixels, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    parts = nn.ModuleDict({"top": Half(lower=False), "bottom": Half(lower=True), "joint": Joint()})
    train(parts, pixels[:1400], digits[:1400])
    save_file(parts.state_dict(), HERE / "digits.safetensors")

    graph = ranvier.load(HERE / "digits.yaml", allow_code=True)
    with ranvier.start(graph) as run:
        logits = run.call(pixels=pixels[1400:])["logits"]
    with torch.inference_mode():
        off = float((logits - together(parts, pixels[1400:])).abs().max())
    right = float((logits.argmax(1) == digits[1400:]).float().mean())
    print(f"{len(logits)} pictures that were not trained on: {right:.1%} right; off the single process by {off:.1g}")


if __name__ == "__main__":
    main()
