"""Actors for the cases: they are never started."""

from ranvier import Actor, TensorSpec


class Pass(Actor):
    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}


class Deaf(Actor):
    outputs = {"y": TensorSpec("float32", ("tokens",))}


class NoActor:
    pass
