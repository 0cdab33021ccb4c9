"""Keep the changes that hold for all requests which are opened inside a `with run.patch(…)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from .ops import Op

_PATCHES: ContextVar[tuple[tuple[object, Op], ...]] = ContextVar("patches", default=())


def of(run: object) -> list[Op]:
    """Return the changes that hold here for the requests of a run, the outermost first."""
    return [op for owner, op in _PATCHES.get() if owner is run]


@contextmanager
def patched(run: object, ops: Sequence[Op]) -> Iterator[None]:
    """Add changes to the requests of a run that are opened in the block, in this thread or task and those it starts."""
    token = _PATCHES.set((*_PATCHES.get(), *((run, op) for op in ops)))
    try:
        yield
    finally:
        _PATCHES.reset(token)
