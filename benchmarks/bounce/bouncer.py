"""An actor that sends what it gets to the other, and one that does so a given number of times and keeps the time."""

from __future__ import annotations

import time

import torch

from ranvier import Actor, Batch, Context, Row, TensorSpec

BALL = TensorSpec("bfloat16", ("tokens", "width"))


class Wall(Actor):
    """Sends back what it gets."""

    inputs = {"x": BALL}
    outputs = {"x": BALL}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"x": batch["x"]}


class Player(Actor):
    """Plays `bounces` balls against the wall and gives the time of each return, nanoseconds."""

    inputs = {"x": BALL}
    outputs = {"x": BALL, "times": TensorSpec("int64", ("returns",))}

    def load(self, context: Context) -> None:
        self.bounces = int(context.args["bounces"])
        self.times: list[int] = []

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        self.times.append(time.monotonic_ns())
        row = batch.rows[0]
        if len(self.times) > self.bounces:
            times, self.times = self.times, []
            return {"times": torch.tensor(times)}
        following = Row(row.session, row.epoch, row.position + 1, row.tokens)
        return {"x": Batch((following,), {"x": batch["x"]})}
