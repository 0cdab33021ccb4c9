"""Causal tracing: draw which hidden states turn "The capital of Italy is" to Paris (Meng et al. 2022)."""

import matplotlib.pyplot as plt

import ranvier

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    clean, paris = (
        run.read("The capital of France is", raw=True, reads=["hidden 0-30"]),
        run.tokens(" Paris", raw=True)[0],
    )

    def share(place: str, at: int) -> float:
        edit = ranvier.ops.set(place, clean[place][at], at=at)
        found = run.read("The capital of Italy is", raw=True, edits=[edit], reads=["logits"])
        return float(found["logits"][-1].softmax(-1)[paris])

    plt.figure(figsize=(8, 2)).gca().set(
        xlabel="layer", yticks=range(5), yticklabels=["The", "capital", "of", "Italy", "is"]
    )
    plt.imshow([[share(place, at) for place in clean] for at in range(5)], aspect="auto")
plt.colorbar(label="P(Paris)")
plt.savefig("tracing.png", bbox_inches="tight")
