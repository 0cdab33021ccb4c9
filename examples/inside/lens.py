"""Logit lens: which token would each layer say next?"""

import ranvier

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    lens = run.lens("The capital of France is", raw=True, top=3)
    print(lens.table(run.codec.decode))
