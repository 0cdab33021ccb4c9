"""Read the last seconds of a run's trace while it is written, without asking the run for anything."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

from ranvier.actors.trace.trace_file import DONE, PART, SENT

from .summary import percentiles
from .trace_lines import DoneLine, Lines, SentLine, read_plan

WINDOW_S = 5.0
"""Seconds before the newest record that rates and percentiles cover. Records are written some 0.4 s after their
event."""

AT_FIRST = 1 << 20
"""Bytes at the end of each file that the first read covers: what a busy process writes in several seconds. Reading the
whole trace of a run that has lasted for hours would take minutes."""


class Tail:
    """Hold the records of a run folder that are not older than the window."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._edges: list[str] = []
        self._lines = Lines(run_dir, AT_FIRST)
        self._done: deque[tuple[str, DoneLine]] = deque()
        self._sent: deque[SentLine] = deque()
        self._newest_ns = 0

    def read(self) -> None:
        """Read what was written since the last call. Leave a line that is not complete yet for the next call."""
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
        """Return for each actor: tokens and steps per second, tokens per step, the share of time in which it computed."""
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
        """Return for each edge: messages and bytes per second, microseconds on the wire and waiting for credit."""
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
        """Return how many seconds the records cover: the window, or less if the run has just begun."""
        begun = min((record.started_ns for _, record in self._done), default=self._newest_ns)
        return max((self._newest_ns - begun) / 1e9, 1e-3)
