"""Ask the hosts of a run why they wait (`actors/host/situation.py`), one question at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import trio

from ..protocol.control_protocol import Command, Explain, Situation


class Questions:
    """Ask all hosts the same question, and collect their answers.

    Args:
        send: sends a command to hosts by their identities.
    """

    def __init__(self, send: Callable[[Iterable[str], Command], None]) -> None:
        self._send = send
        self._asking = trio.Lock()
        self._asked = 0
        self._answers: dict[str, Mapping[str, Any]] = {}
        self._expected = 0
        self._complete = trio.Event()

    async def ask(self, hosts: Sequence[str], within_s: float) -> Mapping[str, Mapping[str, Any] | None]:
        """Return the answers by identity; None for a host that does not answer within `within_s` seconds."""
        async with self._asking:
            self._asked += 1
            self._answers, self._expected, self._complete = {}, len(hosts), trio.Event()
            for host in hosts:
                self._send([host], Explain(self._asked))
            if hosts:
                with trio.move_on_after(within_s):
                    await self._complete.wait()
            return {host: self._answers.get(host) for host in hosts}

    def on_answer(self, host: str, message: Situation) -> None:
        """Take an answer. One that belongs to an earlier question is dropped."""
        if message.asked != self._asked:
            return
        self._answers[host] = message.situation
        if len(self._answers) >= self._expected:
            self._complete.set()
