"""Write down what streams have sent, so that a client gets the rest although the server was killed meanwhile.

A run with `journal: true` has the file `streams.jsonl` in its folder: a line for each stream with the request, and lines with
the tokens of its answer, written before they are sent. A server that is started again takes up the streams of the last one
at its address. No cache is filled for them until their clients come back. The key of a client is not in the file, only the
beginning of its hash.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ranvier.transport.files import regular

from ..file.errors import RequestError
from ..sessions.generation import Token
from ..sessions.journal import Began, Resumed
from ..sessions.line_file import LineFile, taken, whole_lines
from .bridge import Ended

FILE = "streams.jsonl"
Endpoint = Literal["chat", "completions", "responses"]
"""Names the endpoints that answer with text."""
MOST_BODY_BYTES = 4 << 20
"""The stream of a longer request does not outlive the server."""
MOST_KEPT = 512
"""Streams that are kept for clients that have left."""
PIECES_PER_LINE = 500


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
    """Represent one line of the file."""


class Address(_Line, frozen=True, tag="address"):
    """Tell where the server listens, and the version of its software, which decides how tokens become events."""

    host: str
    port: int
    version: str = importlib.metadata.version("ranvier")


class Opened(_Line, frozen=True, tag="stream"):
    """Tell that a stream began. `endpoint` answers `body`."""

    origin: Origin
    endpoint: Endpoint
    body: str


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Represent a token of an answer, or its end if there is a reason."""

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
    """Tell that an answer is over. `error` is the body of the error that ended it."""

    id: str
    error: dict[str, Any] | None = None


class Forgotten(_Line, frozen=True, tag="forgotten"):
    """Tell that a stream is not kept any more."""

    id: str


class _Grown(_Line, frozen=True, tag="grew"):
    """Represent a line `Grew` whose pieces are read later."""

    id: str


_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(Began | Address | Opened | _Grown | Complete | Forgotten).decode
_of_grew = msgspec.json.Decoder(Grew).decode


def piece_of(index: int, event: Token | Ended) -> Piece:
    """Return the piece that stands for a token or an end."""
    if isinstance(event, Ended):
        return Piece(index, 0, "", event.reason)
    logprob = None if event.logprob is None else _finite(event.logprob)
    return Piece(
        index, event.id, event.text, "", logprob, {id: _finite(each) for id, each in event.top_logprobs.items()}
    )


def _finite(logprob: float) -> float:
    """Return a number that JSON has: OpenAI's interface shows -9999 for a token without a probability."""
    return logprob if math.isfinite(logprob) else -9999.0


@dataclass(slots=True)
class Record:
    """Hold what is known of a stream of an earlier server. `lines` are the lines of the log."""

    opened: Opened
    lines: list[bytes]
    complete: Complete | None = None

    def pieces(self) -> list[Piece]:
        """Return the pieces of its answers, up to the first line that is damaged."""
        found: list[Piece] = []
        with contextlib.suppress(msgspec.MsgspecError):
            for line in self.lines[1:]:
                found += _of_grew(line).pieces
        return found


