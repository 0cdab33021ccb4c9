"""Write a run's log: JSON lines in its folder and, on request, JSON or readable text on standard error."""

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
"""Size limit of one file. A full file is renamed to `supervisor.1.jsonl`, which replaces the previous one."""


class LogFile:
    """Write `supervisor.jsonl` of a run, for structlog.

    On a full disk lines are lost, but the run continues. `lost` counts them until the next line is written, which
    reports the count.

    Raises:
        OSError: the file cannot be created, before the run begins.
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
        with contextlib.suppress(OSError, ValueError):  # a partly written line must not stay
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)

    def _rotate(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.replace(self._before)
        self._file = self._path.open("wb", buffering=0)
        self._bytes = 0

    def flush(self) -> None:
        """Do nothing: every line is written at once."""

    def close(self) -> None:
        self._file.close()


def logger(file: Any, shown: str | None = None) -> structlog.typing.FilteringBoundLogger:
    """Return a logger that writes JSON lines to a file.

    `shown` is JSON or CONSOLE: also write each line to standard error, in that form.

    Raises:
        ValueError: `shown` is another form.
    """
    import structlog  # takes 0.1 s, while the process that hosts are forked from starts

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
    """Print each event to standard error, as a structlog processor, and pass it on.

    Raises:
        ValueError: the form is neither JSON nor CONSOLE.
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
        with contextlib.suppress(OSError, ValueError):  # the reader of standard error is gone
            print(self._render(logger, method, dict(event)), file=sys.stderr, flush=True)
        return event
