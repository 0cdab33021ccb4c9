"""Write down what streams have sent, so that a client gets the rest although the server was killed meanwhile.

A run with `journal: true` has the file `streams.jsonl` in its folder: a line for each stream with the request, and lines with
the tokens of its answer, written before they are sent. A server that is started again takes up the streams of the last one
that was killed. No cache is filled for them until their clients come back. The key of a client is not in the file, only the
beginning of its hash.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ranvier.transport.files import regular

from ..file.errors import RequestError
from ..sessions.generation import Token
from ..sessions.journal import Began, Moved, Resumed
from ..sessions.line_file import LineFile, taken, whole_lines
from .bridge import Ended

FILE = "streams.jsonl"
MOST_BODY_BYTES = 4 << 20
"""The stream of a longer request does not outlive the server."""


class Origin(msgspec.Struct, kw_only=True):
    """Hold what an answer is made of, besides the body of its request: with these, it is made again in the same way."""

    request_id: str
    owner: str
    """A name for the key that asked."""
    created: int = msgspec.field(default_factory=lambda: int(time.time()))
    seed: int
    """Chooses the tokens, if the body names no seed."""
    traceparent: str | None = None
    prompt: list[int] | None = None
    """The token ids of a chat, once they are known. A template may put the date into it."""


class _Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """Be one line of the file."""


class Address(_Line, frozen=True, tag="address"):
    """Tell where the server listens. Clients come back to the same address."""

    port: int


class Opened(_Line, frozen=True, tag="stream"):
    """Tell that a stream began. `endpoint` answers `body`."""

    origin: Origin
    endpoint: str
    body: str


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Be a token of an answer, or its end if there is a reason."""

    index: int
    token: int
    text: str
    reason: str = ""
    logprob: float | None = None
    top_logprobs: Mapping[int, float] = {}

    @property
    def event(self) -> Token | Ended:
        """Return what the piece was made of."""
        if self.reason:
            return Ended(self.reason)
        return Token(self.token, -1, self.text, logprob=self.logprob, top_logprobs=self.top_logprobs)


class Grew(_Line, frozen=True, tag="grew"):
    """Tell what was added to an answer."""

    id: str
    pieces: Sequence[Piece]


class Complete(_Line, frozen=True, tag="complete"):
    """Tell that an answer is over. `error` is the event of the error that ended it."""

    id: str
    error: dict[str, Any] | None = None


class Closed(_Line, frozen=True, tag="closed"):
    """Tell that the server has ended by itself: every client knows how its stream ended."""


Line = Began | Address | Opened | Grew | Complete | Closed | Moved
_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(Line).decode


def piece_of(index: int, event: Token | Ended) -> Piece:
    """Return the piece that stands for a token or an end."""
    if isinstance(event, Ended):
        return Piece(index, 0, "", event.reason)
    return Piece(index, event.id, event.text, "", event.logprob, event.top_logprobs)


@dataclass(slots=True)
class Record:
    """Hold what is known of a stream whose server was killed."""

    opened: Opened
    pieces: list[Piece] = field(default_factory=list)
    complete: Complete | None = None


class StreamLog:
    """Write down the streams of one run. `keeps` tells whether a stream may still be asked for.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, folder: Path, began: Began, port: int, left: Mapping[str, Record]) -> None:
        self.keeps: Callable[[str], bool] = lambda _: True
        self._head = [_to_line(began), _to_line(Address(port))]
        self._file = LineFile(folder / FILE)
        lines = [_to_line(line) for record in left.values() for line in _lines_of(record)]
        if not self._file.append([*self._head, *lines]):
            self._file.close()
            raise OSError(f"{self._file.path}: cannot be written")

    def add(self, line: Opened | Grew | Complete) -> bool:
        """Write a line. Return whether that succeeded."""
        if self._file.nbytes > self._file.rewrite_at:
            self._file.rewrite(self._kept())
        return self._file.append([_to_line(line)])

    def _kept(self) -> Iterator[bytes]:
        yield from self._head
        for data in whole_lines(self._file.path):
            line = _of_line(data)
            if isinstance(line, Opened | Grew | Complete) and self.keeps(_id_of(line)):
                yield data[:-1]

    def close(self) -> None:
        """Close the file: its streams are not taken up."""
        self._file.append([_to_line(Closed())])
        self._file.close()


def _id_of(line: Opened | Grew | Complete) -> str:
    return line.origin.request_id if isinstance(line, Opened) else line.id


def _lines_of(record: Record) -> Iterator[Line]:
    yield record.opened
    if record.pieces:
        yield Grew(record.opened.origin.request_id, record.pieces)
    if record.complete is not None:
        yield record.complete


def begun(folder: Path, began: Began, port: int, any_port: bool) -> tuple[StreamLog, dict[str, Record]]:
    """Return the log of a run, and the streams that it takes up from the last server that was killed.

    That server had the same graph and model, and its folder lies beside this one. It listened on this `port`, or on any.

    Raises:
        OSError: the log cannot be written.
    """
    for path in _newest(folder):
        try:
            left = _Left(path, began, port, any_port)
        except (OSError, RequestError, ValueError, msgspec.MsgspecError, RecursionError):
            continue  # that server is active, or the file is damaged
        with contextlib.closing(left):
            if left.takes:
                log = StreamLog(folder, began, port, left.records)
                with contextlib.suppress(OSError, RequestError):  # then they may be taken up twice, which harms nobody
                    left.moved_to(folder, began)
                return log, left.records
    return StreamLog(folder, began, port, {}), {}


def _newest(folder: Path) -> list[Path]:
    found = []
    for path in folder.parent.glob(f"*/{FILE}"):
        with contextlib.suppress(OSError):
            if path.parent != folder:
                found.append((regular(path).stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


class _Left:
    """Hold the streams of a server that was killed, locked so that no other server takes them up.

    Raises:
        RequestError: it is not over.
        OSError, ValueError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path, began: Began, port: int, any_port: bool) -> None:
        self._path = path
        self._size = 0
        self.records: dict[str, Record] = {}
        self.takes = False
        self._file = taken(path, os.O_RDWR)
        try:
            self.takes = self._read(began, port, any_port)
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, began: Began, port: int, any_port: bool) -> bool:
        for data in whole_lines(os.dup(self._file)):
            line = _of_line(data)
            self._size += len(data)
            match line:
                case Began() if line != began:
                    return False
                case Address() if line.port != port and not any_port:
                    return False
                case Opened():
                    self.records[line.origin.request_id] = Record(line)
                case Grew() if line.id in self.records:
                    self.records[line.id].pieces.extend(line.pieces)
                case Complete() if line.id in self.records:
                    self.records[line.id].complete = line
                case Closed() | Moved():
                    return False
        return self._size > 0

    def moved_to(self, folder: Path, began: Began) -> None:
        """Tell that the streams are in another run's log now, and so are the requests of the run's journal."""
        os.ftruncate(self._file, self._size)
        os.pwrite(self._file, _to_line(Moved(str(folder))) + b"\n", self._size)
        with contextlib.closing(Resumed(self._path.parent, began)) as journal:
            journal.moved_to(folder)

    def close(self) -> None:
        """Unlock the file."""
        os.close(self._file)
