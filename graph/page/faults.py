"""Kill, stop and slow actors and cut links of a run on purpose, by buttons (`ranvier serve --allow-faults`)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ranvier.transport.system import ProcessHandle

from ..bridge.problems import Problem, unknown
from .sources import Served

_SIGNALS: Mapping[str, tuple[signal.Signals, str]] = {
    "kill": (signal.SIGKILL, "was killed"), "stop": (signal.SIGSTOP, "is stopped"), "continue": (signal.SIGCONT, "continues"),
}  # fmt: skip
SLOW_S = 8.0
SLOW_BY_S = 0.02
"""A slowed process runs for this long, and then stands still for as long."""
MOST_CUT_S = 30.0


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe what a button does: to an actor (`name.replica`), or to the edge between two actors."""

    what: Literal["kill", "stop", "continue", "slow", "cut"]
    model: str | None = None
    actor: str = ""
    source: str = ""
    target: str = ""
    seconds: Annotated[float, Meta(gt=0, le=MOST_CUT_S)] = 3.0


class Faults:
    """Carry out faults. All methods belong to the server's thread."""

    def __init__(self) -> None:
        self._slow: dict[int, asyncio.Task[None]] = {}

    async def carry_out(self, fault: Fault, source: Served) -> str:
        """Do it, and return what was done, in words.

        Raises:
            Problem: there is no such actor or edge now.
        """
        if fault.what == "cut":
            return await self._cut(fault, source)
        pid, process = await _opened(fault.actor, source)
        with contextlib.ExitStack() as stack:
            stack.callback(process.close)
            if fault.what == "slow":
                if pid not in self._slow:
                    self._slow[pid] = asyncio.create_task(self._slowed(pid, process.copy()))
                return f"{fault.actor} runs at half its speed for {SLOW_S:g} s"
            number, done = _SIGNALS[fault.what]
            process.send(number)
            return f"{fault.actor} (process {pid}) {done}"

    async def _slowed(self, pid: int, process: ProcessHandle) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + SLOW_S
        try:
            while loop.time() < until_s and process.send(signal.SIGSTOP):
                await asyncio.sleep(SLOW_BY_S)
                process.send(signal.SIGCONT)
                await asyncio.sleep(SLOW_BY_S)
        finally:
            process.send(signal.SIGCONT)
            process.close()
            del self._slow[pid]

    async def _cut(self, fault: Fault, source: Served) -> str:
        run = source.bridge.run

        async def cut() -> int:
            return run.cut(fault.source, fault.target, fault.seconds)

        links = await source.bridge.call(cut)
        if not links:
            raise Problem(
                400, f"no link from {fault.source!r:.60} to {fault.target!r:.60} crosses a network; only tcp can be cut",
                code="invalid_value",
            )  # fmt: skip
        return f"{fault.source} to {fault.target}: cut for {fault.seconds:g} s"


async def _opened(actor: str, source: Served) -> tuple[int, ProcessHandle]:
    """Return the process id of an actor that is not lost, and a handle that stands for this process alone.

    Raises:
        Problem: there is none now.
    """
    for host in (await source.state())["hosts"]:
        if host["label"] == actor and host["pid"] and host["lost"] is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                return host["pid"], ProcessHandle(host["pid"])
    raise unknown(f"no process runs {actor!r:.60} now; wait until it is back")
