"""A small network of which one replica is slow: now and then it stands still for a while, as a machine does that others use."""

import random
import time

import torch
from torch import nn

from ranvier import Actor, TensorSpec


class Work(Actor):
    """Args: `slow`: the replica that is; `one_in`: of so many steps it stands still in one; `ms`: for so long."""

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
