"""Define a small network with one slow replica, which pauses at times, as on a shared machine."""

import random
import time

import torch
from torch import nn

from ranvier import Actor, TensorSpec


class Work(Actor):
    """Apply two linear layers; one replica is slow.

    Args: `slow` is the number of the slow replica. It pauses in one step of `one_in`, for `ms` milliseconds.
    """

    inputs = {"x": TensorSpec("float32", ("rows", 64))}
    outputs = {"y": TensorSpec("float32", ("rows", 64))}

    def load(self, context):
        torch.manual_seed(1)  # the same weights in every replica
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.chance = random.Random(2)
        self.odds = 1 / context.args["one_in"] if context.replica == context.args["slow"] else 0.0
        self.pause_s = context.args["ms"] / 1000

    def step(self, batch):
        if self.chance.random() < self.odds:
            time.sleep(self.pause_s)
        return {"y": self.layers(batch["x"])}
