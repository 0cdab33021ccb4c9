"""Train two encoders and a head together as three actors, then run them on new pictures: `python digits.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import trio
from parts import Half, Joint
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import ranvier

HERE = Path(__file__).parent


def together(parts: nn.ModuleDict, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the same as the graph, in one process."""
    top, bottom = parts["top"](pixels)["features"], parts["bottom"](pixels)["features"]
    return parts["joint"](top, bottom)["logits"]


def main() -> None:
    data = load_digits()
    pixels, label = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    save_file({"pixels": pixels, "label": label}, HERE / "digits.safetensors")

    graph = ranvier.load(HERE / "digits.yaml", allow_code=True)
    trained = trio.run(partial(ranvier.train, graph, HERE / "trained"))
    assert trained.folder is not None
    weights = {f"actors.{name}.weights": f"./trained/{trained.folder.name}/{name}.safetensors" for name in graph.actors}

    parts = nn.ModuleDict({"top": Half(lower=False), "bottom": Half(lower=True), "joint": Joint()})
    for name, part in parts.items():
        part.load_state_dict(load_file(trained.folder / f"{name}.safetensors"))
    with ranvier.start(ranvier.load(HERE / "digits.yaml", allow_code=True, overrides=weights)) as run:
        logits = run.call(pixels=pixels[1400:])["logits"]
    with torch.inference_mode():
        off = float((logits - together(parts, pixels[1400:])).abs().max())
    right = float((logits.argmax(1) == label[1400:]).float().mean())
    print(f"{len(logits)} pictures that were not trained on: {right:.1%} right; off the single process by {off:.1g}")


if __name__ == "__main__":
    main()
