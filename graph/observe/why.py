"""Find out why a live run waits: combine the hosts' own reports with what the machine knows about their processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from ranvier.actors.host import situation
from ranvier.actors.host.situation import STACK_LINES
from ranvier.actors.protocol.control_protocol import AskWhy, Done, Wrong
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.supervise.supervision import Watched
from ranvier.actors.supervise.supervisor import Supervisor
from ranvier.transport.system import process_state

from ..plan.plan import Plan
from ..sessions.gateway import Gateway
from ..sessions.stream import Stream
from .blame import Answer, AtGateway, Seen, explain

ANSWER_S = 0.5
"""Seconds after which a host counts as unable to answer. Its control thread answers at once, whatever the step does."""
LEAD_S, LOOK_S = 1.5, 0.25
"""Every LOOK_S seconds, `Why` explains the requests whose deadline is less than LEAD_S seconds away.

This comes before the deadline, because afterwards no process knows the request any more.
"""
LOOK_FROM_OUTSIDE_S = 0.8
APART_S = 0.2
"""Seconds between two observations. A state that both show is not momentary."""


class Why:
    """Explain why a run waits."""

    def __init__(self, plan: Plan, supervisor: Supervisor, run_dir: Path) -> None:
        self._plan, self._supervisor, self._run_dir = plan, supervisor, run_dir
        self._gateway: Gateway | None = None
        self._taken_from: Iterable[Stream] = ()
        self._asked_in, self._asked = trio.open_memory_channel[str](100)
        supervisor.on_request[AskWhy] = self._on_command

    def _on_command(self, client: str, _request: AskWhy) -> None:
        try:
            self._asked_in.send_nowait(client)
        except trio.WouldBlock:
            self._supervisor.answer(client, Wrong("too many questions at once; try later"))

    async def run(self) -> None:
        """Answer the clients of the control socket until cancelled."""
        async for client in self._asked:
            answer = await self.ask()
            self._supervisor.answer(client, Done(json.dumps({**answer.to_plain(), "text": str(answer)})))

    def watch(self, gateway: Gateway, taken_from: Iterable[Stream]) -> None:
        """Explain what the sessions of this gateway wait for, too.

        `taken_from` are the streams that clients take their answers from, also of sessions that are over.
        """
        self._gateway, self._taken_from = gateway, taken_from

    async def before_deadlines(self) -> None:
        """Explain requests shortly before their deadline, so that the error says who is to blame."""
        assert self._gateway is not None
        while True:
            await trio.sleep(LOOK_S)
            if near := self._gateway.nearly_due(time.monotonic_ns() + int(LEAD_S * 1e9)):
                answer = str(await self.ask())
                for stream in near:
                    stream.why = answer

    async def ask(self) -> Answer:
        """Return who waits for whom, and who is to blame. This takes about a second if a host does not answer."""
        untaken = self._untaken()
        before = await self._supervisor.situations(ANSWER_S)
        outside: dict[str, Sequence[str]] = {}
        async with trio.open_nursery() as nursery:
            for key, pid in self._supervisor.pids.items():
                if before.get(key) is None and process_state(pid) not in ("", "T", "Z"):
                    nursery.start_soon(_look_from_outside, outside, key, pid)
            await trio.sleep(APART_S)
            now = await self._supervisor.situations(ANSWER_S)
        seen = [
            self._seen(key, host, before.get(key), now.get(key), outside.get(key, ()))
            for key, host in self._supervisor.supervision.hosts.items()
            if not (host.spare or host.leaving)
        ]
        return explain(seen, self._at_gateway(untaken), self._feeds())

    def _at_gateway(self, untaken: Mapping[int, tuple[int, object]]) -> AtGateway:
        full = _is_full(self._run_dir)
        if self._gateway is None:
            return AtGateway([], disk_full=full)
        still = {
            session: count
            for session, (count, first) in self._untaken().items()
            if untaken.get(session, (0, None))[1] is first
        }
        lost: dict[str, list[int]] = {}
        for session, stream in self._gateway.streams.items():
            if stream.waits and stream.lost_actor:
                for replica in stream.replicas[stream.lost_actor]:
                    lost.setdefault(f"{stream.lost_actor}.{replica}", []).append(session)
        waiting = situation.credit(self._gateway.exchange, time.monotonic_ns())
        return AtGateway(list(self._gateway.streams), still, lost, waiting, full)

    def _untaken(self) -> dict[int, tuple[int, object]]:
        """Return the number of untaken answers and the first one, for each session that has any."""
        return {
            stream.info.session: (len(stream.events), stream.events[0]) for stream in self._taken_from if stream.events
        }

    def _seen(
        self, key: str, host: Watched, before: Mapping[str, Any] | None, current: Mapping[str, Any] | None,
        outside: Sequence[str],
    ) -> Seen:  # fmt: skip
        now_s, pid = time.monotonic(), self._supervisor.pids.get(key)
        return Seen(
            host.spec.label, pid, process_state(pid) if pid is not None else "", host.life.state.value, host.loaded,
            now_s - host.started_s, now_s - host.heard_s, str(host.lost.what) if host.lost is not None else None,
            current, before, outside,
        )  # fmt: skip

    def _feeds(self) -> dict[tuple[str, str], list[str]]:
        feeds: dict[tuple[str, str], list[str]] = {}
        for edge in self._plan.graph.edges:
            if edge.source != GATEWAY:
                feeds.setdefault((edge.target, edge.into), []).append(edge.source)
        return feeds


async def _look_from_outside(found: dict[str, Sequence[str]], key: str, pid: int) -> None:
    """Find the Python lines that a silent process executes, by py-spy if it is installed and permitted."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return
    # OSError: descriptors or memory have run out; then no lines are reported
    with contextlib.suppress(OSError), trio.move_on_after(LOOK_FROM_OUTSIDE_S):
        done = await trio.run_process(
            [command, "dump", "--nonblocking", "--pid", str(pid)], capture_stdout=True, capture_stderr=True, check=False
        )
        found[key] = main_thread(done.stdout.decode(errors="replace"), pid)


def main_thread(dump: str, pid: int) -> list[str]:
    """Return the lines of the main thread in the output of `py-spy dump`, the innermost last.

    This is the order of Python's tracebacks. The number of the main thread is the process id.
    """
    lines: list[str] = []
    taken = False
    for line in dump.splitlines():
        if line.startswith("Thread "):
            taken = line.split()[1] == str(pid)
        elif taken and line.strip():
            lines.append(line.strip())
    return lines[:STACK_LINES][::-1]


def _is_full(folder: Path) -> bool:
    try:
        return os.statvfs(folder).f_bavail == 0
    except OSError:
        return False
