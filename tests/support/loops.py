"""Run asyncio in tests whose own thread may have a loop already: that of a browser's driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def by_asyncio(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return the result of `main`, run under asyncio in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(main())).result()
