"""Define what a link is: one edge between two replicas over a wire, with handshake, credit, sequence numbers, acknowledgements.

The state of all links of one process is an `exchange.Exchange`, which does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..format.header import DATA
from ..format.host_id import HostId
from ..format.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """Describe one edge between two replicas, as both ends must know it before they communicate.

    `source` and `target` are the hosts at its ends. `tensors` holds the names and specs of the tensors in a message.
    `wire` is the kind of wire: ipc, local or tcp. On a `prompt` link each message is acknowledged as soon as it is used up,
    because the sender chooses replicas by the time that this takes. `kind` is the kind of the messages: data, or the
    gradients that come back along the edge.
    """

    edge: int
    name: str
    source: HostId
    target: HostId
    tensors: tuple[tuple[str, TensorSpec], ...]
    credits_messages: int
    credits_bytes: int
    wire: str = "ipc"
    codec: str = "raw"
    prompt: bool = False
    kind: int = DATA

    def described(self) -> tuple[tuple[str, str], ...]:
        """Return the specs in the form that the handshake compares."""
        return tuple((name, str(spec)) for name, spec in self.tensors)
