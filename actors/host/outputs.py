"""Send the outputs of a host: choose edges and replicas, and decide which rows go round a loop again. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ranvier.transport.format.codec import RAW, Coding
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer, stable
from ranvier.transport.format.tensors import LOOK_EVERY, encode, to_buffer, to_device_buffer
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link_state import Outbound, SendingLink

from ..component.actor import Batch
from ..component.devices import here
from ..protocol.host_spec import GATEWAY, HostLink, PortSpec
from .route import Replicas, Route

if TYPE_CHECKING:
    from .taps import Tap


class Loop(NamedTuple):
    """Bound a loop edge of a custom actor: `until` is the port that reports done rows, `at_most` the number of rounds."""

    until: str | None
    at_most: int


class Outputs:
    """Hold the output ports of one actor, and the links from them.

    Args:
        ports: the output ports.
        exchange: the state of the links.
    """

    def __init__(self, ports: Iterable[PortSpec], exchange: Exchange) -> None:
        self.taps: dict[int, Tap] = {}
        """The taps, by edge. Each is called with every outgoing tensor of its edge (taps.py)."""
        self.large = False
        """True once a tensor was sent as a view of its memory. Only then does it matter who else holds that memory."""
        self._exchange = exchange
        self._specs = {port.name: port.tensor for port in ports}
        self._routes: dict[str, list[Route]] = {port: [] for port in self._specs}
        self._loops: dict[str, tuple[Route, Loop]] = {}
        self._replicas: dict[int, Replicas] = {}
        self._asked: dict[int, tuple[str, set[int]]] = {}
        """The edges that only some sessions read: the name under which they do, and these sessions."""

    # -- links and sessions -------------------------------------------------------------------------------------

    def add(self, link: HostLink) -> None:
        """Add an outgoing link, which the exchange already has."""
        spec, routes = link.link, self._routes[link.port]
        known = itertools.chain(routes, (route for route, _ in self._loops.values()))
        route = next((route for route in known if route.edge == spec.edge), None)
        if route is None:
            route = Route(spec.edge, spec.target.actor, link.policy, link.skips)
            if link.at_most:
                self._loops[link.port] = route, Loop(link.until, link.at_most)
            else:
                routes.append(route)
        route.add(self._exchange.sender(spec))
        if link.asked:
            self._asked.setdefault(spec.edge, (link.asked, set()))

    def remove(self, peer: str) -> None:
        """Remove the links to a replica that has left."""
        for route in self._every():
            route.remove(peer)

    def open(self, session: int, replicas: Replicas) -> None:
        """Remember the replicas of a session."""
        self._replicas[session] = replicas

    def read_by(self, session: int, names: Collection[str]) -> None:
        """Remember which edges to the client a session reads, by their names there."""
        for name, sessions in self._asked.values():
            if name in names:
                sessions.add(session)

    def close(self, session: int) -> None:
        for _, sessions in self._asked.values():
            sessions.discard(session)
        if self._replicas.pop(session, None) is not None:
            for route in self._every():
                route.close(session)

    def give_up(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the messages that wait for credit and have no `wanted` row."""
        for route in self._every():
            route.give_up(wanted)
        self._exchange.give_up(wanted)

    def _every(self) -> Iterator[Route]:
        yield from itertools.chain.from_iterable(self._routes.values())
        for route, _ in self._loops.values():
            yield route

    def _replicas_of(self, session: int) -> Replicas:
        return self._replicas.get(session, {})

    # -- second copies ------------------------------------------------------------------------------------------

    @property
    def due_ns(self) -> int | None:
        """Return when the next second copy of a hedged message is due, or None if no copy is pending."""
        if not self._replicas:
            return None
        return min((due for route in self._every() if (due := route.due_ns) is not None), default=None)

    def send_copies(self, now_ns: int, is_open: Callable[[Row], bool]) -> None:
        """Send the second copies that are due."""
        for route in self._every():
            route.send_copies(self._exchange, now_ns, self._replicas_of, is_open)

    # -- sending ------------------------------------------------------------------------------------------------

    def send(
        self,
        rows: tuple[Row, ...],
        outputs: Mapping[str, torch.Tensor | Batch],
        ready_ns: int,
        soles: frozenset[str] = frozenset(),
    ) -> None:
        """Send the outputs of a step down their edges.

        Args:
            rows: the rows of the step.
            outputs: by port.
            ready_ns: when the step ended.
            soles: the ports whose memory nobody else holds.

        Raises:
            ProtocolError: an output does not match the spec of its edge.
            ValueError: the actor returned a port that it does not have, or a wrong number of `until` elements.
            TypeError: the actor returned something other than a tensor.
        """
        going: set[Row] | None = None
        # loop ports first: they decide which rows go round
        several = self._loops and len(outputs) > 1
        for port, value in sorted(outputs.items(), key=self._after_loops) if several else outputs.items():
            routes = self._routes.get(port)
            if routes is None:
                raise ValueError(f"step returned the port {port!r}; the actor's outputs are {', '.join(self._routes)}")
            loop = self._loops.get(port)
            if not routes and loop is None:
                continue
            own, tensor = (value.rows, value.tensors[port]) if isinstance(value, Batch) else (rows, value)
            sole = port in soles
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"step returned {type(tensor).__name__} for the port {port!r}, expected a torch.Tensor")
            if loop is not None:
                entered = own
                own, tensor = self._go_round(port, own, tensor, *loop, outputs, ready_ns, sole)
                sole = False  # a part of it may be going round the loop
                going = (going or set()).union(entered).difference(own)
            elif going and not going.isdisjoint(own):
                # from every port, the client gets only the rows that leave the loop
                self._send(port, [route for route in routes if route.actor != GATEWAY], own, tensor, ready_ns, sole)
                routes = [route for route in routes if route.actor == GATEWAY]
                parts, stays = self._split(port, own, tensor), [row not in going for row in own]
                own = tuple(itertools.compress(own, stays))
                tensor, sole = torch.cat(list(itertools.compress(parts, stays))) if own else tensor[:0], True
            if own:
                self._send(port, routes, own, tensor, ready_ns, sole)

    def _after_loops(self, output: tuple[str, torch.Tensor | Batch]) -> bool:
        return output[0] not in self._loops

    def _send(
        self, port: str, routes: Iterable[Route], rows: tuple[Row, ...], tensor: torch.Tensor, ready_ns: int, sole: bool
    ) -> None:
        plain = None
        for route in routes:
            if self._asked and route.edge in self._asked:
                self._send_asked(port, route, rows, tensor, ready_ns)
                continue
            tap = self.taps.get(route.edge) if self.taps else None
            link = route.only
            if not tensor.is_cpu and not tensor.is_meta:
                if tap is None and link is not None and link.raw and not link.checksums:
                    meta, held = to_device_buffer(port, tensor)
                    self._exchange.send(link, Outbound(rows, (meta,), (held,), ready_ns))
                    continue
                tensor, sole = here(tensor), True
            given = tensor if tap is None else tap(tensor, rows)
            if link is None:
                self._send_by_choice(port, route, rows, given, ready_ns)
            elif link.raw and given is tensor:
                meta, buffer = plain = plain or to_buffer(port, tensor, sole=sole)
                if buffer.__class__ is not bytes:
                    self.large = True
                self._exchange.send(link, Outbound(rows, (meta,), (buffer,), ready_ns))
            else:
                tensors, buffers, coding = coded(port, given, link)
                if given is not tensor:  # the tap of another edge may reuse that memory
                    buffers = (stable(buffers[0]),)
                self._exchange.send(link, Outbound(rows, tensors, buffers, ready_ns, coding))

    def _send_asked(self, port: str, route: Route, rows: tuple[Row, ...], tensor: torch.Tensor, ready_ns: int) -> None:
        """Send the rows of the sessions that read this edge."""
        _, sessions = self._asked[route.edge]
        wanted = [row.session in sessions for row in rows]
        if any(wanted):
            parts = list(itertools.compress(self._split(port, rows, here(tensor)), wanted))
            own, part = tuple(itertools.compress(rows, wanted)), torch.cat(parts) if len(parts) > 1 else parts[0]
            self._send_by_choice(port, route, own, part, ready_ns)

    def _send_by_choice(
        self, port: str, route: Route, rows: tuple[Row, ...], tensor: torch.Tensor, ready_ns: int
    ) -> None:
        groups = route.groups(rows, self._replicas_of)
        parts = self._split(port, rows, tensor) if len(groups) > 1 else []
        for replicas, chosen in groups:
            if not replicas:
                self._exchange.count("rows_unsent", len(chosen))
                continue
            part = torch.cat([parts[index] for index in chosen]) if parts else tensor
            own = tuple(rows[index] for index in chosen)
            tensors, buffers, coding = coded(port, part, route.links[replicas[0]])
            route.send(self._exchange, replicas, Outbound(own, tensors, buffers, ready_ns, coding))

    def _go_round(
        self,
        port: str,
        rows: tuple[Row, ...],
        tensor: torch.Tensor,
        route: Route,
        loop: Loop,
        outputs: Mapping[str, torch.Tensor | Batch],
        ready_ns: int,
        sole: bool,
    ) -> tuple[tuple[Row, ...], torch.Tensor]:
        """Send the rows that go round once more, one position further. Return the rows that are done, and their tensor.

        A row is done when the port `until` reports it, or when it has gone round `at_most` times.
        """
        if loop.until is None and len(rows) == 1 and rows[0].position + 1 < loop.at_most:
            self._send(port, [route], (rows[0].further(),), tensor, ready_ns, sole)
            return (), tensor
        done = outputs.get(loop.until) if loop.until is not None else None
        said = [False] * len(rows)
        if isinstance(done, torch.Tensor):
            if done.numel() != len(rows):
                raise ValueError(
                    f"step returned {list(done.shape)} for the port {loop.until!r}, expected one element per row: [{len(rows)}]"
                )
            said = [bool(flag) for flag in done.reshape(-1).tolist()]
        goes = [not flag and row.position + 1 < loop.at_most for flag, row in zip(said, rows, strict=True)]
        if not any(goes):
            return rows, tensor
        parts = self._split(port, rows, tensor)
        on = tuple(row.further() for row in itertools.compress(rows, goes))
        self._send(port, [route], on, torch.cat(list(itertools.compress(parts, goes))), ready_ns, True)
        stays = [not going for going in goes]
        left = list(itertools.compress(parts, stays))
        return tuple(itertools.compress(rows, stays)), torch.cat(left or [tensor[:0]])

    def _split(self, port: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> list[torch.Tensor]:
        if len(rows) == 1:
            return [tensor]
        by_tokens = self._specs[port].shape[:1] == ("tokens",)
        return list(torch.split(tensor, [row.tokens if by_tokens else 1 for row in rows]))


def coded(port: str, tensor: torch.Tensor, link: SendingLink) -> tuple[tuple[TensorMeta], tuple[Buffer], Coding | None]:
    """Encode a tensor for a link, with the link's codec or the one that its chooser picks."""
    codec = link.codec if link.chooser is None else link.chooser.choose(tensor.nbytes)
    if codec.number == RAW:
        meta, buffer = to_buffer(port, tensor)
        return (meta,), (buffer,), None
    meta, buffer, coding = encode(port, tensor, codec, link.sent % LOOK_EVERY == 0)
    link.sent += 1
    if link.chooser is not None:
        link.chooser.learned(codec, coding, meta.nbytes)
    return (meta,), (buffer,), coding
