"""Decide whose request begins next: a bounded queue, in which the keys of the server take turns. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Hold requests that wait for room, in a queue for each key.

    The keys take turns, so that a client with a thousand requests does not keep others waiting. `most` bounds the requests of
    all keys together, and half of that the requests of one key while others wait, too.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, key: str, request: T) -> bool:
        """Add a request at the end of its key's queue. Return False if there is no room."""
        own = len(self._waiting.get(key, ()))
        if self._count >= self._most or (len(self._waiting) > 1 and own >= max(1, self._most // 2)):
            return False
        self._waiting.setdefault(key, deque()).append(request)
        self._count += 1
        return True

    def next(self) -> T | None:
        """Return the request whose turn it is, without taking it."""
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def take(self) -> T:
        """Take the request whose turn it is. Its key goes to the end of the row of keys."""
        key, own = next(iter(self._waiting.items()))
        request = own.popleft()
        self._count -= 1
        if own:
            self._waiting.move_to_end(key)
        else:
            del self._waiting[key]
        return request

    def drop(self, key: str, request: T) -> bool:
        """Remove a request that nobody wants any more. Return whether it was there."""
        own = self._waiting.get(key)
        if own is None or request not in own:
            return False
        own.remove(request)
        self._count -= 1
        if not own:
            del self._waiting[key]
        return True
