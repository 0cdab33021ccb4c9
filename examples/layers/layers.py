"""Train three dense layers as three actors to read digits, then run them on new digits: `python layers.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import trio
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import ranvier

HERE = Path(__file__).parent
DATA, OUT = HERE / "digits.safetensors", HERE / "trained"


def main() -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    label = torch.tensor(digits.target, dtype=torch.int64)[order]
    save_file({"pixels": pixels, "label": label}, DATA)

    graph = ranvier.load(HERE / "layers.yaml", allow_code=True)
    trained = trio.run(partial(ranvier.train, graph, OUT))
    assert trained.folder is not None
    weights = {f"actors.{name}.weights": f"./trained/{trained.folder.name}/{name}.safetensors" for name in graph.actors}

    held = {name: tensor[-359:] for name, tensor in load_file(DATA).items()}
    with ranvier.start(ranvier.load(HERE / "layers.yaml", allow_code=True, overrides=weights)) as run:
        made = run.call(pixels=held["pixels"])["logits"].argmax(1)
    right = float((made == held["label"]).float().mean())
    print(f"{len(made)} pictures that were not trained on: {right:.1%} right after {graph.file.training.steps} steps")


if __name__ == "__main__":
    main()
