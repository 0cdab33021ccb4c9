"""The journal of a run: every accepted generation and each of its tokens, in a file before the client sees them.

With `journal: true` a request outlives the process that holds the gateway: `ranvier run --resume RUN`, or
`launch(graph, resume=RUN)`, reads the journal of a run that was killed and continues each request in a run of its own, with the
same tokens: the sampler is keyed by (seed, position).

`journal.jsonl` holds a line for each request, token and end. Lines are handed to the system in one write before any client is
woken, so they outlive the process however it dies. They are not forced to the disk: a machine that loses its power may lose the
last of them. The file is locked for as long as the run lives. It is written anew, with what is still of use, when it has grown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import told
from ranvier.transport.files import locked, regular

from ..file.checked import Graph
from ..file.errors import RequestError
from ..plan.plan import Plan

FILE = "journal.jsonl"
MOST_BYTES = 64 << 20
"""Then the file is written anew."""
MOST_ENDED = 1000
"""Requests that are over, whose tokens are kept for clients that come back for them."""
MOST_LINE_BYTES = 1 << 24
REST = 20
"""After an attempt to write the file anew has failed, the next waits for so many times as long as it took."""


class _Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """One line of the journal."""


class Began(_Line, frozen=True, tag="run"):
    """The run: what must be the same where a request is to go on."""

    hash: str
    model: str


class Asked(_Line, frozen=True, tag="request"):
    """A request was accepted. `deadline_s`: seconds since 1970, 0: none. `tokens`: what it has already, after a resume."""

    id: str
    info: dict[str, Any]
    stop: tuple[str, ...] = ()
    deadline_s: float = 0.0
    tokens: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    """The prompt of an encoder–decoder model, whose log has the decoder's tokens alone."""


class Made(_Line, frozen=True, tag="token"):
    """A token, by its position in the session."""

    id: str
    position: int
    token: int


class Ended(_Line, frozen=True, tag="end"):
    """A request is over: done (the reason), or with an error (its words)."""

    id: str
    reason: str
    error: str = ""


class Moved(_Line, frozen=True, tag="moved"):
    """All requests go on in another run."""

    run: str


Line = Began | Asked | Made | Ended | Moved
_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(Line).decode


@dataclass(slots=True)
class Request:
    """One request as a journal has it. `end` is None while it is open."""

    asked: Asked
    info: SessionInfo
    tokens: list[int] = field(default_factory=list)
    end: Ended | None = None

    @property
    def reason(self) -> str | None:
        """Why it is over; None while it is open. Its last token may have been written, and its end not."""
        if self.end is not None:
            return self.end.reason
        if self.tokens and self.info.finished(len(self.tokens), self.tokens[-1]):
            return "stop" if self.tokens[-1] in self.info.stop_tokens else "length"
        return None

    @property
    def deadline_ns(self) -> int:
        """Of this machine's monotonic clock; 0: none."""
        left_s = self.asked.deadline_s - time.time()
        return max(1, time.monotonic_ns() + int(left_s * 1e9)) if self.asked.deadline_s else 0


