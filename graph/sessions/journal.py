"""Keep the journal of a run: write every accepted generation, and each of its tokens, before the client sees them.

With `journal: true` a request outlives the process that holds the gateway. `ranvier run --resume RUN`, or
`launch(graph, resume=RUN)`, reads the journal of a killed run and continues each request in a new run. The tokens are
the same, because the sampler is keyed by (seed, position).

`journal.jsonl` holds one line for each request, token and end, written before any client is woken. When it has grown too
large, it is rewritten with only what is still needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import describe
from ranvier.transport.files import regular

from ..check.checked import Graph
from ..file.errors import RequestError
from ..plan.plan import Plan
from .line_file import LineFile, taken, whole_lines

FILE = "journal.jsonl"
MOST_ENDED = 1000
"""Maximum number of ended requests whose tokens are kept for clients that come back for them."""
REST = 20
"""After a failed rewrite, the next one waits this many times as long as the failed one took."""


class _Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """Represent one line of the journal."""


class Began(_Line, frozen=True, tag="run"):
    """Record what must be the same in a run that continues the requests: the hashes of graph and model."""

    hash: str
    model: str


class Asked(_Line, frozen=True, tag="request"):
    """Record that a request was accepted.

    `deadline_s` is in seconds since 1970; 0 means no deadline. `tokens` are those that the request already had when its
    run was resumed.
    """

    id: str
    info: SessionInfo
    stop: tuple[str, ...] = ()
    deadline_s: float = 0.0
    tokens: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    """The prompt of an encoder–decoder model. The log of such a session holds only the decoder's tokens."""


class Made(_Line, frozen=True, tag="token"):
    """Record a token, by its position in the session."""

    id: str
    position: int
    token: int


class Ended(_Line, frozen=True, tag="end"):
    """Record that a request is over. `reason` says why it is done; `error` is the message of an error that ended it."""

    id: str
    reason: str
    error: str = ""


class Moved(_Line, frozen=True, tag="moved"):
    """Record that all requests continue in another run."""

    run: str


Line = Began | Asked | Made | Ended | Moved
_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(Line).decode


@dataclass(slots=True)
class Request:
    """Hold one request of a journal. `end` is None while the request is open."""

    asked: Asked
    tokens: list[int] = field(default_factory=list)
    end: Ended | None = None

    @property
    def info(self) -> SessionInfo:
        """Return the session as it was asked for."""
        return self.asked.info

    @property
    def reason(self) -> str | None:
        """Return why the request is done, or None while it is open.

        A crash may have come between its last token and its end. The reason then follows from the tokens.
        """
        if self.end is not None:
            return self.end.reason
        if self.tokens and self.info.finished(len(self.tokens), self.tokens[-1]):
            return self.info.reason(self.tokens[-1])
        return None

    @property
    def deadline_ns(self) -> int:
        """Return the deadline on this machine's monotonic clock; 0: none."""
        left_s = self.asked.deadline_s - time.time()
        return max(1, time.monotonic_ns() + int(left_s * 1e9)) if self.asked.deadline_s else 0


