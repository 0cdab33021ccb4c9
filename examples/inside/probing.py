"""Probing: does layer 12 know whether a word is a country or an animal? Collect hidden states, and train a probe of them."""

from functools import partial
from pathlib import Path

import torch
import trio
from safetensors.torch import load_file

import ranvier

COUNTRIES = "France Italy Japan Brazil Egypt Canada Spain Kenya Norway India Chile Greece Peru Cuba Iran Nepal"
ANIMALS = "dog cat horse tiger eagle whale rabbit snake monkey shark lion goat sheep wolf bear duck"
words = [word for pair in zip(COUNTRIES.split(), ANIMALS.split(), strict=True) for word in pair]
prompts, labels = [f"Think of {word}" for word in words], [0, 1] * (len(words) // 2)

if __name__ == "__main__":
    with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
        made = run.collect(prompts, ["hidden 12"], "activations", at="last", labels=labels, raw=True)
    graph = ranvier.load("probe.yaml", allow_code=True)
    trained = trio.run(partial(ranvier.train, graph, Path("trained"), allow_code=True))
    held = load_file(made.files[-1])
    weights = {"actors.probe.weights": f"./{trained.folder}/probe.safetensors"}
    with ranvier.start(ranvier.load("probe.yaml", allow_code=True, overrides=weights)) as run:
        kind = run.call(hidden_12=held["hidden_12"][24:])["kind"].argmax(-1)
    right = (kind == held["label"][24:]).to(torch.float32).mean()
    print(f"{right:.0%} of {len(kind)} words that were not trained on are right")
