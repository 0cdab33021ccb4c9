"""Actors for the tests of replicas: they say which replica they are, and can be made to wait at a gate."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import torch

from ranvier import Actor, Batch, Context, TensorSpec


def pass_through(gate: Path | None) -> None:
    """Wait until whoever holds the gate (a lock on the file) lets go of it."""
    if gate is not None:
        with gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)


class Counting(Actor):
    """Gives x + 1 and the number of the replica. Args: `gate`: the replica `stuck` (1) waits at each step while the test
    locks this file; `late_every`: replica 1 takes 50 ms for one step in so many; `no_more_than`: replicas from this on refuse to load."""

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
    """Gives x as it is."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {"x": TensorSpec("float32", ("rows",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"x": batch["x"]}


class Begins(Actor):
    """How many bytes after a multiple of 64 its input begins in memory."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"begins": TensorSpec("int64", ("rows",))}

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"begins": torch.full((len(batch.rows),), batch["x"].data_ptr() % 64)}


class Spreader(Actor):
    """Gives x as it is, for branches."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"x": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"x": batch["x"]}


class Branch(Actor):
    """Gives x + `args.plus`, and waits before while the test locks the file `args.gate`."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.plus = float(context.args["plus"])
        self.gate = Path(context.args["gate"]) if "gate" in context.args else None

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        pass_through(self.gate)
        return {"y": batch["x"] + self.plus}


class Vote(Actor):
    """Gives the sum of whatever is there, and how many that are."""

    inputs = {name: TensorSpec("float32", ("tokens",)) for name in ("a", "b", "c")}
    outputs = {"y": TensorSpec("float32", ("tokens",)), "votes": TensorSpec("int64", ("rows",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        there = list(batch.tensors.values())
        return {"y": torch.stack(there).sum(0), "votes": torch.full((len(batch.rows),), len(there))}


class Condition(Actor):
    """Gives x + scale, where scale comes once a session; goes round as its graph says."""

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
    """Gives x / 2 each time round, `done` once that is under 1, and `seen`: what came in."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {name: TensorSpec("float32", ("rows",)) for name in ("x", "done", "seen")}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        half = batch["x"] / 2
        return {"seen": batch["x"].clone(), "done": (half < 1).float(), "x": half}


class Spread(Actor):
    """Gives 256 kB that say what x is, most of them zeros."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"wide": TensorSpec("float32", ("tokens", 1 << 16))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        wide = torch.zeros(len(batch["x"]), 1 << 16)
        wide[:, ::1000] = batch["x"][:, None]
        return {"wide": wide}


class Narrowed(Actor):
    """Gives the sum of what is wide, over the numbers that are not zero."""

    inputs = {"wide": TensorSpec("float32", ("tokens", 1 << 16))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["wide"].sum(1) / 66}
