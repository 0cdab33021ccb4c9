"""The run folder: all that is needed to understand a run later.

<runs>/<graph>-<date>-<time>-<letters>/      mode 0700
    graph.yaml   the file as it was          plan.json    what was made of it
    run.json     versions, times, outcome    logs/        a file a process, JSON lines and standard error
    trace/       a file an actor             sockets/     only while it runs
    clocks.json  how far the hosts' clocks are ahead of the run's own, and how well that is known
    record/      what was kept of edges, a folder an actor (actors/recording.py)
    state/       what actors have saved for those in their places, if any can
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ranvier.actors.clocks import Clock
from ranvier.transport.endpoint import MAX_IPC_PATH_BYTES

from .checked import Graph
from .errors import GraphError, Position, Problem
from .plan import Plan

DEFAULT_ROOT = Path("ranvier-runs")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    @property
    def sockets(self) -> Path:
        return self.path / "sockets"

    def outcome(self, **fields: Any) -> None:
        """Add to `run.json`, replacing it whole."""
        file = self.path / "run.json"
        told = json.loads(file.read_text()) if file.exists() else {}
        part = file.with_suffix(".part")
        part.write_text(json.dumps({**told, **fields}, indent=1) + "\n")
        part.replace(file)

    def clocks(self, clocks: Mapping[str, Clock]) -> None:
        """Write how far the hosts' clocks are ahead, for whoever reads the trace."""
        told = {host: clock.estimates for host, clock in clocks.items()}
        part = self.path / "clocks.part"
        with contextlib.suppress(OSError):  # the disk is full: what was written before stands
            part.write_text(json.dumps(told))
            part.replace(self.path / "clocks.json")

    def close(self) -> None:
        """Remove what only a live run needs."""
        shutil.rmtree(self.sockets, ignore_errors=True)


def create(plan: Plan, root: Path) -> RunFolder:
    """Make the folder of a new run under `root`.

    Raises:
        GraphError: the path is too long for sockets; says what to do.
    """
    graph = plan.graph
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = root.absolute() / f"{graph.name}-{stamp}-{secrets.token_hex(2)}"
    _check_length(graph, path)
    folder = RunFolder(path)
    root.mkdir(parents=True, exist_ok=True)
    for part in (path, folder.logs, folder.trace, folder.sockets):
        part.mkdir(mode=0o700)
    shutil.copyfile(graph.path, path / "graph.yaml")
    (path / "plan.json").write_text(json.dumps({**plan.to_plain(), "expanded": graph.expanded()}, indent=1) + "\n")
    folder.outcome(
        graph=graph.name,
        hash=plan.hash,
        started=datetime.datetime.now(datetime.UTC).isoformat(),
        monotonic_ns=time.monotonic_ns(),
        machine={"system": platform.platform(), "cores": os.cpu_count()},
        versions=versions(),
    )
    return folder


def versions() -> Mapping[str, str]:
    names = ("ranvier", "torch", "pyzmq", "msgspec", "trio")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _check_length(graph: Graph, path: Path) -> None:
    longest = max([*(f"{actor}.9999" for actor in graph.actors), "supervisor"], key=len)
    socket = path / "sockets" / f"{longest}.c.lock"
    size = len(os.fsencode(socket.with_suffix("")))
    if size > MAX_IPC_PATH_BYTES:
        what = (
            f"the socket {socket.with_suffix('')} would have a path of {size} bytes, at most {MAX_IPC_PATH_BYTES} are "
            "possible; give a shorter folder with --runs"
        )
        raise GraphError(str(graph.path), [Problem(what, Position(1, 1))])
