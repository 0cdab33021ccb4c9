"""Train a mixture of four experts as six actors, then run it on new pictures: `python experts.py`.

A second loss keeps the experts balanced.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import trio
from parts import EXPERTS, PORTS, Expert, choose
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import ranvier

HERE = Path(__file__).parent


def together(parts: nn.ModuleDict, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the same in one process, densely: every expert computes every picture, and most results are not used."""
    _, weight, index = choose(parts["router"]["gate"], pixels)
    answers = torch.stack([parts[port](pixels)["logits"] for port in PORTS], 1)
    chosen = answers.gather(1, index[:, :, None].expand(-1, -1, 10))
    return (chosen * weight[:, :, None]).sum(1)


def main() -> None:
    torch.set_num_threads(1)
    data = load_digits()
    pixels, label = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    save_file({"pixels": pixels, "label": label}, HERE / "digits.safetensors")

    graph = ranvier.load(HERE / "experts.yaml", allow_code=True)
    trained = trio.run(partial(ranvier.train, graph, HERE / "trained"))
    assert trained.folder is not None
    learned = {name: f"./trained/{trained.folder.name}/{name}.safetensors" for name in ("router", *PORTS)}
    weights = {f"actors.{name}.weights": file for name, file in learned.items()}

    with ranvier.start(ranvier.load(HERE / "experts.yaml", allow_code=True, overrides=weights)) as run:
        logits = run.call(pixels=pixels[1400:])["logits"]

    parts = nn.ModuleDict(
        {"router": nn.ModuleDict({"gate": nn.Linear(64, EXPERTS)}), **{port: Expert() for port in PORTS}}
    )
    for name, part in parts.items():
        part.load_state_dict(load_file(trained.folder / f"{name}.safetensors"))
    with torch.inference_mode():
        off = float((logits - together(parts, pixels[1400:])).abs().max())
        load = [int((choose(parts["router"]["gate"], pixels[1400:])[2] == number).sum()) for number in range(EXPERTS)]
    right = float((logits.argmax(1) == label[1400:]).float().mean())
    print(f"{len(logits)} pictures that were not trained on: {right:.1%} right; off the single process by {off:.0e}")
    print(f"pictures that travelled to each expert: {load}")


if __name__ == "__main__":
    main()
