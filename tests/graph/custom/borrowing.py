"""Define actors that reuse memory, change their inputs, or return what cannot be sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ranvier import Actor, Batch, Context, TensorSpec


class Fills(Actor):
    """Return the same buffer from each step, filled with x, or a view of the buffer."""

    inputs = {"x": TensorSpec("float32", ("n",))}
    outputs = {"y": TensorSpec("float32", ("m", "k"))}
    stateless = True

    def load(self, context: Context) -> None:
        self.buffer = torch.zeros(2, int(context.args["k"]))
        self.views = bool(context.args.get("views"))

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        self.buffer.fill_(float(batch["x"][0]))
        return {"y": self.buffer[1:] if self.views else self.buffer}


class FillsRows(Actor):
    """Return the same buffer from each step, each row filled with its x.

    A step fails if a row is 13. It waits for the file `gate`, so that calls share a step."""

    inputs = {"x": TensorSpec("float32", ("rows",))}
    outputs = {"y": TensorSpec("float32", ("rows", "k"))}
    stateless = True

    def load(self, context: Context) -> None:
        self.gate = Path(str(context.args["gate"]))
        self.buffer = torch.zeros(16, 50_000)

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        while not self.gate.exists():
            time.sleep(0.01)
        if 13.0 in batch["x"].tolist():
            raise ValueError(f"thirteen among {len(batch.rows)}")
        made = self.buffer[: len(batch.rows)]
        made[:] = batch["x"][:, None]
        return {"y": made}


class Wide(Actor):
    """Double rows of any width.

    A step waits for the file `gate`, so that calls share a step."""

    inputs = {"x": TensorSpec("float32", ("rows", "width"))}
    outputs = {"y": TensorSpec("float32", ("rows", "width"))}
    stateless = True

    def load(self, context: Context) -> None:
        self.gate = Path(str(context.args["gate"]))

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        while not self.gate.exists():
            time.sleep(0.01)
        return {"y": batch["x"] * 2}


class Slow(Actor):
    """Return the minimum and the maximum of the input, after 20 ms."""

    inputs = {"y": TensorSpec("float32", ("m", "k"))}
    outputs = {"z": TensorSpec("float32", ("two",))}
    stateless = True

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        return {"z": torch.stack([batch["y"].min(), batch["y"].max()])}


class InPlace(Actor):
    """Double the input in place, if `hidden` in a way that torch does not see.

    A step fails if a row is 13. It waits for the file `gate`, so that calls share a step. It writes the largest number
    of rows of a step so far to the file `rows`."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def load(self, context: Context) -> None:
        self.hidden = bool(context.args.get("hidden"))
        self.gate, self.rows = context.args.get("gate"), context.args.get("rows")
        self.most = 0

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        while self.gate is not None and not Path(str(self.gate)).exists():
            time.sleep(0.01)
        if self.rows is not None and len(batch.rows) > self.most:
            self.most = len(batch.rows)
            Path(str(self.rows)).write_text(str(self.most))
        x = batch["x"]
        if self.hidden:
            x.numpy()[:] *= 2
        else:
            x.mul_(2)
        if (x == 26).any():
            raise ValueError("thirteen")
        return {"y": x}


class Odd(Actor):
    """Return the kind of output that the first number of x selects."""

    inputs = {"x": TensorSpec("float32", ("n", 4))}
    outputs = {"y": TensorSpec("float32", ("m", "k"))}
    stateless = True

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        x = batch["x"]
        made: list[Callable[[], object]] = [
            lambda: x.t(),
            lambda: x[:1].expand(3, 4),
            lambda: torch.complex(x, x).conj().imag,
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: x.numpy(),
            lambda: x.to(torch.float8_e4m3fn),
            lambda: torch._efficientzerotensor((3, 4)),
            lambda: _shrunk(x.clone()),
        ]
        return {"y": made[int(x[0, 0])]()}


def _shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a storage that is too small for it."""
    tensor.untyped_storage().resize_(8)
    return tensor


class Unspeakable(Exception):
    """Raise an error when it is converted to text."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Raises(Actor):
    """Raise in a step the exception that x selects."""

    inputs = {"x": TensorSpec("float32", ("tokens",))}
    outputs = {"y": TensorSpec("float32", ("tokens",))}

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        errors: dict[int, Callable[[], BaseException]] = {
            1: lambda: ValueError("x" * 30_000_000),
            2: Unspeakable,
            3: lambda: SystemExit(3),
            4: KeyboardInterrupt,
            5: lambda: GeneratorExit(),
            6: lambda: ValueError("\udce9"),
        }
        which = int(batch["x"][0])
        if which in errors:
            raise errors[which]()
        return {"y": batch["x"] + 1}


class BadAtClose(Raises):
    """Raise an error when a session closes."""

    def close(self, session: int) -> None:
        raise RuntimeError("will not close")
