"""Read what happened to a run, from its log: actors that were lost and replaced, alarms, refusals."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec

SHOWN = 16
WORDS = ("what", "error", "why")
"""Fields of an entry that say what happened, in this order of preference."""
MOST_WORDS = 500


class Events:
    """Hold the last warnings and errors of a run's log."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "logs" / "supervisor.jsonl"
        self._at = 0
        self.last: deque[dict[str, Any]] = deque(maxlen=SHOWN)

    def look(self) -> None:
        """Read what was written since the last call. A log that was rotated is read from its beginning."""
        try:
            size = self._file.stat().st_size
            if size < self._at:
                self._at = 0
            with self._file.open("rb") as file:
                file.seek(self._at)
                data = file.read(size - self._at)
        except OSError:  # it is being rotated; the next look finds it
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            if b'"level": "warning"' in line or b'"level": "error"' in line:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
        except (ValueError, RecursionError):  # not the log's own line
            return
        words = next((entry[name] for name in WORDS if entry.get(name)), "")
        seconds = sum(entry.get(name, 0.0) for name in ("fence_s", "load_s", "link_s"))
        self.last.append({
            "at": str(entry.get("timestamp", "")), "event": str(entry.get("event", ""))[:100],
            "actor": str(entry.get("actor", ""))[:200], "words": str(words)[:MOST_WORDS],
            **({"seconds": seconds} if entry.get("event") == "replaced" else {}),
        })  # fmt: skip
