"""The header: everything about a message but its tensors' bytes, as one small msgpack array.

Layout, positional, made once (wire version 1):

    data, grad, state   [version, kind, edge, sequence, rows, tensors, ready_ns, sent_ns, checksum, acks]
    control             [version, kind, edge, verb, argument, …]

where a row is `[session, epoch, position, tokens]`, a tensor `[name, dtype, shape, codec, bytes]` and an ack, of an edge
that comes the other way, `[edge, highest received, highest that may be sent, bytes that may be sent in all]`. Bytes from a
socket reach nothing before `decode` has looked at every field: whatever they are, it returns a valid header or
raises `ProtocolError`, and allocates no more than a small multiple of the 64 KiB a header may have.
"""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import msgpack

from .codec import CODECS
from .dtypes import TABLE
from .errors import ProtocolError
from .spec import MAX_RANK

VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_ROWS = 4096
MAX_TENSORS = 64
MAX_NAME_LENGTH = 256
MAX_TENSOR_BYTES = 1 << 40
_MAX_INT = (1 << 63) - 1


class Kind(enum.IntEnum):
    """What a message is. Data goes down an edge, gradients come back along it; control keeps the link itself."""

    DATA = 0
    GRAD = 1
    STATE = 2
    CONTROL = 3


# plain numbers for the way of every message: an enumeration's members take 0.3 µs each time they are named
DATA, CONTROL = int(Kind.DATA), int(Kind.CONTROL)


class Verb(enum.IntEnum):
    """What a control message of a link says."""

    HELLO = 0
    """sender → receiver: offers the link; [graph hash, edge name, specs, source, target]."""
    WELCOME = 1
    """receiver → sender: opens it; [highest sequence that may be sent, bytes that may be sent in all]."""
    REFUSE = 2
    """receiver → sender: will not; [reason]."""
    ACK = 3
    """receiver → sender: [highest sequence received, highest that may be sent, bytes that may be sent in all]."""
    AGAIN = 4
    """receiver → sender: a gap; [first sequence that is missing]."""
    PROBE = 5
    """sender → receiver: nothing came back for a while; [highest sequence sent]."""


class Row(NamedTuple):
    """One session's share of a flat batch: `tokens` tokens of `session` at `position` … `position + tokens - 1`."""

    session: int
    epoch: int
    position: int
    tokens: int


