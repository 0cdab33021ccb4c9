"""Translate errors into answers of HTTP, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from ranvier.actors.errors import ActorFailed, CheckpointError, Expired, Overloaded
from ranvier.transport.format.errors import LinkClosed, RanvierError

from ..file.errors import RequestError, TooLong

LOG = logging.getLogger("ranvier.serve")
STOPPING = "stopping"
"""Code of the error that ends answers when the server stops."""
INVALID, DENIED, MISSING, BUSY, FAILED = (
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error",
)  # fmt: skip


class Problem(Exception):
    """Refuse a request, or end an answer, with a status of HTTP and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, kind: str = INVALID, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self.body)


def busy(message: str, retry_after_s: float) -> Problem:
    """Return the answer to a request that there is no room for now."""
    return Problem(
        429, message, BUSY, code="rate_limit_exceeded", headers={"retry-after": str(max(1, math.ceil(retry_after_s)))}
    )


def unavailable(message: str, retry_after_s: float) -> Problem:
    """Return the answer to a request while something that it needs is not there."""
    return Problem(
        503, message, FAILED, code="unavailable", headers={"retry-after": str(max(1, math.ceil(retry_after_s)))}
    )


def unknown(message: str, *, param: str | None = None, code: str = "not_found") -> Problem:
    """Return the answer to a request for something that is not there."""
    return Problem(404, message, MISSING, param=param, code=code)


def problem_of(error: BaseException) -> Problem:
    """Return what a client is told about an error. Tracebacks of actors stay in the run's log, those of ours go to LOG."""
    match error:
        case Problem():
            return error
        case TooLong():
            return Problem(400, str(error), param="messages", code="context_length_exceeded")
        case RequestError() | CheckpointError():
            return Problem(400, str(error), code="invalid_value")
        case Overloaded():
            return busy(str(error), 1.0)
        case Expired():
            again = {"x-should-retry": "false"}  # OpenAI's clients would ask twice more
            return Problem(408, str(error), "timeout_error", code="deadline_exceeded", headers=again)
        case ActorFailed():
            return Problem(503, f"actor {error.actor}: {error.what}", FAILED, code="actor_failed")
        case LinkClosed():
            return Problem(503, "the server is stopping", FAILED, code=STOPPING, headers={"retry-after": "5"})
        case RanvierError():
            return Problem(500, str(error), FAILED, code="internal_error")
        case _:
            LOG.error("an answer failed", exc_info=error)
            return Problem(500, "the server failed; its log has more", FAILED, code="internal_error")