class StreamLog:
    """Write down the streams of one run. `left` are those that it takes over from an earlier server.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, began: Began, address: Address, left: Mapping[str, Record]) -> None:
        self._head = [_to_line(began), _to_line(address)]
        self._lines: dict[str, list[bytes]] = {name: list(record.lines) for name, record in left.items()}
        for name, record in left.items():
            if record.complete is not None:
                self._lines[name].append(_to_line(record.complete))
        self._file = LineFile(folder / FILE)
        if not self._file.rewrite(self._kept()):
            self._file.close()
            raise OSError(f"{self._file.path}: cannot be written")

    def add(self, line: Opened | Grew | Complete) -> bool:
        """Write a line. Return whether that succeeded."""
        name, data = line.origin.request_id if isinstance(line, Opened) else line.id, _to_line(line)
        if self._file.nbytes > self._file.rewrite_at:
            self._file.rewrite(self._kept())
        done = self._file.append([data])
        if done and (isinstance(line, Opened) or name in self._lines):
            self._lines.setdefault(name, []).append(data)
        return done

    def forget(self, request_id: str) -> None:
        """Drop a stream that nobody may ask for any more."""
        if self._lines.pop(request_id, None) is not None:
            self._file.append([_to_line(Forgotten(request_id))])

    def _kept(self) -> Iterator[bytes]:
        yield from self._head
        for lines in self._lines.values():
            yield from lines

    def close(self) -> None:
        """Close the file. It stays if streams are kept: the next server at this address takes them up. Idempotent."""
        if not self._lines:
            self._file.path.unlink(missing_ok=True)
        self._file.close()


@dataclass(frozen=True, slots=True)
class Started:
    """Hold the log of a run that begins to be served, the streams that it takes up, and what is to be told of that."""

    log: StreamLog
    left: Mapping[str, Record]
    said: Sequence[str] = ()


def begun(folder: Path, began: Began, address: Address) -> Started:
    """Begin the log of a run, and take up the streams of the last server that had its graph, model and address.

    The folder of that server's run lies beside this one. With port 0 no client could find this server again, so nothing is
    taken up.

    Raises:
        OSError: the log cannot be written.
    """
    said = []
    for path in _newest(folder) if address.port else ():
        try:
            left = _Left(path, began, address)
        except RequestError:
            continue  # that server is active
        except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
            said.append(f"{path}: damaged, and left alone: {error}")
            continue
        with contextlib.closing(left):
            if left.records:
                log = StreamLog(folder, began, address, left.records)
                try:
                    left.moved_to(folder, began)
                except (OSError, RequestError) as error:
                    said.append(f"{path}: its streams were taken up, but its run is not marked: {error}")
                return Started(log, left.records, [*said, f"took up {len(left.records)} streams of {path.parent}"])
    return Started(StreamLog(folder, began, address, {}), {}, said)


def _newest(folder: Path) -> list[Path]:
    """Return the logs of other runs in the same folder, the newest first."""
    found = []
    for path in folder.parent.glob(f"*/{FILE}"):
        with contextlib.suppress(OSError):  # it was removed meanwhile, or is not a file
            status = regular(path).stat()
            if path.parent != folder and status.st_uid == os.getuid():
                found.append((status.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


class _Left:
    """Hold the streams of an earlier server, locked so that no other server takes them up. There are none if it was another.

    Raises:
        RequestError: that server is active.
        OSError, ValueError, MsgspecError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path, began: Began, address: Address) -> None:
        self._path = path
        self._file = taken(path, os.O_RDWR)
        try:
            self.records = self._read(began, address)
        except BaseException:
            self.close()
            raise

    def _read(self, began: Began, address: Address) -> dict[str, Record]:
        lines = whole_lines(os.dup(self._file))
        if [_of_line(data) for data in itertools.islice(lines, 2)] != [began, address]:
            return {}
        records: dict[str, Record] = {}
        for data in lines:
            match _of_line(data):
                case Opened() as line:
                    records[line.origin.request_id] = Record(line, [data.rstrip()])
                    if len(records) > MOST_KEPT:
                        del records[next(iter(records))]
                case _Grown(id=name) if name in records:
                    records[name].lines.append(data.rstrip())
                case Complete(id=name) as line if name in records:
                    records[name].complete = line
                case Forgotten(id=name):
                    records.pop(name, None)
        return records

    def moved_to(self, folder: Path, began: Began) -> None:
        """Remove the log, whose streams are in another one now. The run's journal tells where its requests went.

        Raises:
            OSError, RequestError: that cannot be done.
        """
        try:
            with contextlib.closing(Resumed(self._path.parent, began)) as journal:
                journal.moved_to(folder)
        finally:
            self._path.unlink()

    def close(self) -> None:
        """Unlock the file."""
        os.close(self._file)
