"""The base of every component: typed ports, private state, one `step` for each batch.

A user's own actor is a class like this one, in a file beside the graph::

    class Double(Actor):
        inputs = {"x": TensorSpec("float32", ("tokens", 4))}
        outputs = {"y": TensorSpec("float32", ("tokens", 4))}

        def step(self, batch):
            return {"y": batch["x"] * 2}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ranvier.transport.header import Row
from ranvier.transport.spec import TensorSpec

from .session import SessionInfo

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Flat rows and their tensors: rows say which tokens belong to which session, there is no padding.

    A tensor whose first dimension is `tokens` holds the tokens of all rows one after the other. Tensors of a batch are
    views of received bytes and must not be written in place.
    """

    rows: tuple[Row, ...]
    tensors: Mapping[str, torch.Tensor]
    own_rows: Mapping[str, tuple[Row, ...]] = {}

    def rows_of(self, port: str) -> tuple[Row, ...]:
        """The rows of one port: the batch's, unless a router sent this port only some tokens of each."""
        return self.own_rows.get(port, self.rows)

    def __getitem__(self, port: str) -> torch.Tensor:
        return self.tensors[port]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class Context:
    """What an actor may use while it loads.

    `name` is the host's, `actor.replica`. `progress` is called with the share done (0 to 1); `layers` are the first and
    last layer, both included.
    """

    name: str
    args: Mapping[str, Any]
    progress: Callable[[float], None]
    checkpoint: Checkpoint | None = None
    dtype: str = "float32"
    layers: tuple[int, int] | None = None
    cache_tokens: int = 0
    weights: Path | None = None
    experts: tuple[int, int] | None = None
    replica: int = 0
    precision: str = "dtype"


class Actor:
    """One component. The host calls `load` once, then `open`, `step` and `close` from one thread.

    `step` may raise: only the sessions of that batch end, with an error that carries the traceback.
    """

    inputs: ClassVar[Mapping[str, TensorSpec]] = {}
    outputs: ClassVar[Mapping[str, TensorSpec]] = {}
    args: ClassVar[Mapping[str, str]] = {}
    """The keys of `args:` in the graph file and what each is, for `ranvier actors` and the check. Empty: any key is taken."""
    once: ClassVar[tuple[str, ...]] = ()
    """Inputs that come once a session and belong to all its steps, such as what a decoder attends to. `step` gets each in a
    batch of its own before the first step of that session, and returns nothing for it; `join` is about the others."""

    def load(self, context: Context) -> None:
        """Read weights, make state. Raises whatever went wrong; the run then does not start."""

    def open(self, session: SessionInfo) -> None:
        """A session begins (or begins anew in a later epoch). Make its state here, not in `step`."""

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        """Outputs by port: a tensor with the batch's rows, or a `Batch` with one tensor named as the port and rows of
        its own. A port that is left out sends nothing."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def close(self, session: int) -> None:
        """The session is over: free what it held. Called once for each `open`, also after an error."""

    def capacity_tokens(self) -> int | None:
        """How many positions of all sessions together fit here; None if there is no limit."""
        return None

    def held_bytes(self) -> int:
        """Bytes of the tensors this actor keeps for as long as it lives (its weights)."""
        return 0
