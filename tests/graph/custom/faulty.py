"""Define actors that fail on purpose, as `args` says."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ranvier import Actor, Batch, Context, SessionInfo, TensorSpec, scatter


class Faulty(Actor):
    """Return x + 1. `at_load` and `at_step` name the faults. A step has its fault if x is 13."""

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


class Remembering(Actor):
    """Return the sum of all x so far, over all sessions, and save it.

    A session counts once, however often its step arrives."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.sum = torch.zeros(())
        self.counted: set[int] = set()

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        [row] = batch.rows
        if row.session not in self.counted:
            self.counted.add(row.session)
            self.sum = self.sum + batch["x"].sum()
        return {"y": self.sum.repeat(len(batch["x"]))}

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {"sum": self.sum, "counted": torch.tensor(sorted(self.counted))}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.sum, self.counted = state["sum"], set(state["counted"].tolist())


class Wide(Actor):
    """Return 64 MiB for each token, filled with x."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens", 1 << 24))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["x"][:, None].repeat(1, 1 << 24)}


class Narrow(Actor):
    """Return the first number of each 64 MiB, after waiting while the test locks the file `args.gate`."""

    inputs = {"x": TensorSpec("float32", ("tokens", 1 << 24))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.gate = context.args.get("gate")

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        if self.gate is not None:
            with open(self.gate) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
        return {"y": batch["x"][:, 0].clone()}


class Router(Actor):
    """Send each number to the expert that it names."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"e0": TensorSpec("float32", ("tokens", 1)), "e1": TensorSpec("float32", ("tokens", 1))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return scatter(batch.rows, batch["x"][:, None], batch["x"][:, None].long(), ["e0", "e1"])


class Experts(Actor):
    """Return 10 times the number of tokens of expert 0, plus that of expert 1, for each row."""

    inputs = {"e0": TensorSpec("float32", ("tokens", 1)), "e1": TensorSpec("float32", ("tokens", 1))}
    outputs = {"y": TensorSpec("int64", ("rows",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {
            "y": torch.tensor(
                [10 * a.tokens + b.tokens for a, b in zip(batch.rows_of("e0"), batch.rows_of("e1"), strict=True)]
            )
        }


class Sum(Actor):
    """Add two inputs."""

    inputs = {"a": TensorSpec("float32", ("tokens",)), "b": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": batch["a"] + batch["b"]}


def go_wrong(how: str | None) -> None:
    """Fail in the way that `how` names."""
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
    if how == "deadlock":
        lock = threading.Lock()
        with lock, lock:
            pass
    if how == "hold the interpreter":
        import ctypes

        ctypes.PyDLL(None).sleep(3600)  # a C call that never releases the GIL


class DiesOnce(Actor):
    """Return the number of steps that the session has had.

    The process dies in its first step of all, after counting it."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.gate = Path(context.args["gate"])
        self.steps: dict[int, int] = {}

    def open(self, session: SessionInfo) -> None:
        self.steps[session.session] = 0

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        [row] = batch.rows
        self.steps[row.session] += 1
        if not self.gate.exists():
            self.gate.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"y": torch.tensor([float(self.steps[row.session])])}


class LoadsOnce(Faulty):
    """Append a letter to the file `gate` at each load, and fail at each load after the first."""

    def load(self, context: Context) -> None:
        super().load(context)
        gate = Path(context.args["gate"])
        with gate.open("a") as file:
            file.write("x")
        if len(gate.read_text()) > 1:
            raise RuntimeError("loads only once")


class Leaky(Faulty):
    """Never return credit, by ignoring what was consumed."""

    def load(self, context: Context) -> None:
        super().load(context)
        import gc

        from ranvier.transport.links.exchange import Exchange

        [exchange] = [one for one in gc.get_objects() if isinstance(one, Exchange)]
        exchange.consumed = lambda _link, _nbytes: None


class SlowReplica(Faulty):
    """Take 200 ms for each step in replica 0."""

    def load(self, context: Context) -> None:
        super().load(context)
        self.slow = context.replica == 0

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        if self.slow:
            time.sleep(0.2)
        return super().step(batch)


class Slow(Faulty):
    """Take 20 ms for each row."""

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        time.sleep(0.02 * len(batch.rows))
        return super().step(batch)


class SlowKilled(Slow):
    """Die in a step that contains 13, after 20 ms for each row, so that calls share a step."""

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        made = super().step(batch)
        if (batch["x"] == 13).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return made