class Journal:
    """The writing end. `known` are the requests that it tells of, by id; `write` is `os.pwrite`, but for tests.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, run: Began, write: Callable[[int, bytes, int], int] = os.pwrite) -> None:
        self._path = folder / FILE
        self._write = write
        self._run = run
        self._pending: list[Line] = []
        self._bytes = self._compact_at = 0
        self._next_try_s = 0.0
        self._over: deque[str] = deque()
        self.known: dict[str, Request] = {}
        self._file = _locked(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._compact_at = MOST_BYTES
        self._behind = not self._append([run])

    @property
    def durable(self) -> bool:
        """Whether all that was added and flushed is in the file."""
        return not self._behind

    def add(self, line: Asked | Made | Ended) -> None:
        """Something has happened; `flush` writes it."""
        if isinstance(line, Asked):
            self.known[line.id] = Request(line, SessionInfo.from_plain(line.info), list(line.tokens))
        elif isinstance(line, Made):
            self.known[line.id].tokens.append(line.token)
        else:
            self.known[line.id].end = line
            self._over.append(line.id)
            if len(self._over) > MOST_ENDED:
                del self.known[self._over.popleft()]
        self._pending.append(line)

    def flush(self) -> bool:
        """Write what was added: whether all is in the file now. After a disk was full, what was missed is written with it."""
        if not self._pending:
            return not self._behind
        lines, self._pending = self._pending, []
        if self._behind:
            self.catch_up()
        elif self._bytes <= self._compact_at or not self._write_anew():
            self._behind = not self._append(lines)
        return not self._behind

    def catch_up(self) -> None:
        """Write what a full disk has kept out of the file, though nothing new has happened."""
        if self._behind and time.monotonic() >= self._next_try_s:
            self._behind = not self._write_anew()

    def _append(self, lines: Iterable[Line]) -> bool:
        data = b"".join([_to_line(line) + b"\n" for line in lines])
        with contextlib.suppress(OSError):
            if self._write(self._file, data, self._bytes) == len(data):
                self._bytes += len(data)
                return True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._bytes)  # the beginning of a line must not stay
        return False

    def _write_anew(self) -> bool:
        """Replace the file by one with the requests that are open, and the last of those that are over."""
        began_s = time.monotonic()
        data = b"".join([_to_line(line) + b"\n" for line in self._lines()])
        part = self._path.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)
            made = _locked(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                if self._write(made, data, 0) != len(data):
                    raise OSError("short write")
                part.replace(self._path)
            except OSError:
                os.close(made)
                part.unlink(missing_ok=True)
                raise
        except (OSError, RequestError):
            now_s = time.monotonic()
            self._next_try_s, self._compact_at = now_s + REST * (now_s - began_s), self._bytes + MOST_BYTES
            return False
        os.close(self._file)
        self._file, self._bytes, self._compact_at = made, len(data), max(MOST_BYTES, 4 * len(data))
        return True

    def _lines(self) -> Iterable[Line]:
        yield self._run
        for request in self.known.values():
            yield msgspec.structs.replace(request.asked, tokens=tuple(request.tokens))
            if request.end is not None:
                yield request.end

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1


def _locked(path: Path, flags: int) -> int:
    """Open a journal, and lock it for this process.

    Raises:
        OSError: it cannot be opened.
        RequestError: another process has it.
    """
    try:
        return locked(path, flags)
    except BlockingIOError:
        raise RequestError(f"{path}: the run still goes on; ask that one") from None


class Resumed:
    """The journal of a run that is over, held so that nobody else resumes it meanwhile.

    Raises:
        RequestError: it has none, still goes on, was resumed already, is damaged, or is of another graph or model.
    """

    def __init__(self, run_dir: Path, began: Began) -> None:
        self._path = run_dir / FILE
        self.requests: dict[str, Request] = {}
        try:
            self._file = _locked(self._path, os.O_RDWR)
        except OSError as error:
            raise RequestError(f"{self._path}: {error.strerror}; was the run started with journal: true?") from None
        try:
            self._size = self._read(began)
        except BaseException:
            self.close()
            raise

    def _read(self, began: Began) -> int:
        """Read all whole lines: how many bytes they are. The last one may have been cut off by the end of its process."""
        size = 0
        with open(os.dup(self._file), "rb") as file:
            for number, data in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), 1):
                if not data.endswith(b"\n"):
                    break
                try:
                    line = _of_line(data)
                    if not size and not isinstance(line, Began):
                        raise ValueError("expected first of all what the run was of")
                    size += len(data)
                    self._take(line, began)
                except RequestError:
                    raise
                except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
                    raise RequestError(f"{self._path}:{number}: damaged: {told(error)}") from None
        if not size:
            raise RequestError(f"{self._path}: empty; nothing can be resumed")
        return size

    def _take(self, line: Line, began: Began) -> None:
        match line:
            case Began():
                for what, there, here in (("graph", line.hash, began.hash), ("model", line.model, began.model)):
                    if there != here:
                        raise RequestError(
                            f"{self._path}: its requests were asked of another {what}: expected hash {there}, got {here}"
                        )
            case Asked():
                info = msgspec.convert(line.info, SessionInfo)
                if not info.log or info.capacity < 1 or info.max_tokens < 1:
                    raise ValueError(f"request {line.id:.80} asks for nothing")
                self.requests[line.id] = Request(line, info, list(line.tokens))
            case Made():
                request = self.requests[line.id]
                if line.position != len(request.info.log) + len(request.tokens):
                    raise ValueError(f"token at position {line.position}, expected the next of request {line.id}")
                request.tokens.append(line.token)
            case Ended():
                self.requests[line.id].end = line
            case Moved():
                raise RequestError(f"{self._path}: its requests go on in {line.run}; resume that run")

    def moved_to(self, run_dir: Path) -> None:
        """The requests are in the journal of another run now.

        Raises:
            OSError: that cannot be written down.
        """
        data = _to_line(Moved(str(run_dir))) + b"\n"
        os.ftruncate(self._file, self._size)
        if os.pwrite(self._file, data, self._size) != len(data):
            raise OSError(f"{self._path}: cannot be written to")

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_open(run_dir: Path) -> bool:
    """Whether a run's journal has requests that did not end and go on nowhere else, or cannot be read."""
    path = run_dir / FILE
    if not path.exists():
        return False
    left: set[str] = set()
    try:
        with regular(path).open("rb") as file:
            for data in iter(lambda: file.readline(MOST_LINE_BYTES), b""):
                if not data.endswith(b"\n"):
                    break
                match _of_line(data):
                    case Asked(id=key):
                        left.add(key)
                    case Ended(id=key):
                        left.discard(key)
                    case Moved():
                        return False
    except (OSError, msgspec.MsgspecError, RecursionError):
        return True
    return bool(left)


