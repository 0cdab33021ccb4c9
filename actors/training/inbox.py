"""Keep the tensors that a stage has received, by link and number, until an action takes them; does no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ranvier.transport.format.aligned import aligned
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.tensors import from_buffer
from ranvier.transport.links.exchange import Exchange, RefusedMessage
from ranvier.transport.links.link_state import Received, ReceivingLink

from ..component.devices import CPU
from ..protocol.training_spec import TrainingLink


class Key(NamedTuple):
    """Identify what a message is for: its session (TRAINING or VALIDATION), and its number within that session."""

    session: int
    number: int


class TrainingCore:
    """Hold the links of one stage and the tensors that have arrived on them. They are taken on the stage's `device`."""

    def __init__(self, exchange: Exchange) -> None:
        self.device = CPU
        self.exchange = exchange
        self.counters: Counter[str] = Counter()
        self._links: dict[ReceivingLink, TrainingLink] = {}
        self._came: dict[tuple[TrainingLink, Key], tuple[torch.Tensor, Received]] = {}

    def add(self, links: Iterable[TrainingLink]) -> None:
        """Register the incoming links among `links`, which the exchange already has."""
        for here in links:
            if not here.outgoing:
                self._links[self.exchange.receiver(here.link)] = here

    def on_message(self, received: Received) -> None:
        """Keep a message until it is taken.

        Raises:
            RefusedMessage: its bytes do not match its codec, or it does not have exactly one row.
        """
        rows = received.header.rows
        try:
            tensor = from_buffer(received.header.tensors[0], received.buffers[0])
            if len(rows) != 1:
                raise ProtocolError(f"expected one row per micro-batch, got {len(rows)}")
        except ProtocolError as error:
            self.exchange.consumed(received.link, received.nbytes)
            raise RefusedMessage(f"edge {received.link.spec.name}: {error}", rows) from None
        self._came[self._links[received.link], Key(rows[0].session, rows[0].position)] = tensor, received

    def missing(self, links: Iterable[TrainingLink], key: Key) -> list[TrainingLink]:
        """Return the links on which nothing has arrived for `key` yet."""
        return [link for link in links if (link, key) not in self._came]

    def take(self, links: Sequence[TrainingLink], key: Key) -> tuple[list[torch.Tensor], list[Received]]:
        """Return what has arrived on all these links for `key`; the credit for it goes back to the senders."""
        tensors, messages = [], []
        for link in links:
            tensor, received = self._came.pop((link, key))
            self.exchange.consumed(received.link, received.nbytes)
            tensors.append(aligned(tensor) if self.device == CPU else tensor.to(self.device))
            messages.append(received)
        return tensors, messages
