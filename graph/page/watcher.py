"""Watch one run's trace in a process of its own: `python -m ranvier.graph.page.watcher RUN`.

It answers questions, a line of JSON each, with a line each, until its input ends. It is a process, because reading a trace in a
thread would take the interpreter from the run's gateway, and it runs only on idle cores.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ranvier.actors.errors import describe
from ranvier.transport.system import resident_bytes, run_on_idle_cores

from ..trace.trace_lines import TraceError
from .events import Events
from .watch import NotYet, Watch


class Question(msgspec.Struct, frozen=True):
    """Ask the watcher. `what` names what is asked, and the other fields are its arguments."""

    what: str
    pids: tuple[int, ...] = ()
    edge: int = 0
    actor: str = ""
    sessions: tuple[int, ...] = ()
    position: int = 0


class Watcher:
    """Answer questions about a run."""

    def __init__(self, run_dir: Path) -> None:
        self._watch, self._events = Watch(run_dir), Events(run_dir)

    def answer(self, line: bytes) -> dict[str, Any]:
        """Return `{"answer": …}`, or `{"error": words, "later": …}` if the trace does not say, or not yet."""
        asked = msgspec.json.decode(line, type=Question)
        try:
            self._watch.look()
            if asked.what != "frame":
                return {"answer": _ANSWERS[asked.what](self._watch, asked)}
            self._events.look()
            resident = {pid: resident_bytes(pid) for pid in asked.pids}
            return {"answer": {**self._watch.frame(), "resident_bytes": resident, "events": list(self._events.last)}}
        except TraceError as error:
            return {"error": str(error), "later": isinstance(error, NotYet)}
        except Exception as error:  # a damaged trace; the next question may be about another part of it
            return {"error": f"the trace cannot be read: {describe(error)}"}


_ANSWERS: Mapping[str, Callable[[Watch, Question], Any]] = {
    "edge": lambda watch, asked: watch.edge(asked.edge),
    "steps": lambda watch, asked: watch.steps(asked.actor),
    "token": lambda watch, asked: watch.path(asked.sessions, asked.position),
}


def serve(run_dir: Path, asked: BinaryIO, answered: BinaryIO) -> None:
    """Answer questions until there are no more.

    Raises:
        TraceError: the folder is no run's.
    """
    watcher = Watcher(run_dir)
    for line in asked:
        answered.write(msgspec.json.encode(watcher.answer(line)) + b"\n")
        answered.flush()


if __name__ == "__main__":
    run_on_idle_cores()
    gc.disable()  # records hold no cycles, and walking through those that are kept took a fifth of the time
    serve(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
