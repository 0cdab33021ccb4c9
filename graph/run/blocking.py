"""Run a graph from code that does not await, such as scripts and notebooks.

The calls are those of `Run`, but they block. trio runs in a separate thread.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import trio

from ..file.checked import Graph
from ..sessions.generation import Generation, Token
from . import run_folder
from .launch import Progress, launch
from .run import Run

if TYPE_CHECKING:
    import torch


class BlockingRun:
    """Offer a run to code that does not await. Several threads may use it at once.

    `start` makes it. Use it in a `with`.
    """

    def __init__(self, graph: Graph, runs: Path | str, progress: Progress, resume: Path | None = None) -> None:
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._main, args=(graph, runs, progress, resume), name="ranvier-run", daemon=True
        )
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:  # Ctrl-C while it starts
            self.close()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def _main(self, graph: Graph, runs: Path | str, progress: Progress, resume: Path | None) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            with trio.CancelScope() as self._scope:
                async with launch(graph, runs=runs, progress=progress, resume=resume) as self._run:
                    self._started.set()
                    await self._stop.wait()

        try:
            trio.run(main)
        except BaseException as error:
            self._error = error
        self._started.set()

    @property
    def run(self) -> Run:
        """Return the run itself, for attributes that need no waiting (`dir`, `plan`, `codec`)."""
        return self._run

    def generate(self, prompt: Any, **options: Any) -> Iterator[Token]:
        """Generate tokens, as `Run.generate` does. Errors of a wrong request are raised at the first token."""

        async def begin() -> Generation:
            return self._run.generate(prompt, **options)

        return self._tokens(begin)

    def _tokens(self, begin: Callable[[], Awaitable[Generation]]) -> Iterator[Token]:
        async def following() -> Token | None:
            return await anext(generation, None)

        generation = trio.from_thread.run(begin, trio_token=self._token)
        try:
            while (token := trio.from_thread.run(following, trio_token=self._token)) is not None:
                yield token
        finally:
            trio.from_thread.run_sync(generation.close, trio_token=self._token)

    def resume(self, request_id: str, after: int | None = None) -> Iterator[Token]:
        """Resume a request, as `Run.resume` does."""

        async def begin() -> Generation:
            return self._run.resume(request_id, after)

        return self._tokens(begin)

    def call(self, traceparent: str | None = None, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Call the graph, as `Run.call` does."""

        async def call() -> dict[str, torch.Tensor]:
            return await self._run.call(traceparent, **inputs)

        return trio.from_thread.run(call, trio_token=self._token)

    def scale(self, actor: str, replicas: int) -> str:
        """Scale an actor, as `Run.scale` does."""
        return trio.from_thread.run(self._run.scale, actor, replicas, trio_token=self._token)

    def close(self) -> None:
        """End the run and its thread. Idempotent."""
        if self._thread.is_alive():
            try:
                if hasattr(self, "_run"):
                    trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
                elif hasattr(self, "_scope"):
                    trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
            except trio.RunFinishedError:
                pass
            self._thread.join()

    def __enter__(self) -> BlockingRun:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self._error is not None:
            raise self._error


def start(
    graph: Graph,
    *,
    runs: Path | str = run_folder.DEFAULT_ROOT,
    progress: Progress = lambda _what, _share: None,
    resume: Path | None = None,
) -> BlockingRun:
    """Start a graph and wait until it is ready. `launch` describes the arguments and errors."""
    return BlockingRun(graph, runs, progress, resume)
