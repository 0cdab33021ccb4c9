"""Actors that go wrong on purpose, for the tests: each does as `args` says."""

from __future__ import annotations

import os
import signal
import time

from ranvier import Actor, Batch, Context, SessionInfo, TensorSpec


class Faulty(Actor):
    """Gives x + 1. `at_load` and `at_step` name what goes wrong; at a step it does when x is 13."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.fault = context.args.get("at_step")
        self.open_sessions: set[int] = set()
        context.progress(0.5)
        go_wrong(context.args.get("at_load"))

    def open(self, session: SessionInfo) -> None:
        self.open_sessions.add(session.session)
        if self.fault == "raise at open":
            raise RuntimeError("refuses to open")

    def close(self, session: int) -> None:
        self.open_sessions.remove(session)

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        assert {row.session for row in batch.rows} <= self.open_sessions
        if (batch["x"] == 13).any():
            if self.fault == "wrong shape":
                return {"y": batch["x"].view(-1, 1)}
            if self.fault == "wrong port":
                return {"z": batch["x"]}
            if self.fault == "say nothing":
                return {}
            if self.fault == "no tensor":
                return {"y": 5}
            go_wrong(self.fault)
        return {"y": batch["x"] + 1}


class Wide(Actor):
    """Gives 64 MB that say what x is."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens", 1 << 24))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["x"][:, None].repeat(1, 1 << 24)}


class Narrow(Actor):
    """Gives the first of each 64 MB, after a while."""

    inputs = {"x": TensorSpec("float32", ("tokens", 1 << 24))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.delay_s = float(context.args.get("delay_s", 0.0))

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        time.sleep(self.delay_s)
        return {"y": batch["x"][:, 0].clone()}


class Sum(Actor):
    """Joins two inputs."""

    inputs = {"a": TensorSpec("float32", ("tokens",)), "b": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["a"] + batch["b"]}


def go_wrong(how: str | None) -> None:
    if how == "raise":
        raise ValueError("thirteen is not a number I like")
    if how == "exit":
        print("last words on standard error", file=__import__("sys").stderr, flush=True)
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "sleep":
        time.sleep(3600)
    if how == "hold the interpreter":
        import ctypes

        ctypes.PyDLL(None).sleep(3600)  # a C call that never lets go of the GIL
