"""Make the ids that an answer shows."""

from __future__ import annotations

import hashlib


class Ids:
    """Make ids that follow from the request's id: an answer that is made again has the same ones."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._count = 0

    def new(self, prefix: str) -> str:
        """Return the next id."""
        self._count += 1
        return prefix + hashlib.blake2b(f"{self._request_id} {self._count}".encode(), digest_size=12).hexdigest()
