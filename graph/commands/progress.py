"""Show progress: one line that updates itself on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LOOK_S = 0.25


class Bar:
    """Show progress, unless `quiet`. Use it in a `with`, and call `done` before anything else is printed."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._terminal = stream.isatty() and not quiet
        self._task: TaskID | None = None
        self._progress: Progress | None = None

    def show(self, stage: str, share: float) -> None:
        """Show the name of a phase, and the share of it that is done (0 to 1)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=stage, completed=share)

    def follow(self, stage: str, look: Callable[[], float | None]) -> None:
        """Show a phase under trio until `done`. `look` returns its share a few times per second, or None: do not show it."""
        import trio

        async def following() -> None:
            while self._progress is not None:
                share = look()
                if share is not None:
                    self.show(stage, share)
                await trio.sleep(LOOK_S)

        if self._progress is not None:
            trio.lowlevel.spawn_system_task(following)

    def done(self) -> None:
        """Clear the progress line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Bar:
        if self._terminal:
            columns = (TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._progress.add_task("starting", total=1.0)
            self._progress.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.done()
