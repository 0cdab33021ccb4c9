"""The last seconds of a run's trace, read as it is written: what anybody may look at without asking the run for anything."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

from ranvier.actors.trace.trace_file import DONE, PART, SENT

from .summary import percentiles
from .trace_lines import Done, Lines, Sent, read_plan

WINDOW_S = 5.0
"""Rates and percentiles are of so long before the newest record. Records come some 0.4 s after what they tell of."""

AT_FIRST = 1 << 20
"""So many bytes of each file are read at first: what a busy process writes in several seconds. All of a run that has gone on
for hours would take minutes."""


class Tail:
    """The records of a run folder that are not older than the window."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._edges: list[str] = []
        self._lines = Lines(run_dir, AT_FIRST)
        self._done: deque[tuple[str, Done]] = deque()
        self._sent: deque[Sent] = deque()
        self._newest_ns = 0

    def read(self) -> None:
        """Take in what has been written since. A line that is not whole yet is left for the next time."""
        if not self._edges:
            self._edges = [edge["name"] for edge in read_plan(self._run_dir)["edges"]]
        for actor, kind, record in self._lines.read((DONE, PART, SENT)):
            if kind in (DONE, PART):
                self._done.append((actor, record))
                self._newest_ns = max(self._newest_ns, record.finished_ns)
            elif kind == SENT:
                self._sent.append(record)
        since_ns = self._newest_ns - int(WINDOW_S * 1e9)
        self._done = deque(each for each in self._done if each[1].finished_ns >= since_ns)
        self._sent = deque(record for record in self._sent if record.sent_ns >= since_ns)

    def actors(self) -> dict[str, dict[str, Any]]:
        """Of each actor: tokens and steps a second, tokens a step, the share of time in which it computed."""
        steps: dict[str, dict[tuple[int, int], int]] = {}
        for actor, record in self._done:
            if record.batch:
                own = steps.setdefault(actor, {})
                key = record.started_ns, record.finished_ns
                own[key] = own.get(key, 0) + sum(row[3] for row in record.rows)
        span_s = self._span_s()
        return {
            actor: {
                "tokens_per_second": sum(own.values()) / span_s,
                "steps_per_second": len(own) / span_s,
                "tokens_a_step": percentiles(own.values()),
                "busy": min(sum(ended - began for began, ended in own) / 1e9 / span_s, 1.0),
            }
            for actor, own in steps.items()
        }

    def edges(self) -> list[dict[str, Any]]:
        """Of each edge: messages and bytes a second, microseconds on the wire and of waiting for credit."""
        span_s, nbytes = self._span_s(), Counter[int]()
        wire: dict[int, list[float]] = {}
        credit: dict[int, list[float]] = {}
        for _, record in self._done:
            wire.setdefault(record.edge, []).append((record.received_ns - record.sent_ns) / 1e3)
            nbytes[record.edge] += record.nbytes
        for sent in self._sent:
            credit.setdefault(sent.edge, []).append((sent.credit_ns - sent.ready_ns) / 1e3)
        return [
            {
                "edge": self._edges[edge] if edge < len(self._edges) else f"link {edge}",
                "messages_per_second": len(times) / span_s, "bytes_per_second": nbytes[edge] / span_s,
                "wire_us": percentiles(times), "credit_us": percentiles(credit.get(edge, [])),
            }
            for edge, times in sorted(wire.items())
        ]  # fmt: skip

    def _span_s(self) -> float:
        """How long the records that are there lie apart: the window, or less of a run that has just begun."""
        begun = min((record.started_ns for _, record in self._done), default=self._newest_ns)
        return max((self._newest_ns - begun) / 1e9, 1e-3)
