"""Send commands to a run in progress, over the control socket in its folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ranvier.actors.protocol.control_protocol import Request, Wrong, decode, encode, for_client
from ranvier.transport.format.errors import RanvierError
from ranvier.transport.wires.zeromq import ask as ask_wire

from ..file.errors import RequestError


class NoAnswer(RanvierError):
    """Report that a run did not answer a command in time."""


def ask(run_dir: Path, request: Request, timeout_s: float) -> str:
    """Send a command to a run, and return what the run did, in words.

    Raises:
        RequestError: there is no such run in progress, or it refuses.
        NoAnswer: the run did not answer in time.
    """
    socket = (run_dir / "sockets").resolve() / "supervisor"
    if not (run_dir / "plan.json").is_file():
        raise RequestError(f"{run_dir}: no run folder; expected plan.json in it")
    if not socket.exists():
        raise RequestError(f"{run_dir}: this run is over")
    me = f"client-{os.getpid()}-{secrets.token_hex(4)}"
    answer = ask_wire(me, f"ipc://{socket}", encode(request), timeout_s)
    if answer is None:
        raise NoAnswer(
            f"{run_dir}: no answer to {request.kind} within {timeout_s:g} s; the command may still be in progress"
        )
    said = decode(bytes(answer), for_client)
    if isinstance(said, Wrong):
        raise RequestError(said.what)
    return said.what
