"""Attention patterns: which heads look at the country when the model names its capital?"""

import ranvier

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    found = run.read("The capital of France is", raw=True, reads=["layer 0-29 pattern"])
    to_france = {
        (place, head): float(each[-1, head, 3]) for place, each in found.items() for head in range(each.shape[1])
    }
    for (place, head), share in sorted(to_france.items(), key=lambda one: -one[1])[:5]:
        print(f"{place}, head {head}: {share:.2f} of its attention")
