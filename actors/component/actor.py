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

from ranvier.transport.format.aligned import each_aligned, misplaced
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec

from .session import SessionInfo

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint


Look = Callable[["int | None", str, "tuple[Row, ...]", "torch.Tensor"], None]
"""Told of a tensor inside an actor while a step is watched (watch.py): the layer, if it is of one, its name, its rows."""
NOTHING, REWINDS, REPLAYED = "nothing", "rewinds", "replayed"
"""What an actor keeps of a session, for those who recover it: nothing between steps; what can go on from an earlier position;
what must be built anew from the session's inputs."""


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Flat rows and their tensors: rows say which tokens belong to which session, there is no padding.

    A tensor whose first dimension is `tokens` holds the tokens of all rows one after the other. Tensors of a batch are an
    actor's to read. If it writes into them, nobody else sees that.
    """

    rows: tuple[Row, ...]
    tensors: Mapping[str, torch.Tensor]
    own_rows: Mapping[str, tuple[Row, ...]] = {}

    def rows_of(self, port: str) -> tuple[Row, ...]:
        """The rows of one port: the batch's, unless a router sent this port only some tokens of each."""
        return self.own_rows.get(port, self.rows)

    def __getitem__(self, port: str) -> torch.Tensor:
        return self.tensors[port]

    def aligned(self) -> Batch:
        """The batch as a step is given it: with copies of tensors where it matters where they begin."""
        if not any(map(misplaced, self.tensors.values())):
            return self
        return Batch(self.rows, each_aligned(self.tensors), self.own_rows)

    def copied(self) -> Batch:
        """Return the batch with copies of its tensors."""
        return Batch(self.rows, {port: tensor.clone() for port, tensor in self.tensors.items()}, self.own_rows)

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

    Tensors: what `step` returns is the message's from then on. It may return the same buffer each time, a view of its input,
    or what it keeps: what goes out are the values of the moment in which it returned. What it is given it may read and keep.
    """

    inputs: ClassVar[Mapping[str, TensorSpec]] = {}
    outputs: ClassVar[Mapping[str, TensorSpec]] = {}
    args: ClassVar[Mapping[str, str]] = {}
    """The keys of `args:` in the graph file and what each is, for `ranvier actors` and the check. Empty: any key is taken."""
    once: ClassVar[tuple[str, ...]] = ()
    """Inputs that come once a session and belong to all its steps, such as what a decoder attends to. `step` gets each in a
    batch of its own before the first step of that session, and returns nothing for it; `join` is about the others."""

    stateless: ClassVar[bool] = False
    """Whether it keeps nothing of a session between steps but what `open` was told. If it is lost, the other actors then need
    not forget what they have: only the step that was under way is taken again."""

    writes: ClassVar[bool] = True
    """Whether `step` may write into its inputs. Then it gets copies where a retry or a recording needs what was sent."""

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

    def rewind(self, session: SessionInfo) -> None:
        """A session goes on in a new epoch: its first `session.kept` positions were taken and stand, what came after them
        is to be forgotten. An actor that does not offer this is told `close` and `open`, and all is replayed."""
        raise NotImplementedError(f"{type(self).__name__} has no rewind")

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        """What it keeps beyond its sessions, for the one that takes its place if it is lost: it gets this by `restore`. Called
        after steps, at most every `restart.snapshot_s` seconds, before their outputs go out. Sessions that were open are
        replayed from their inputs after that: what they have left in the state already is to be told by session and
        position, or by `open`, whose `epoch` is then a later one."""
        raise NotImplementedError(f"{type(self).__name__} has no snapshot")

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with what `snapshot` of a lost one gave. Called after `load`, before any `open`."""
        raise NotImplementedError(f"{type(self).__name__} has no restore")

    def capacity_tokens(self) -> int | None:
        """How many positions of all sessions together fit here; None if there is no limit."""
        return None

    def held_bytes(self) -> int:
        """Bytes of the tensors this actor keeps for as long as it lives (its weights)."""
        return 0


def keeps(actor: Actor) -> str:
    """NOTHING, REWINDS or REPLAYED."""
    if actor.stateless:
        return NOTHING
    return REWINDS if type(actor).rewind is not Actor.rewind else REPLAYED
