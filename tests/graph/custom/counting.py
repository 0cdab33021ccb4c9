"""Define actors for the tests of replicas, which return their replica and can wait at a gate."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import torch

from ranvier import Actor, Batch, Context, TensorSpec


def pass_through(gate: Path | None) -> None:
    """Wait until the test releases its lock on the file `gate`."""
    if gate is not None:
        with gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)


class Counting(Actor):
    """Return x + 1 and the number of the replica.

    Args: `gate`: the replica `stuck` (default 1) waits at each step while the test locks this file. `late_every`:
    replica 1 takes 50 ms for every step whose number is a multiple. `no_more_than`: replicas from this number on refuse
    to load."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {"y": TensorSpec("float32", ("rows", 2))}

    def load(self, context: Context) -> None:
        self.replica = context.replica
        self.steps = 0
        self.late_every = int(context.args.get("late_every", 0)) if context.replica == 1 else 0
        stuck = "gate" in context.args and context.replica == context.args.get("stuck", 1)
        self.gate = Path(context.args["gate"]) if stuck else None
        if context.replica >= context.args.get("no_more_than", 99):
            raise RuntimeError("no room for me")

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        pass_through(self.gate)
        self.steps += 1
        if self.late_every and self.steps % self.late_every == 0:
            time.sleep(0.05)
        return {"y": torch.stack((batch["x"] + 1, torch.full_like(batch["x"], self.replica)), 1)}


class Pass(Actor):
    """Return x unchanged."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {"x": TensorSpec("float32", ("rows",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"x": batch["x"]}


class Begins(Actor):
    """Return the offset of the input's address from a multiple of 64, in bytes."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"begins": TensorSpec("int64", ("rows",))}

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"begins": torch.full((len(batch.rows),), batch["x"].data_ptr() % 64)}


class Spreader(Actor):
    """Return x unchanged, for branches."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"x": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"x": batch["x"]}


class Branch(Actor):
    """Return x + `args.plus`, after waiting while the test locks the file `args.gate`."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.plus = float(context.args["plus"])
        self.gate = Path(context.args["gate"]) if "gate" in context.args else None

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        pass_through(self.gate)
        return {"y": batch["x"] + self.plus}


class Vote(Actor):
    """Return the sum of the inputs that are present, and their number."""

    inputs = {name: TensorSpec("float32", ("tokens",)) for name in ("a", "b", "c")}
    outputs = {"y": TensorSpec("float32", ("tokens",)), "votes": TensorSpec("int64", ("rows",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        there = list(batch.tensors.values())
        return {"y": torch.stack(there).sum(0), "votes": torch.full((len(batch.rows),), len(there))}


class Condition(Actor):
    """Return x + scale, where scale arrives once per session.

    The graph may lead x back to this actor."""

    inputs = {"x": TensorSpec("float32", ("tokens",)), "scale": TensorSpec("float32", ("tokens",))}
    outputs = {"x": TensorSpec("float32", ("tokens",))}
    once = ("scale",)

    def load(self, context: Context) -> None:
        self.scales: dict[int, torch.Tensor] = {}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        if "scale" in batch.tensors:
            assert "x" not in batch.tensors
            self.scales |= {row.session: batch["scale"][at] for at, row in enumerate(batch.rows)}
            return {}
        return {"x": batch["x"] + torch.stack([self.scales[row.session] for row in batch.rows])}

    def close(self, session: int) -> None:
        self.scales.pop(session, None)


class Halve(Actor):
    """Return x / 2 on each round, `done` once that is under 1, and the input as `seen`."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {name: TensorSpec("float32", ("rows",)) for name in ("x", "done", "seen")}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        half = batch["x"] / 2
        return {"seen": batch["x"].clone(), "done": (half < 1).float(), "x": half}


class Spread(Actor):
    """Return 256 KiB for each token that encode x, most of them zeros."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"wide": TensorSpec("float32", ("tokens", 1 << 16))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        wide = torch.zeros(len(batch["x"]), 1 << 16)
        wide[:, ::1000] = batch["x"][:, None]
        return {"wide": wide}


class Narrowed(Actor):
    """Return the sum of `wide` divided by 66, the count of its numbers that are not zero."""

    inputs = {"wide": TensorSpec("float32", ("tokens", 1 << 16))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["wide"].sum(1) / 66}
