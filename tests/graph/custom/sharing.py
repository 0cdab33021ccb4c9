"""Define actors that share a process with others, and write where they should not."""

from __future__ import annotations

import torch

from ranvier import Actor, Batch, Context, TensorSpec

SPEC = TensorSpec("float32", ("tokens", 64))


class Giver(Actor):
    """Return the same buffer at each step, filled with x, and write over it in the next step."""

    inputs = {"x": SPEC}
    outputs = {"y": SPEC}

    def load(self, context: Context) -> None:
        self.buffer = torch.empty(4096, 64)

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        made = self.buffer[: len(batch["x"])]
        made.copy_(batch["x"])
        return {"y": made}


class Spoiler(Actor):
    """Return x + 1, computed in the memory of the input."""

    inputs = {"x": SPEC}
    outputs = {"y": SPEC}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["x"].add_(1)}


class Adder(Actor):
    """Return a + b."""

    inputs = {"a": SPEC, "b": SPEC}
    outputs = {"y": SPEC}
    writes = False

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["a"] + batch["b"]}
