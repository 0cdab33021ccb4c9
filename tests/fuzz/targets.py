"""Define the targets, which take bytes from outside.

A target takes any bytes, and may raise only the error that is meant for them. `run.py` finds bytes that break a target,
by coverage. `test_corpus.py` gives each target all inputs that were found before, and thousands of changes to them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ranvier.actors.checkpoint import gguf_file, safetensors_file
from ranvier.actors.errors import CheckpointError
from ranvier.actors.protocol.control_protocol import decode as decode_control
from ranvier.actors.protocol.control_protocol import for_host, for_supervisor
from ranvier.graph.file import load, schema
from ranvier.graph.file.errors import GraphError
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Control, decode
from ranvier.transport.format.message import check_frames
from ranvier.transport.format.tensors import from_buffer
from ranvier.transport.wires.lending import Sharing
from ranvier.transport.wires.packets import frames_of

CORPUS = Path(__file__).parent / "corpus"


def header(data: bytes) -> None:
    """Decode the header of a message."""
    with suppress(ProtocolError):
        decode(data)


def packet(data: bytes) -> None:
    """Cut a packet of a Unix socket into its frames, decode their header, and take tensors from them, as a host does."""
    with suppress(ProtocolError):
        frames = frames_of(memoryview(bytearray(data)))
        made = decode(frames[0])
        if isinstance(made, Control):
            return
        check_frames(made, frames[1:])
        for meta, frame in zip(made.tensors, frames[1:], strict=True):
            if meta.nbytes <= 1 << 16:
                from_buffer(meta, frame)


def own_frame(data: bytes) -> None:
    """Read what a peer says about shared memory."""
    from ranvier.transport.links.wire import Arrival

    sharing = Sharing("me.0.1", 1 << 18)
    sharing.join("peer.0.1")
    try:
        with suppress(ProtocolError):
            sharing.take(Arrival("peer.0.1", b"", (data,)))
    finally:
        sharing.close()


def control(data: bytes) -> None:
    """Decode a message between supervisor and host."""
    with suppress(ProtocolError):
        decode_control(data, for_supervisor)
    with suppress(ProtocolError):
        decode_control(data, for_host)


def graph(data: bytes) -> None:
    """Read and validate a graph file."""
    with _file(data) as path, suppress(GraphError):
        schema.validate(load.read(path))


def safetensors(data: bytes) -> None:
    """Read the header of a safetensors file."""
    with _file(data) as path, suppress(CheckpointError):
        safetensors_file.read_header(path)


def gguf(data: bytes) -> None:
    """Read the header of a GGUF file."""
    with _file(data) as path, suppress(CheckpointError):
        gguf_file.read_header(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, packet, own_frame, control, graph, safetensors, gguf)
}


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    """Provide a temporary file with these bytes."""
    descriptor, name = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        os.unlink(name)
