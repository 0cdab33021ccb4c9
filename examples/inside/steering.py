"""Steering: add the difference between two moods to the answers of one request, while another one goes on beside it."""

import ranvier
from ranvier import ops

with ranvier.start(ranvier.load("../smollm2.yaml")) as run:
    glad, sad = (
        run.read(f"I feel {mood}", raw=True, reads=["hidden 14"])["hidden 14"][-1] for mood in ("happy", "sad")
    )
    plain = run.generate("How was your day?", max_tokens=24)
    steered = run.generate(
        "How was your day?", max_tokens=24, edits=[ops.add("hidden 14", glad - sad, scale=1, at="answer")]
    )
    for name, generation in (("plain", plain), ("steered", steered)):
        print(f"{name}: {''.join(token.text for token in generation)}")
