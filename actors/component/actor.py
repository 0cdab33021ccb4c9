"""Define the base class of every component: typed ports, private state, one `step` per batch.

A custom actor is a class like this one, in a file beside the graph::

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

from ranvier.transport.format.aligned import each_aligned, misaligned
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec

from .session import SessionInfo

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint


Look = Callable[["int | None", str, "tuple[Row, ...]", "torch.Tensor"], None]
"""Receives each tensor inside an actor during a watched step (watch.py): its layer or None, its name, its rows, the tensor."""
NOTHING, REWINDS, REPLAYED = "nothing", "rewinds", "replayed"
"""Kinds of state that an actor keeps for a session. They decide how the session is recovered.

NOTHING: no state between steps. REWINDS: state that can continue from an earlier position. REPLAYED: state that must be
rebuilt from the session's inputs."""


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Hold flat rows and their tensors. The rows say which tokens belong to which session; there is no padding.

    A tensor whose first dimension is `tokens` holds the tokens of all rows, one row after the other. An actor may read the
    tensors of its batch. If it writes into them, nobody else sees the change.
    """

    rows: tuple[Row, ...]
    tensors: Mapping[str, torch.Tensor]
    own_rows: Mapping[str, tuple[Row, ...]] = {}

    def rows_of(self, port: str) -> tuple[Row, ...]:
        """Return the rows of one port: those of the batch, unless a router sent this port only some tokens of each row."""
        return self.own_rows.get(port, self.rows)

    def __getitem__(self, port: str) -> torch.Tensor:
        return self.tensors[port]

    def aligned(self) -> Batch:
        """Return the batch for a step: tensors whose address would change the result are replaced by aligned copies."""
        if not any(map(misaligned, self.tensors.values())):
            return self
        return Batch(self.rows, each_aligned(self.tensors), self.own_rows)

    def copied(self) -> Batch:
        """Return the batch with copies of its tensors."""
        return Batch(self.rows, {port: tensor.clone() for port, tensor in self.tensors.items()}, self.own_rows)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(row.tokens for row in self.rows)


class RowsFailed(Exception):
    """Report from `step` that some rows failed and the others did not. Only the sessions of the failed rows end.

    `outputs` are those of the other rows, as `step` returns them. `failures` holds an error for each failed row.
    """

    def __init__(self, outputs: Mapping[str, torch.Tensor | Batch], failures: Mapping[Row, Exception]) -> None:
        super().__init__(f"{len(failures)} rows failed")
        self.outputs = outputs
        self.failures = failures


@dataclass(frozen=True, slots=True)
class Context:
    """Hold what an actor may use while it loads.

    `name` is the name of the host, `actor.replica`. The actor calls `progress` with the share done (0 to 1). `layers` are
    the first and the last layer, both included. With `fast`, products may depend on the number of tokens. `own_autograd`: the
    `forward` of a plain torch module takes gradients itself. `device` is where it computes: `cpu` or `cuda:0`, the only
    GPU that its process sees.
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
    fast: bool = False
    own_autograd: bool = False
    device: str = "cpu"


class Actor:
    """Represent one component. The host calls `load` once, then `open`, `step` and `close`, all from one thread.

    `step` may raise: then only the sessions of that batch end, with an error that carries the traceback.

    A tensor that `step` returns belongs to the message from then on. `step` may return the same buffer each time, a view of
    its input, or a tensor that it keeps. In each case, the message carries the values at the moment of the return. `step` may
    read and keep its inputs.
    """

    inputs: ClassVar[Mapping[str, TensorSpec]] = {}
    outputs: ClassVar[Mapping[str, TensorSpec]] = {}
    args: ClassVar[Mapping[str, str]] = {}
    """Keys of `args:` in the graph file and their descriptions, for `ranvier actors` and the check. Empty: any key is valid."""
    once: ClassVar[tuple[str, ...]] = ()
    """Inputs that arrive once per session and belong to all its steps, such as those that a decoder attends to.

    `step` receives each in a separate batch before the session's first step, and returns nothing for it. `join` covers only
    the other inputs."""

    stateless: ClassVar[bool] = False
    """True for an actor that keeps nothing for a session between steps, except the arguments of `open`.

    If such an actor is lost, the other actors keep their state, and only the interrupted step is repeated."""

    writes: ClassVar[bool] = True
    """True if `step` may write into its inputs. It then receives copies when a retry or a recording needs the originals."""

    places: ClassVar[bool] = False
    """True if the actor makes its tensors on `Context.device` itself. For any other, torch makes them there by default.

    In both cases, `step` receives its inputs on the device, and the host brings its outputs back, unless they may stay."""

    on_host: ClassVar[tuple[str, ...]] = ()
    """Inputs that `step` receives in this machine's memory, whatever its device."""

    makes_new: ClassVar[bool] = False
    """True if each output is a new tensor that nobody else holds. Outputs that stay on a device are otherwise copied."""

    stays: bool = False
    """True if outputs may stay on the device, for actors of the same process. The host sets it."""
    ahead: bool = False
    """True if outputs that stay there need not be finished when `step` returns. Their numbers are then not checked."""

    def load(self, context: Context) -> None:
        """Read weights and create state. If this raises an exception, the run does not start."""

    def open(self, session: SessionInfo) -> None:
        """Begin a session, or begin it again in a later epoch. Create its state here, not in `step`."""

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        """Return the outputs by port.

        An output is a tensor with the rows of the batch, or a `Batch` that has different rows and one tensor, named like the
        port. A port that is left out sends nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def close(self, session: int) -> None:
        """End a session and free what it held. The host calls this once for each `open`, also after an error."""

    def rewind(self, session: SessionInfo) -> None:
        """Continue a session in a new epoch: keep its first `session.kept` positions, and forget those after them.

        For an actor without this method the host calls `close` and `open`, and the whole session is replayed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rewind")

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        """Return the state that the actor keeps beyond its sessions. If it is lost, its replacement receives this by `restore`.

        The host calls this after steps, at most every `restart.snapshot_s` seconds, before the outputs of the step are sent.

        After `restore`, sessions that were open are replayed from their inputs, so the state may contain some of their steps
        already. The actor must recognise repeated steps: by session and position, or because `open` comes with a later `epoch`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no snapshot")

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from the `snapshot` of a lost actor. The host calls this after `load`, before any `open`."""
        raise NotImplementedError(f"{type(self).__name__} has no restore")

    def capacity_tokens(self) -> int | None:
        """Return the number of positions of all sessions together that fit here; None means no limit."""
        return None

    def held_bytes(self) -> int:
        """Return the bytes of the tensors that this actor keeps for its whole life (its weights)."""
        return 0


def keeps(actor: Actor) -> str:
    """Return which kind of state the actor keeps for a session: NOTHING, REWINDS or REPLAYED."""
    if actor.stateless:
        return NOTHING
    return REWINDS if type(actor).rewind is not Actor.rewind else REPLAYED
