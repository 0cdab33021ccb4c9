"""Activation patching: which hidden state carries the country from one prompt into another?"""

import ranvier
from ranvier import ops

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    clean = run.read("The capital of France is", raw=True, reads=["hidden 1-30"])
    for layer in (1, 10, 20, 30):
        for at in (3, 4):
            edit = ops.set(f"hidden {layer}", clean[f"hidden {layer}"][at], at=at)
            [token] = run.generate("The capital of Italy is", raw=True, max_tokens=1, edits=[edit])
            print(f"hidden {layer:2} of position {at} from France: the capital of Italy is{token.text}")
