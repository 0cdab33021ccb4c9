"""A run's log: JSON lines in its folder and, where somebody wants to see it, on standard error as JSON or for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import structlog

JSON, CONSOLE = "json", "console"
MOST_BYTES = 16 << 20
"""Of one file. Then it becomes the one before, `supervisor.1.jsonl`, in whose place that was is gone."""


class LogFile:
    """`supervisor.jsonl` of a run, which structlog writes to. A full disk costs lines, counted in `lost`, never the run.

    Raises:
        OSError: it cannot be made, before the run begins.
    """

    def __init__(self, folder: Path) -> None:
        self.lost = 0
        self._path, self._before = folder / "supervisor.jsonl", folder / "supervisor.1.jsonl"
        self._file = self._path.open("wb", buffering=0)
        self._bytes = 0

    def write(self, line: str) -> None:
        data = line.encode(errors="replace")
        if self.lost:
            data = (
                json.dumps({"event": "lines were lost", "level": "warning", "lines": self.lost}).encode() + b"\n" + data
            )
        try:
            if self._bytes + len(data) > MOST_BYTES:
                self._rotate()
            written = self._file.write(data)
        except (OSError, ValueError):  # the disk is full, or the folder is gone
            written = 0
        if written == len(data):
            self._bytes += len(data)
            self.lost = 0
            return
        self.lost += 1
        with contextlib.suppress(OSError, ValueError):  # the beginning of a line must not stay
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)

    def _rotate(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.replace(self._before)
        self._file = self._path.open("wb", buffering=0)
        self._bytes = 0

    def flush(self) -> None:
        """Every line is written at once."""

    def close(self) -> None:
        self._file.close()


def logger(file: Any, shown: str | None = None) -> structlog.typing.FilteringBoundLogger:
    """Writes JSON lines to a file. `shown`: JSON or CONSOLE, the form in which standard error gets them, too."""
    import structlog  # 0.1 s, and the hosts' process is on its way meanwhile

    made: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([_Shown(shown)] if shown is not None else []),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    return made


class _Shown:
    """A structlog processor that passes on what it prints.

    Raises:
        ValueError: there is no such form.
    """

    def __init__(self, form: str) -> None:
        import structlog

        if form not in (JSON, CONSOLE):
            raise ValueError(f"log: expected {JSON} or {CONSOLE}, got {form!r}")
        self._render: Any = (
            structlog.processors.JSONRenderer()
            if form == JSON
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        )

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            print(self._render(logger, method, dict(event)), file=sys.stderr, flush=True)
        return event
