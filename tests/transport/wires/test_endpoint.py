"""Accept valid addresses, and refuse invalid ones with the reason."""

from __future__ import annotations

import pytest

from ranvier.transport.format.errors import AddressError
from ranvier.transport.wires.endpoint import MAX_PATH_BYTES, parse


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("ipc:///run/x", "ipc:///run/x"),
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://127.0.0.1", "tcp://127.0.0.1:0"),
        ("tcp://localhost:80", "tcp://127.0.0.1:80"),
        ("tcp://[::1]:80", "tcp://[::1]:80"),
        ("inproc://x", "inproc://x"),
        ("ipc:///" + "x" * (MAX_PATH_BYTES - 1), "ipc:///" + "x" * (MAX_PATH_BYTES - 1)),
    ],
)
def test_good(text: str, made: str) -> None:
    """Parse a valid address."""
    assert str(parse(text)) == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp://*:5555", "every interface"),
        ("tcp://0.0.0.0:5555", "every interface"),
        ("tcp://[::]:5555", "every interface"),
        ("tcp://10.0.0.1:5555", "needs CURVE"),
        ("tcp://example:5555", "is not an address"),
        ("tcp://127.0.0.1:99999", "expected a port"),
        ("tcp://127.0.0.1:x", "expected a port"),
        ("ipc://@abstract", "no permissions"),
        ("ipc://relative", "absolute path"),
        ("ipc:///" + "x" * MAX_PATH_BYTES, f"{MAX_PATH_BYTES + 1} bytes long, at most {MAX_PATH_BYTES}"),
        ("ipc://", "expected ipc"),
        ("pgm://x", "unknown scheme"),
        ("/run/x", "expected ipc"),
    ],
)
def test_refused(text: str, words: str) -> None:
    """Refuse an address with the reason.

    One case is the binding of every interface (case 30)."""
    with pytest.raises(AddressError, match=words):
        parse(text)
