"""A run's log: JSON lines in its folder and, where somebody wants to see it, on standard error as JSON or for people."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import structlog

JSON, CONSOLE = "json", "console"


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
        print(self._render(logger, method, dict(event)), file=sys.stderr, flush=True)
        return event