class TensorMeta(NamedTuple):
    """One tensor of a message. `dtype` and `codec` are numbers of the fixed tables; `nbytes` is the frame's length."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    codec: int
    nbytes: int


class Ack(NamedTuple):
    """An acknowledgement and a grant of credit, for an edge from the peer that the message goes to."""

    edge: int
    received: int
    sequence_limit: int
    byte_limit: int


class Header(NamedTuple):
    """The header of a message that carries tensors.

    `ready_ns` and `sent_ns` are CLOCK_MONOTONIC nanoseconds of the sender: when the actor had the tensor, and when it
    was handed to the wire. `checksum` is a CRC-32 over the tensors' bytes, or 0 on a link inside one machine.
    """

    version: int
    kind: int
    edge: int
    sequence: int
    rows: tuple[Row, ...]
    tensors: tuple[TensorMeta, ...]
    ready_ns: int
    sent_ns: int
    checksum: int
    acks: tuple[Ack, ...] = ()

    def encode(self) -> bytes:
        """Raises ValueError if the header would be over 64 KiB: the caller put too many rows into one message."""
        data: bytes = msgpack.packb(self)
        if len(data) > MAX_HEADER_BYTES:
            raise ValueError(f"header of {len(data)} bytes is over {MAX_HEADER_BYTES}: {len(self.rows)} rows")
        return data


class Control(NamedTuple):
    """A control message of one link; what `arguments` holds is said at each `Verb`."""

    version: int
    kind: int
    edge: int
    verb: Verb
    arguments: tuple[Any, ...]

    def encode(self) -> bytes:
        data: bytes = msgpack.packb((self.version, self.kind, self.edge, self.verb, *self.arguments))
        return data


def control(edge: int, verb: Verb, *arguments: Any) -> Control:
    return Control(VERSION, CONTROL, edge, verb, arguments)


def decode(data: bytes | memoryview) -> Header | Control:
    """The header in `data`.

    Raises:
        ProtocolError: anything in it is not as the layout says. Nothing else is ever raised.
    """
    size = len(data)
    if size > MAX_HEADER_BYTES:
        raise ProtocolError(f"header: expected at most {MAX_HEADER_BYTES} bytes, got {size}")
    try:
        # One unpackb a message, every limit set: no state survives an error (msgpack before 1.2.1 crashed on reuse).
        fields = msgpack.unpackb(
            data,
            use_list=False,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ROWS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"header: expected a msgpack array, got {size} bytes that are not ({error})") from None
    if type(fields) is not tuple or len(fields) < 4:
        raise ProtocolError(f"header: expected an array of at least 4 fields, got {type(fields).__name__}")
    if fields[0] != VERSION or type(fields[0]) is not int:
        raise ProtocolError(f"header: expected wire version {VERSION}, got {_show(fields[0])}")
    kind = fields[1]
    if type(kind) is not int or not 0 <= kind <= 3:
        raise ProtocolError(f"header: expected a kind from 0 to 3, got {_show(kind)}")
    edge = _integer("edge", fields[2])
    if kind == CONTROL:
        return _control(edge, fields)
    if len(fields) != 10:
        raise ProtocolError(f"header: expected 10 fields, got {len(fields)}")
    if tuple(map(type, fields)) != _FIELD_TYPES or fields[3] < 0 or fields[6] < 0 or fields[7] < 0 or fields[8] < 0:
        raise ProtocolError(f"header: expected {_FIELD_NAMES}, got {_show(fields)}")
    _, _, _, sequence, rows, tensors, ready_ns, sent_ns, checksum, acks = fields
    try:
        checked = _tensors(tensors)
    except TypeError:  # something in it cannot be hashed, so it is no array of arrays
        raise ProtocolError(f"header: expected tensors as an array of arrays, got {_show(tensors)}") from None
    return Header(
        VERSION,
        kind,
        edge,
        sequence,
        tuple([Row._make(_four("a row", row)) for row in rows]),
        checked,
        ready_ns,
        sent_ns,
        checksum,
        tuple([Ack._make(_four("an ack", ack)) for ack in acks]) if acks else (),
    )


_FIELD_TYPES = (int, int, int, int, tuple, tuple, int, int, int, tuple)
_FIELD_NAMES = "version, kind, edge, sequence, rows, tensors, ready_ns, sent_ns, checksum, acks"
_FOUR = (int, int, int, int)


def _four(what: str, value: Any) -> tuple[int, int, int, int]:
    # one comparison of types and one minimum: a loop over the fields took three times as long
    if type(value) is not tuple or tuple(map(type, value)) != _FOUR or min(value) < 0:
        raise ProtocolError(f"header: expected {what} of 4 integers from 0, got {_show(value)}")
    return value


# An edge carries the same few shapes over and over: looked up, the check takes 0.4 µs instead of 3. What comes back is
# the valid description that compares equal, so a number of another type (7.0 for 7) changes nothing.
@functools.lru_cache(maxsize=1024)
def _tensors(tensors: Any) -> tuple[TensorMeta, ...]:
    if type(tensors) is not tuple or len(tensors) > MAX_TENSORS:
        raise ProtocolError(f"header: expected at most {MAX_TENSORS} tensors, got {_show(tensors)}")
    return tuple(_tensor(tensor) for tensor in tensors)


def _tensor(fields: Any) -> TensorMeta:
    if type(fields) is not tuple or len(fields) != 5:
        raise ProtocolError(f"header: expected a tensor of 5 fields, got {_show(fields)}")
    name, dtype, shape, codec, nbytes = fields
    if type(name) is not str or len(name) > MAX_NAME_LENGTH:
        raise ProtocolError(f"header: expected a tensor name of at most {MAX_NAME_LENGTH} letters, got {_show(name)}")
    if type(dtype) is not int or not 0 <= dtype < len(TABLE):
        raise ProtocolError(f"tensor {name}: expected a dtype from 0 to {len(TABLE) - 1}, got {_show(dtype)}")
    if type(codec) is not int or not 0 <= codec < len(CODECS):
        raise ProtocolError(f"tensor {name}: expected a codec from 0 to {len(CODECS) - 1}, got {_show(codec)}")
    if type(shape) is not tuple or len(shape) > MAX_RANK:
        raise ProtocolError(f"tensor {name}: expected a shape of rank at most {MAX_RANK}, got {_show(shape)}")
    expected = TABLE[dtype].itemsize
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_TENSOR_BYTES:
            raise ProtocolError(f"tensor {name}: expected sizes from 0 to {MAX_TENSOR_BYTES}, got {_show(shape)}")
        expected *= size
    if expected > MAX_TENSOR_BYTES:
        raise ProtocolError(f"tensor {name}: expected at most {MAX_TENSOR_BYTES} bytes, got shape {_show(shape)}")
    if type(nbytes) is not int or nbytes != expected:
        raise ProtocolError(
            f"tensor {name}: expected {expected} bytes for {TABLE[dtype].name}{list(shape)}, got {_show(nbytes)}"
        )
    return TensorMeta(name, dtype, shape, codec, nbytes)


_ARGUMENTS: dict[Verb, tuple[type, ...]] = {
    Verb.HELLO: (str, str, tuple, str, str),
    Verb.WELCOME: (int, int),
    Verb.REFUSE: (str,),
    Verb.ACK: (int, int, int),
    Verb.AGAIN: (int,),
    Verb.PROBE: (int,),
}


def _control(edge: int, fields: tuple[Any, ...]) -> Control:
    verb, arguments = fields[3], fields[4:]
    if type(verb) is not int or not 0 <= verb < len(Verb):
        raise ProtocolError(f"control: expected a verb from 0 to {len(Verb) - 1}, got {_show(verb)}")
    expected = _ARGUMENTS[Verb(verb)]
    if len(arguments) != len(expected) or any(type(a) is not t for a, t in zip(arguments, expected, strict=True)):
        names = ", ".join(t.__name__ for t in expected)
        raise ProtocolError(f"control {Verb(verb).name}: expected ({names}), got {_show(arguments)}")
    if any(type(a) is int and a < 0 for a in arguments):
        raise ProtocolError(f"control {Verb(verb).name}: expected no negative number, got {_show(arguments)}")
    return Control(VERSION, CONTROL, edge, Verb(verb), arguments)


def _integer(what: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise ProtocolError(f"header: expected {what} as an integer from 0, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    """A value from outside, short enough for a log line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
