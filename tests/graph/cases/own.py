"""Define actors for the cases. They are never started."""

import torch

from ranvier import Actor, TensorSpec


class Pass(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}


class Deaf(Actor):
    """Represent an actor without inputs."""

    outputs = {"y": TensorSpec("float32", ("tokens",))}


class NoActor:
    pass


class Net(torch.nn.Module):
    """Hold one linear layer, in a module without actor code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Small(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens", 4))}
    outputs = {"y": TensorSpec("float32", ("tokens", 4))}


class Free(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens", "width"))}
    outputs = {"y": TensorSpec("float32", ("tokens", "width"))}


class Large(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens", 8))}
    outputs = {"y": TensorSpec("float32", ("tokens", 8))}


class Two(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens",)), "z": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}


class Once(Actor):
    """Name an input that does not exist as one that arrives once per session."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}
    once = ("memory",)


class Both(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",)), "z": TensorSpec("float32", ("tokens",))}


class Told(Actor):
    """Take `memory` once per session."""

    inputs = {"x": TensorSpec("float32", ("tokens",)), "memory": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}
    once = ("memory",)


class Careful(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}
    args = {"factor": "what x is multiplied by"}


class Ring(Actor):
    inputs = {"token": TensorSpec("int64", ("tokens",))}
    outputs = {"token": TensorSpec("int64", ("tokens",))}


class Whole(Actor):
    inputs = {"x": TensorSpec("int64", ("tokens",))}
    outputs = {"y": TensorSpec("int64", ("tokens",))}
