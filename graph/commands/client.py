"""Commands to a run that goes on, by the control socket in its folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from ranvier.actors.protocol.control_protocol import decode, encode
from ranvier.transport.format.errors import RanvierError
from ranvier.transport.wires.zeromq import ask as ask_wire

from ..file.errors import RequestError


class NoAnswer(RanvierError):
    """The run did not say in time what came of a command."""


def ask(run_dir: Path, kind: str, timeout_s: float, **fields: Any) -> str:
    """Have a run do something: what it did, in words.

    Raises:
        RequestError: no such run goes on, or it will not.
        NoAnswer: it did not answer in time.
    """
    socket = (run_dir / "sockets").resolve() / "supervisor"
    if not (run_dir / "plan.json").is_file():
        raise RequestError(f"{run_dir}: no run folder; expected plan.json in it")
    if not socket.exists():
        raise RequestError(f"{run_dir}: this run is over")
    me = f"client-{os.getpid()}-{secrets.token_hex(4)}"
    answer = ask_wire(me, f"ipc://{socket}", encode(kind, fields), timeout_s)
    if answer is None:
        raise NoAnswer(f"{run_dir}: no answer to {kind} within {timeout_s:g} s; it may still be going on")
    what, said = decode(bytes(answer))
    if what != "done":
        raise RequestError(str(said.get("what", what)))
    return str(said["what"])
