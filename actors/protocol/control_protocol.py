"""What supervisor and hosts say to each other: a kind and its fields, msgpack, checked field by field.

It has sockets of its own, so data never delays it. Nothing here trusts the other side: an unknown kind, a missing or
ill-typed field is a `ProtocolError`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ranvier.transport.format.errors import ProtocolError

MAX_BYTES = 16 << 20

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    # host -> supervisor
    "state": {"state": str, "why": str},
    "progress": {"share": float},
    "ready": {"address": str, "capacity_tokens": (int, type(None)), "held_bytes": int, "keeps": str},
    "heartbeat": {"steps": int, "stepping_s": float, "queued": int, "counters": dict},
    "counters": {"counters": dict},
    "linked": {"peer": str},
    "session_failed": {"session": int, "epoch": int, "error": str, "traceback": str},
    "refused": {"what": str},
    "alarm": {"edge": str, "session": int, "position": int, "share": float, "at_ns": int},
    "saved": {"round": int},
    "failed": {"error": str, "traceback": str},
    "situation": {"asked": int, "situation": dict},
    "time": {"asked_ns": int, "heard_ns": int, "told_ns": int},
    # supervisor -> host, to be obeyed by its step thread
    "connect": {"sent_ns": int, "peers": dict, "links": list, "instead_of": (str, type(None))},
    "open": {"sent_ns": int, "info": dict},
    "hold": {"sent_ns": int, "session": int},
    "close": {"sent_ns": int, "session": int},
    "link": {"sent_ns": int, "peer": str, "address": str, "links": list},
    "unlink": {"sent_ns": int, "peer": str},
    "stop": {"sent_ns": int},
    # supervisor -> host, answered at once by its control thread
    "explain": {"sent_ns": int, "asked": int},
    "what time": {"sent_ns": int},
    # a command of the user's, to a run, and its answer
    "scale": {"actor": str, "replicas": int},
    "why": {},
    "status": {},
    "done": {"what": str},
    "wrong": {"what": str},
}

COMMANDS = ("scale", "why", "status")
"""What a client may ask of a run."""

_decoder = msgspec.msgpack.Decoder(tuple[str, dict[str, Any]])


def encode(kind: str, fields: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode((kind, fields))


def decode(data: bytes | memoryview) -> tuple[str, dict[str, Any]]:
    """Kind and fields.

    Raises:
        ProtocolError: anything is not as `FIELDS` says.
    """
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"control: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        kind, fields = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"control: expected [kind, fields], got {len(data)} bytes that are not: {error}") from None
    expected = FIELDS.get(kind)
    if expected is None:
        raise ProtocolError(f"control: unknown kind {kind!r:.80}")
    if fields.keys() != expected.keys():
        raise ProtocolError(f"control {kind}: expected the fields {sorted(expected)}, got {sorted(fields)}")
    for name, types in expected.items():
        if not isinstance(fields[name], types):
            raise ProtocolError(f"control {kind}: {name}: expected {types}, got {type(fields[name]).__name__}")
    return kind, fields
