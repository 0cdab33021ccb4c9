"""Create and fill the run folder, which holds everything that is needed to understand a run later.

<runs>/<graph>-<date>-<time>-<letters>/      mode 0700
    graph.yaml   a copy of the graph file    plan.json    the plan that was made from it
    run.json     versions, times, outcome    logs/        one file per process: JSON lines, standard error
    lock         held while it runs          journal.jsonl  requests and their tokens, with `journal: true`
    trace/       one file per actor          sockets/     only while it runs
    keys/        for tcp, only while it runs; made for this run alone if the graph names none
    clocks.json  how far the hosts' clocks are ahead of the run's own, and how accurately that is known
    record/      recorded messages of edges, one folder per actor (actors/trace/recording_format.py)
    state/       state that actors have saved for their replacements, if any do
    streams.jsonl  what a server has sent, with `journal: true` (graph/bridge/stream_log.py)
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trio

from ranvier.actors.errors import ActorFailed, counted, describe
from ranvier.actors.protocol.clocks import Clock
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.errors import RanvierError, ResourceError
from ranvier.transport.wires import curve
from ranvier.transport.wires.endpoint import MAX_PATH_BYTES

from ..check.checked import Graph
from ..plan.plan import Plan
from . import runs

DEFAULT_ROOT = Path("ranvier-runs")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Represent the folder of one run.

    `known` is the content of `run.json`. `lost` counts failed writes, by file name.
    """

    path: Path
    sockets: Path
    """The folder of the sockets. It is a separate one if paths in the run folder would be too long."""
    lock: int
    """The file descriptor that locks the folder while the run is live."""
    known: dict[str, Any] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    def outcome(self, **fields: Any) -> None:
        """Add fields to `run.json`, and replace the file as a whole.

        On a full disk the previous file remains, and `lost` counts the failure.
        """
        self.known.update(fields)
        self._write("run.json", json.dumps(self.known, indent=1) + "\n")

    def failed(self, error: BaseException) -> None:
        """Write why the run ended: an error, or an interruption."""
        interrupted = isinstance(error, KeyboardInterrupt | trio.Cancelled)
        if isinstance(error, BaseExceptionGroup):
            interrupted = error.split((KeyboardInterrupt, trio.Cancelled))[1] is None
        what = str(error) if isinstance(error, RanvierError) else describe(error)
        self.outcome(outcome="interrupted" if interrupted else "failed", error=what)

    def clocks(self, clocks: Mapping[str, Clock]) -> None:
        """Write how far the hosts' clocks are ahead, for readers of the trace."""
        self._write("clocks.json", json.dumps({host: clock.estimates for host, clock in clocks.items()}))

    def _write(self, name: str, text: str) -> None:
        """Replace a file as a whole, or leave it unchanged."""
        part = self.path / f"{name}.part"
        try:
            part.write_text(text)
            part.replace(self.path / name)
        except OSError:
            self.lost[name] += 1
            with contextlib.suppress(OSError):
                part.unlink()

    def close(self) -> None:
        """Remove what only a live run needs."""
        for folder in (self.sockets, self.keys):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # remove the link, if the sockets are in a separate folder
            (self.path / "sockets").unlink()
        with contextlib.suppress(OSError):
            (self.path / runs.LOCK).unlink()
        with contextlib.suppress(OSError):  # already closed
            os.close(self.lock)


@contextlib.contextmanager
def made(
    plan: Plan, root: Path, blame: Callable[[OSError], BaseException], resumed: Path | None = None
) -> Iterator[RunFolder]:
    """Create the folder of a new run. At the end, write the outcome into it: `done`, or the error that ended the run.

    `blame` turns an error of the operating system into one for users. `resumed` is the folder of the run that this one
    continues: it is not removed to make room.

    Raises:
        ResourceError: the folder cannot be made.
        BaseException: the error that ended the run; for a group, the one that matters most (`single`).
    """
    try:
        with runs.using(resumed):
            folder = create(plan, root)
    except OSError as error:
        raise ResourceError(f"the run's folder cannot be made: {error}") from error
    try:
        yield folder
    except (BaseExceptionGroup, OSError) as several:
        one = single(several) if isinstance(several, BaseExceptionGroup) else several
        if isinstance(one, OSError):
            one = blame(one)
        folder.failed(one)
        raise one from None
    except BaseException as error:
        folder.failed(error)
        raise
    else:
        folder.outcome(outcome="done")
    finally:
        folder.close()


