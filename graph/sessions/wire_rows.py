"""Write token ids as tensors in wire format, and find the rows of a received message, without torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ranvier.actors.component.session import SessionInfo
from ranvier.transport.format.codec import RAW
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer
from ranvier.transport.links.link_state import Received


def token_tensor(ids: Sequence[int], name: str = "token") -> tuple[TensorMeta, bytes]:
    """Return token ids as an int64 tensor in wire format, without torch."""
    data = array("q", ids).tobytes()
    return TensorMeta(name, BY_NAME["int64"].number, (len(ids),), RAW, len(data)), data


def chunks_of(info: SessionInfo, chunk: int) -> Iterator[tuple[Row, TensorMeta, bytes]]:
    """Yield the tokens of a session's log that are to be computed, in messages of at most `chunk` tokens."""
    for start in range(info.kept, len(info.log), chunk):
        ids = info.log[start : start + chunk]
        yield Row(info.session, info.epoch, start, len(ids)), *token_tensor(ids)


def rows_of(received: Received) -> Iterator[tuple[Row, tuple[TensorMeta, Buffer]]]:
    """Yield each row of a message with its share of the tensor. This separates the sessions of a batch."""
    header = received.header
    [buffer], [meta] = received.buffers, header.tensors
    first = received.link.spec.tensors[0][1].shape[:1]
    if len(header.rows) == 1 or first not in (("tokens",), ("rows",)):
        for row in header.rows:
            yield row, (meta, buffer)
        return
    view, start = memoryview(buffer), 0
    for row in header.rows:
        count = row.tokens if first == ("tokens",) else 1
        nbytes = meta.nbytes // max(1, meta.shape[0]) * count
        yield row, (meta._replace(shape=(count, *meta.shape[1:]), nbytes=nbytes), view[start : start + nbytes])
        start += nbytes
