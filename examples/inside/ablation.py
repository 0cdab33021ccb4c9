"""Ablation: how much of an answer's probability is lost without each layer's attention?"""

import ranvier
from ranvier import ops

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    paris = run.tokens(" Paris", raw=True)[0]
    last = ops.read("logits", at="last")

    def share(*edits):
        found = run.read("The capital of France is", raw=True, reads=[last], edits=edits)
        return float(found["logits"][-1].softmax(-1)[paris])

    print(f"whole model: {share():.2f}")
    for layer in (0, 8, 16, 24, 29):
        print(f"without the attention of layer {layer}: {share(ops.zero(f'layer {layer} attention')):.2f}")
