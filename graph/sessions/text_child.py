"""The process that makes token ids of prompts: it runs the chat template and the tokenizer that a checkpoint brings, and may
be killed at any time (text_process.py, its other end).

Messages on standard input and output are msgpack, each behind its length in four bytes.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

LENGTH = struct.Struct("<I")
MEMORY_LIMIT_BYTES = 256 << 20
"""How much the process may grow by while it works."""


class Load(msgspec.Struct, tag="load", frozen=True):
    """What all requests are about. The tokenizer is its library's JSON."""

    tokenizer: str
    chat_template: str | None
    bos_token: str
    eos_token: str
    add_bos: int | None


class Chat(msgspec.Struct, tag="chat", frozen=True):
    """Render these messages; `encode`: return token ids, not the text. The template may use `seconds` of processor time."""

    messages: Sequence[dict[str, Any]]
    seconds: int
    encode: bool


class Text(msgspec.Struct, tag="text", frozen=True):
    """Return the token ids of a raw prompt."""

    text: str
    seconds: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """What was to be loaded is."""


class Ids(msgspec.Struct, tag="ids", frozen=True):
    ids: list[int]


class Rendered(msgspec.Struct, tag="rendered", frozen=True):
    text: str


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The template or the tokenizer did not do it."""

    why: str


Request = Load | Chat | Text
Reply = Ready | Ids | Rendered | Refused
to_bytes = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(Request)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    incoming, outgoing = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not get among the answers
    worker: Worker | None = None
    while (head := incoming.read(LENGTH.size)) and len(head) == LENGTH.size:
        request = _request.decode(incoming.read(*LENGTH.unpack(head)))
        if isinstance(request, Load):
            worker, reply = _loaded(request)
            _limit_memory()
        else:
            assert worker is not None
            reply = worker.answer(request)
        data = to_bytes(reply)
        outgoing.write(LENGTH.pack(len(data)) + data)
        outgoing.flush()
    return 0


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, now + MEMORY_LIMIT_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(resource_: int, value: int) -> None:
    """Set a limit, which is none beyond what the process may have in any case."""
    most = resource.getrlimit(resource_)[1]
    resource.setrlimit(resource_, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _loaded(request: Load) -> tuple[Worker | None, Reply]:
    from tokenizers import Tokenizer

    from .tokenizer import TextCodec

    try:
        tokenizer = Tokenizer.from_str(request.tokenizer)
    except BaseException as error:  # the library's panics are no Exception
        return None, Refused(f"tokenizer: {type(error).__name__}: {error}")
    template, bos, eos = request.chat_template, request.bos_token, request.eos_token
    return Worker(TextCodec(tokenizer, template, bos, eos, request.add_bos)), Ready()


class Worker:
    """Answers requests with one checkpoint's tokenizer and template."""

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def answer(self, request: Chat | Text) -> Reply:
        """Never raises: what goes wrong is the answer. The system ends the process if it takes too long, parent or none."""
        from ranvier.actors.errors import CheckpointError, told

        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime) + 1 + request.seconds
        _limit(resource.RLIMIT_CPU, limit)
        try:
            if isinstance(request, Text):
                return Ids(self._codec.encode(request.text, special=True))
            if request.encode:
                return Ids(self._codec.chat_ids(request.messages))
            return Rendered(self._codec.render(request.messages))
        except CheckpointError as error:
            return Refused(str(error))
        except BaseException as error:  # the tokenizer's panics are no Exception
            return Refused(f"tokenizer: {told(error)}")


if __name__ == "__main__":
    sys.exit(main())
