"""What supervisor and hosts say to each other: a kind and its fields, msgpack, checked field by field.

It has sockets of its own, so data never delays it. Nothing here trusts the other side: an unknown kind, a missing or
ill-typed field is a `ProtocolError`.
"""

from __future__ import annotations

from typing import Any

import msgpack

from ranvier.transport.errors import ProtocolError

MAX_BYTES = 16 << 20

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    # host -> supervisor
    "state": {"state": str, "why": str},
    "progress": {"share": float},
    "ready": {"address": str, "capacity_tokens": (int, type(None)), "held_bytes": int},
    "heartbeat": {"steps": int, "stepping_s": float, "queued": int, "counters": dict},
    "opened": {"session": int, "epoch": int},
    "session_failed": {"session": int, "epoch": int, "error": str, "traceback": str},
    "refused": {"what": str},
    "failed": {"error": str, "traceback": str},
    # supervisor -> host
    "connect": {"peers": dict},
    "open": {"info": dict},
    "close": {"session": int},
    "stop": {},
}


def encode(kind: str, fields: dict[str, Any]) -> bytes:
    data: bytes = msgpack.packb((kind, fields))
    return data


def decode(data: bytes | memoryview) -> tuple[str, dict[str, Any]]:
    """Kind and fields.

    Raises:
        ProtocolError: anything is not as `FIELDS` says.
    """
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"control: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        message = msgpack.unpackb(
            data, max_str_len=MAX_BYTES, max_bin_len=0, max_array_len=1 << 22, max_map_len=4096, max_ext_len=0
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"control: expected msgpack, got {len(data)} bytes that are not ({error})") from None
    if not isinstance(message, list) or len(message) != 2 or not isinstance(message[1], dict):
        raise ProtocolError("control: expected [kind, fields]")
    kind, fields = message
    expected = FIELDS.get(kind) if isinstance(kind, str) else None
    if expected is None:
        raise ProtocolError(f"control: unknown kind {kind!r:.80}")
    if fields.keys() != expected.keys():
        raise ProtocolError(f"control {kind}: expected the fields {sorted(expected)}, got {sorted(map(str, fields))}")
    for name, types in expected.items():
        if not isinstance(fields[name], types):
            raise ProtocolError(f"control {kind}: {name}: expected {types}, got {type(fields[name]).__name__}")
    return kind, fields