def create(plan: Plan, root: Path) -> RunFolder:
    """Create the folder of a new run under `root`.

    Raises:
        OSError: it cannot be created, or one of its files cannot be written.
    """
    graph = plan.graph
    root.mkdir(parents=True, exist_ok=True)
    removed = _prune(root, graph)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = root.absolute() / f"{graph.name}-{stamp}-{secrets.token_hex(2)}"
    path.mkdir(mode=0o700)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, path, ignore_errors=True)
        lock = runs.hold(path)
        undo.callback(os.close, lock)
        sockets = _sockets(graph, path)
        undo.callback(shutil.rmtree, sockets, ignore_errors=True)
        folder = RunFolder(path, sockets, lock)
        _fill(folder, plan, removed)
        undo.pop_all()
    return folder


def _fill(folder: RunFolder, plan: Plan, removed: Sequence[str]) -> None:
    """Write the files that a run begins with. `removed` names the older runs that were removed to make room."""
    graph, path = plan.graph, folder.path
    for part in (folder.logs, folder.trace):
        part.mkdir(mode=0o700)
    if plan.keys(path) == folder.keys:
        curve.write(folder.keys, (GATEWAY, *graph.actors))
    (path / "graph.yaml").write_bytes(graph.document.text)
    (path / "plan.json").write_text(json.dumps({**plan.to_plain(), "expanded": graph.expanded()}, indent=1) + "\n")
    folder.outcome(
        graph=graph.name,
        hash=plan.hash,
        file=str(graph.path.absolute()) if graph.path is not None else None,
        folder=str(graph.folder.absolute()),
        settings=dict(graph.overrides),
        allow_code=graph.allow_code,
        pid=os.getpid(),
        started=datetime.datetime.now(datetime.UTC).isoformat(),
        monotonic_ns=time.monotonic_ns(),
        machine={"system": platform.platform(), "cores": os.cpu_count()},
        versions=versions(),
        removed=list(removed),
    )
    if folder.lost:
        raise OSError(errno.ENOSPC, "run.json cannot be written", str(path))


def _prune(root: Path, graph: Graph) -> Sequence[str]:
    """Remove old runs until `root`, with the new run, is within the graph's bounds. Return the names of removed runs.

    The first removal in a folder prints a message; later ones do not.
    """
    bound = graph.file.runs
    gone: list[runs.RunOfFolder] = []
    with contextlib.suppress(OSError):  # the folder cannot be read: remove nothing
        gone = runs.prune(root, bound.newest, int(bound.gigabytes * 1e9), coming=1)
    said = root / ".pruned"
    if gone and not said.exists():
        with contextlib.suppress(OSError):
            said.touch()
        what = (
            f"removed {counted(len(gone), 'older run')}; at most {counted(bound.newest, 'run')} "
            f"and {bound.gigabytes:g} GB are kept"
        )
        print(f"ranvier: {root}: {what} (change `runs:` in the graph file; this message appears once)", file=sys.stderr)
    return [run.path.name for run in gone]


def versions() -> Mapping[str, str]:
    names = ("ranvier", "torch", "pyzmq", "msgspec", "trio")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _sockets(graph: Graph, path: Path) -> Path:
    """Create the folder for sockets: in the run folder, or a short private one if socket paths would be too long."""
    longest = max([*(f"{actor}.9999" for actor in graph.actors), "supervisor"], key=len)
    own = path / "sockets"
    if len(os.fsencode(own / f"{longest}.9999.c")) <= MAX_PATH_BYTES:
        own.mkdir(mode=0o700)
        return own
    for parent in (None, *filter(os.path.isdir, ("/dev/shm", "/tmp"))):
        made = Path(tempfile.mkdtemp(prefix="rv-", dir=parent))  # mode 0700
        if len(os.fsencode(made / f"{longest}.9999.c")) <= MAX_PATH_BYTES:
            own.symlink_to(made)  # so that commands find it
            return made
        made.rmdir()
    raise OSError(f"every path for the socket {longest}.c is over {MAX_PATH_BYTES} bytes; use shorter actor names")


def single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Reduce a group of errors to the one that matters most.

    That is an interrupt, else an `ActorFailed`, else another `RanvierError`, else the only error in the group, else the
    group.
    """
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        elif not isinstance(error, trio.Cancelled):
            leaves.append(error)
    for kind in (KeyboardInterrupt, ActorFailed, RanvierError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0] if len(leaves) == 1 else group