class Journal:
    """Write the journal of a run. `known` holds its requests by id. Tests replace `write`, which is `os.pwrite`.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, folder: Path, run: Began, write: Callable[[int, bytes, int], int] = os.pwrite) -> None:
        self.run = run
        self._pending: list[Line] = []
        self._next_try_s = 0.0
        self._closed = False
        self._over: deque[str] = deque()
        self.known: dict[str, Request] = {}
        self._file = LineFile(folder / FILE, write)
        self._behind = not self._file.append([_to_line(run)])

    @property
    def durable(self) -> bool:
        """Return whether everything that was added and flushed is in the file."""
        return not self._behind

    def add(self, line: Asked | Made | Ended) -> None:
        """Add a line, which `flush` writes."""
        if isinstance(line, Asked):
            self.known[line.id] = Request(line, list(line.tokens))
        elif isinstance(line, Made):
            self.known[line.id].tokens.append(line.token)
        else:
            request = self.known[line.id]
            request.end = line
            if request.info.edits:  # nobody makes them again, and their vectors take megabytes
                info = dataclasses.replace(request.info, edits=())
                request.asked = msgspec.structs.replace(request.asked, info=info)
            self._over.append(line.id)
            if len(self._over) > MOST_ENDED:
                del self.known[self._over.popleft()]
        self._pending.append(line)

    def flush(self) -> bool:
        """Write the added lines, and those that a full disk has delayed. Return whether all are in the file now."""
        if not self._pending:
            return not self._behind
        lines, self._pending = self._pending, []
        if self._behind:
            self.catch_up()
        elif self._file.nbytes <= self._file.rewrite_at or not self._write_anew():
            self._behind = not self._file.append(map(_to_line, lines))
        return not self._behind

    def catch_up(self) -> None:
        """Write the lines that a full disk has delayed, even if no line was added since."""
        if self._behind and time.monotonic() >= self._next_try_s:
            self._behind = not self._write_anew()

    def _write_anew(self) -> bool:
        """Rewrite the file with the open requests and the last ended ones. Return whether that succeeded."""
        began_s = time.monotonic()
        done = self._file.rewrite(map(_to_line, self._lines()))
        if not done:
            now_s = time.monotonic()
            self._next_try_s = now_s + REST * (now_s - began_s)
        return done

    def _lines(self) -> Iterable[Line]:
        yield self.run
        for request in self.known.values():
            yield msgspec.structs.replace(request.asked, tokens=tuple(request.tokens))
            if request.end is not None:
                yield request.end

    def close(self) -> None:
        """Flush and close the file. Idempotent."""
        if not self._closed:
            self._closed = True
            self.flush()
            self._file.close()


class Resumed:
    """Hold the journal of a run that is over, locked so that nobody else can resume it meanwhile.

    Raises:
        RequestError: the run has no journal, is still active, or was resumed already; or its journal is damaged, or of
            another graph or model.
    """

    def __init__(self, run_dir: Path, began: Began) -> None:
        self._path = run_dir / FILE
        self.requests: dict[str, Request] = {}
        try:
            self._file = taken(self._path, os.O_RDWR)
        except OSError as error:
            raise RequestError(f"{self._path}: {error.strerror}; was the run started with journal: true?") from None
        try:
            self._size = self._read(began)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError):
                raise RequestError(f"{self._path}: damaged: {error}") from None
            raise

    def _read(self, began: Began) -> int:
        """Read all whole lines and return their size in bytes."""
        size = 0
        for number, data in enumerate(whole_lines(os.dup(self._file)), 1):
            try:
                line = _of_line(data)
                if not size and not isinstance(line, Began):
                    raise ValueError("expected the run's hashes in the first line")
                size += len(data)
                self._take(line, began)
            except RequestError:
                raise
            except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise RequestError(f"{self._path}:{number}: damaged: {describe(error)}") from None
        if not size:
            raise RequestError(f"{self._path}: empty; nothing can be resumed")
        return size

    def _take(self, line: Line, began: Began) -> None:
        match line:
            case Began():
                for what, there, here in (("graph", line.hash, began.hash), ("model", line.model, began.model)):
                    if there != here:
                        raise RequestError(
                            f"{self._path}: its requests are for another {what}: expected hash {there}, got {here}"
                        )
            case Asked():
                info = line.info
                if not info.log or info.capacity < 1 or info.max_tokens < 1:
                    raise ValueError(f"request {line.id:.80}: expected a prompt and at least one new token")
                self.requests[line.id] = Request(line, list(line.tokens))
            case Made():
                request = self.requests[line.id]
                if line.position != len(request.info.log) + len(request.tokens):
                    raise ValueError(f"token at position {line.position}, expected the next of request {line.id}")
                request.tokens.append(line.token)
            case Ended():
                self.requests[line.id].end = line
            case Moved():
                raise RequestError(f"{self._path}: its requests were taken over by {line.run}; resume that run")

    def moved_to(self, run_dir: Path) -> None:
        """Record that the requests are now in the journal of another run.

        Raises:
            OSError: the record cannot be written.
        """
        data = _to_line(Moved(str(run_dir))) + b"\n"
        os.ftruncate(self._file, self._size)
        if os.pwrite(self._file, data, self._size) != len(data):
            raise OSError(f"{self._path}: cannot be written to")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_open(run_dir: Path) -> bool:
    """Return whether a run's journal has requests that neither ended nor moved to another run, or cannot be read."""
    path = run_dir / FILE
    if not path.exists():
        return False
    left: set[str] = set()
    try:
        for data in whole_lines(regular(path)):
            match _of_line(data):
                case Asked(id=key):
                    left.add(key)
                case Ended(id=key):
                    left.discard(key)
                case Moved():
                    return False
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return True
    return bool(left)


def began(plan: Plan) -> Began:
    """Return the hashes of the graph and of the model that a run's requests are for.

    The model's hash covers all bytes of its files, and of the code in the graph's folder. Reading them takes 1 s per
    1.5 GB.

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
        found.update(file for entry in graph.checkpoint.tensors.values() for file in entry.files)
        if graph.checkpoint.path.is_dir():
            found.update(
                path for kind in ("*.json", "*.jinja") for path in graph.checkpoint.path.glob(kind) if path.is_file()
            )
    for actor in graph.actors.values():
        if actor.kind.folder is not None:
            code = Path(actor.kind.folder) / actor.kind.implementation.partition(":")[0]
            found.update((code, *_code_below(code.parent)))  # the code may import these
        if actor.weights is not None:
            found.add(actor.weights)
    for edge in graph.edges:
        if edge.tap is not None and edge.tap.startswith("./"):
            found.update(_code_below((graph.folder / edge.tap.partition(":")[0]).parent))
    return found


def _code_below(folder: Path) -> Iterable[Path]:
    """Return the Python files that code in a folder may import: those of the folder and of the packages in it."""
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if (Path(inside, name) / "__init__.py").is_file()]
        yield from (path for name in names if name.endswith(".py") and (path := Path(inside, name)).is_file())


def of_request(
    key: str, info: SessionInfo, stop: Sequence[str], deadline_s: float, *, source: tuple[int, ...] = ()
) -> Asked:
    """Return the line of a request, without what is valid only in its run: number, epoch, trace and replicas."""
    asked = dataclasses.replace(info, session=0, epoch=0, traceparent="", replicas={})
    return Asked(key, asked, tuple(stop), deadline_s, source=source)
