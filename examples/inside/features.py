"""Features: train a sparse autoencoder of layer 12 on English text, and see which features a prompt has."""

from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import trio

import ranvier

texts = [text[start : start + 400] for text in topics.values() for start in range(0, len(text) - 400, 400)][:400]

if __name__ == "__main__":
    with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
        run.collect(texts, ["hidden 12"], "activations", at=range(1, 24), raw=True)
        trained = trio.run(partial(ranvier.train, ranvier.load("sae.yaml", allow_code=True), Path("trained")))
        features = run.features("hidden 12", f"{trained.folder}/sae.safetensors", top=3)
        found = features.of("The capital of France is", raw=True)
    for position in range(1, 5):
        print(position, [f"feature {number}" for number in found.features[position].tolist()])