def began(plan: Plan) -> Began:
    """Return what a run's requests are asked of: the hashes of the graph, and of all the bytes of the model's files and of the
    graph's own code. Reads 1.5 GB a second.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(_files(plan.graph)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Began(plan.hash, digest.hexdigest()[:16])


def _files(graph: Graph) -> Iterable[Path]:
    found: set[Path] = set()
    if graph.checkpoint is not None:
        found.update(entry.file for entry in graph.checkpoint.tensors.values())
        if graph.checkpoint.path.is_dir():
            found.update(path for path in graph.checkpoint.path.glob("*.json") if path.is_file())
    for actor in graph.actors.values():
        if actor.kind.folder is not None:
            code = Path(actor.kind.folder) / actor.kind.implementation.partition(":")[0]
            found.update((code, *_code_below(code.parent)))  # it may import these
        if actor.weights is not None:
            found.add(actor.weights)
    for edge in graph.edges:
        if edge.tap is not None and edge.tap.startswith("./"):
            found.update(_code_below((graph.path.parent / edge.tap.partition(":")[0]).parent))
    return found


def _code_below(folder: Path) -> Iterable[Path]:
    """Return the Python files that code of a folder may import: its own and those of the packages in it."""
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if (Path(inside, name) / "__init__.py").is_file()]
        yield from (path for name in names if name.endswith(".py") and (path := Path(inside, name)).is_file())


def of_request(
    key: str, info: SessionInfo, stop: Sequence[str], deadline_s: float, *, source: tuple[int, ...] = ()
) -> Asked:
    """The line of a request, whose session's number and epoch are those of its run alone."""
    plain: Mapping[str, Any] = {**info.to_plain(), "session": 0, "epoch": 0, "traceparent": "", "places": {}}
    return Asked(key, dict(plain), tuple(stop), deadline_s, source=source)
