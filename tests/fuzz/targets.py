"""What is given bytes from outside: each target takes any bytes and may raise nothing but the error that is meant for them.

`run.py` looks for bytes that break them, by coverage; `test_corpus.py` gives them all that was found before, and thousands of
changes to it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ranvier.actors.checkpoint import gguf_file, safetensors_file
from ranvier.actors.errors import CheckpointError
from ranvier.actors.protocol.control_protocol import decode as decode_control
from ranvier.graph.file import load, schema
from ranvier.graph.file.errors import GraphError
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Control, decode
from ranvier.transport.format.message import check_frames
from ranvier.transport.format.tensors import from_buffer
from ranvier.transport.wires.lending import Sharing
from ranvier.transport.wires.unix_sockets import _frames

CORPUS = Path(__file__).parent / "corpus"


def header(data: bytes) -> None:
    """A message's header."""
    with suppress(ProtocolError):
        decode(data)


def packet(data: bytes) -> None:
    """Cut a packet of a Unix socket into its frames, decode their header, and take tensors from them, as a host does."""
    with suppress(ProtocolError):
        frames = _frames(memoryview(bytearray(data)))
        made = decode(frames[0])
        if isinstance(made, Control):
            return
        check_frames(made, frames[1:])
        for meta, frame in zip(made.tensors, frames[1:], strict=True):
            if meta.nbytes <= 1 << 16:
                from_buffer(meta, frame)


def own_frame(data: bytes) -> None:
    """What wires say to each other about shared memory."""
    from ranvier.transport.links.wire import Arrival

    sharing = Sharing("me.0.1", 1 << 18)
    sharing.join("peer.0.1")
    try:
        with suppress(ProtocolError):
            sharing.take(Arrival("peer.0.1", b"", (data,)))
    finally:
        sharing.close()


def control(data: bytes) -> None:
    """A message between supervisor and host."""
    with suppress(ProtocolError):
        decode_control(data)


def graph(data: bytes) -> None:
    """A graph file."""
    with _file(data) as path, suppress(GraphError):
        schema.validate(load.read(path))


def safetensors(data: bytes) -> None:
    """The header of a safetensors file."""
    with _file(data) as path, suppress(CheckpointError):
        safetensors_file.read_header(path)


def gguf(data: bytes) -> None:
    """The header of a GGUF file."""
    with _file(data) as path, suppress(CheckpointError):
        gguf_file.read_header(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, packet, own_frame, control, graph, safetensors, gguf)
}


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        os.unlink(name)
