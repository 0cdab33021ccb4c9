"""Run a checkpoint's chat template and tokenizer on prompts, in a process that may be killed at any time.

The other end is text_process.py. Messages on standard input and output are msgpack, each after its length in four
bytes, least significant first.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from ranvier.transport import system

LENGTH = struct.Struct("<I")
MEMORY_LIMIT_BYTES = 256 << 20
"""Memory that the process may take in addition while it works."""


class Load(msgspec.Struct, tag="load", frozen=True):
    """Load the tokenizer and the template that all later requests use. `tokenizer` is the library's JSON."""

    tokenizer: str
    chat_template: str | None
    bos_token: str
    eos_token: str
    special: dict[str, str]
    templates: dict[str, str]
    splits_special: bool
    """True if special tokens in a text are split like other text (`split_special_tokens`)."""


class Chat(msgspec.Struct, tag="chat", frozen=True):
    """Render these messages to text, or with `encode` to token ids, within `seconds` of processor time.

    The last four fields are those of `ChatOptions`.
    """

    messages: Sequence[dict[str, Any]]
    seconds: int
    encode: bool
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    template: str | None = None
    arguments: dict[str, Any] = {}


class Text(msgspec.Struct, tag="text", frozen=True):
    """Return the token ids of a raw prompt, within `seconds` of processor time."""

    text: str
    seconds: int
    special: bool = True
    """The model's special tokens are added around the text, unless this is false."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Report that `Load` is done."""


class Ids(msgspec.Struct, tag="ids", frozen=True):
    ids: list[int]


class Rendered(msgspec.Struct, tag="rendered", frozen=True):
    text: str


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Report that the template or the tokenizer failed, and why."""

    why: str


Request = Load | Chat | Text
Reply = Ready | Ids | Rendered | Refused
to_bytes = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(Request)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    incoming, outgoing = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
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
    system.limit_own_memory(MEMORY_LIMIT_BYTES)
    system.limit(resource.RLIMIT_FSIZE, 0)
    system.limit(resource.RLIMIT_CORE, 0)


def _loaded(request: Load) -> tuple[Worker | None, Reply]:
    from tokenizers import Tokenizer

    from .text_codec import TextCodec

    try:
        tokenizer = Tokenizer.from_str(request.tokenizer)
        tokenizer.encode_special_tokens = request.splits_special
    except BaseException as error:  # the library's panics do not derive from Exception
        return None, Refused(f"tokenizer: {type(error).__name__}: {error}")
    codec = TextCodec(
        tokenizer, request.chat_template, request.bos_token, request.eos_token, request.special, request.templates
    )
    return Worker(codec), Ready()


class Worker:
    """Answer requests with one checkpoint's tokenizer and template."""

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def answer(self, request: Chat | Text) -> Reply:
        """Return the reply to a request. An error becomes a `Refused` reply; nothing is raised.

        The operating system kills the process if it takes too long, even if the parent is gone.
        """
        from ranvier.actors.errors import CheckpointError, describe

        from .text_codec import ChatOptions

        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime) + 1 + request.seconds
        system.limit(resource.RLIMIT_CPU, limit)
        try:
            if isinstance(request, Text):
                return Ids(self._codec.encode(request.text, special=request.special))
            options = ChatOptions(request.tools, request.documents, request.template, request.arguments)
            if request.encode:
                return Ids(self._codec.chat_ids(request.messages, options))
            return Rendered(self._codec.render(request.messages, options))
        except CheckpointError as error:
            return Refused(str(error))
        except BaseException as error:  # the tokenizer's panics do not derive from Exception
            return Refused(f"tokenizer: {describe(error)}")


if __name__ == "__main__":
    sys.exit(main())
