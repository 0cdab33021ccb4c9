"""Lay out the frames of a message in packets, and find them again (see unix_sockets.py).

A message consists of the number of frames, their sizes, and the frames, each at a multiple of ALIGN. A message that is too
large for one packet begins with a packet of only these numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from ..format.errors import ProtocolError
from ..format.header import MAX_TENSORS
from ..format.message import Buffer

MAX_FRAMES = MAX_TENSORS + 3
"""Largest number of frames of a message: a header, tensors, and the two frames that announce loans (lending.py)."""
ALIGN = 16
_PAD = bytes(ALIGN)
_PADS = [_PAD[: -size % ALIGN] for size in range(ALIGN)]
_SIZES = [struct.Struct(f"<H{count}I") for count in range(MAX_FRAMES + 1)]
_COUNT = struct.Struct("<H")
_TWO = struct.Struct("<HII6x")
"""Prefix of a packet with a header and one tensor: count, both sizes, and padding up to the header."""
SEVERAL = struct.pack("<H", 0xFFFF)
"""Start of a packet that holds only the sizes of the frames. The frames come in the packets that follow."""
Packet = Sequence[Buffer]
"""The parts of one packet, sent in one system call."""


def pair(header: Buffer, tensor: Buffer) -> bytes:
    """Return a header and one tensor as a packet, as `packets_of` does, but faster."""
    size = len(header)
    return b"".join((_TWO.pack(2, size, len(tensor)), header, _PADS[size % ALIGN], tensor))


def announced(prefix: memoryview) -> tuple[int, bool]:
    """Return the bytes of a message of several packets, by its prefix, and whether this prefix is well formed."""
    count, sizes = _sizes(prefix)
    _, total = _starts(len(prefix), sizes)
    return total, count is not None and len(prefix) == _SIZES[count].size


def _starts(prefix_bytes: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each frame starts in a message, and where the message ends."""
    starts, end = [], prefix_bytes
    for size in sizes:
        starts.append(end + -end % ALIGN)
        end = starts[-1] + size
    return starts, end


def packets_of(frames: Sequence[Buffer], most_bytes: int) -> list[Packet]:
    """Lay out a message in packets of at most `most_bytes` bytes.

    A message consists of the number of frames, their sizes, and the frames, each at a multiple of ALIGN.

    Raises:
        ProtocolError: there are more frames than a message may have.
    """
    sizes = [len(frame) for frame in frames]
    if len(sizes) > MAX_FRAMES:
        raise ProtocolError(f"expected at most {MAX_TENSORS} tensor frames, got {len(sizes) - 1}")
    prefix = _SIZES[len(sizes)].pack(len(sizes), *sizes)
    parts: list[Buffer] = []
    at = len(prefix)
    for frame, size in zip(frames, sizes, strict=True):
        if gap := -at % ALIGN:
            parts.append(_PAD[:gap])
        parts.append(frame)
        at += gap + size
    if at <= most_bytes:
        return [[prefix, *parts]]
    return [[SEVERAL, prefix], *_cut(parts, most_bytes)]


def _cut(parts: Sequence[Buffer], most_bytes: int) -> Iterator[Packet]:
    packet: list[Buffer] = []
    room = most_bytes
    for part in parts:
        left = memoryview(part)
        while len(left):
            packet.append(left[:room])
            room -= len(packet[-1])
            left = left[len(packet[-1]) :]
            if not room:
                yield packet
                packet, room = [], most_bytes
    if packet:
        yield packet


def _sizes(packet: memoryview) -> tuple[int | None, Sequence[int]]:
    """Read the number of frames in a packet, and their sizes. The number is None if the packet does not state them."""
    count = _COUNT.unpack_from(packet)[0] if len(packet) >= _COUNT.size else 0
    if not 0 < count <= MAX_FRAMES or len(packet) < _SIZES[count].size:
        return None, ()
    return count, _SIZES[count].unpack_from(packet)[1:]


def frames_of(packet: memoryview) -> list[memoryview]:
    """Cut a message into its frames.

    Raises:
        ProtocolError: the packet does not state the sizes of its frames, or its length differs from them.
    """
    size = len(packet)
    if size >= _TWO.size and packet[0] == 2:  # nearly every message: takes half the time
        count, of_header, of_tensor = _TWO.unpack_from(packet)
        at = _TWO.size + of_header + len(_PADS[of_header % ALIGN])
        if count == 2 and at + of_tensor == size:
            return [packet[_TWO.size : _TWO.size + of_header], packet[at:]]
    count, sizes = _sizes(packet)
    if count is None:
        raise ProtocolError(f"got a packet of {size} bytes that does not state the sizes of its frames")
    starts, end = _starts(_SIZES[count].size, sizes)
    if end != size:
        raise ProtocolError(f"got a packet of {size} bytes, but its {count} frames need {end} bytes")
    return [packet[start : start + length] for start, length in zip(starts, sizes, strict=True)]
