"""Check the trio side of a socket.

A cancelled receive loses nothing, and a receive never sleeps on an edge-triggered descriptor that has messages."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import trio

from ranvier.transport.wires.trio_wire import TrioWire
from ranvier.transport.wires.zeromq import ZeroWire


@pytest.fixture
def wires() -> Iterator[tuple[ZeroWire, ZeroWire]]:
    """Provide two wires, of which the first is connected to the second."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        a = ZeroWire("a", f"ipc://{folder}/a", max_frame_bytes=1 << 20)
        b = ZeroWire("b", f"ipc://{folder}/b", max_frame_bytes=1 << 20)
        a.connect("b", b.address)
        yield a, b
        a.close()
        b.close()


def test_every_message_of_a_burst_is_received(wires: tuple[ZeroWire, ZeroWire]) -> None:
    """Receive every message of a burst, and again after a pause.

    The descriptor signals a burst only once."""

    async def main() -> None:
        a, b = wires[0], TrioWire(wires[1])
        for burst in (1, 200, 3):
            for number in range(burst):
                a.send("b", b"%d" % number, ())
            with trio.fail_after(10):
                got = [bytes((await b.receive()).header) for _ in range(burst)]
            assert got == [b"%d" % number for number in range(burst)]

    trio.run(main)


def test_a_cancelled_receive_loses_nothing(wires: tuple[ZeroWire, ZeroWire]) -> None:
    """Lose no message when a receive is cancelled."""

    async def main() -> None:
        a, b = wires[0], TrioWire(wires[1])
        got = []
        for number in range(30):
            with trio.move_on_after(0):
                got.append(bytes((await b.receive()).header))
            a.send("b", b"%d" % number, ())
            with trio.move_on_after(0.0005):
                got.append(bytes((await b.receive()).header))
        with trio.fail_after(10):
            while len(got) < 30:
                got.append(bytes((await b.receive()).header))
        assert got == [b"%d" % number for number in range(30)]

    trio.run(main)


def test_two_readers_are_told_apart(wires: tuple[ZeroWire, ZeroWire]) -> None:
    """Raise BusyResourceError for a second reader."""

    async def main() -> None:
        wire = TrioWire(wires[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await wire.receive()
            nursery.cancel_scope.cancel()

    import trio.testing

    trio.run(main)


def test_closing_ends_a_waiting_receive(wires: tuple[ZeroWire, ZeroWire]) -> None:
    """End a waiting receive when the wire is closed."""

    async def main() -> None:
        wire = TrioWire(wires[1])

        async def closer() -> None:
            await trio.sleep(0.01)
            wire.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(closer)
            with pytest.raises(trio.ClosedResourceError):
                await wire.receive()

    trio.run(main)
