"""Turn prompts into token ids in a separate process (text_child.py).

The template and the tokenizer's patterns are untrusted. Either may compute forever, or take all memory, within one call
into C that nothing in its process can interrupt. So they run where they can be killed, and only the current request
fails.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import msgspec

from ranvier.actors.errors import CheckpointError, describe
from ranvier.transport.format.errors import ResourceError

from ..file.errors import RequestError
from .printable import printable
from .text_child import LENGTH, Chat, Ids, Load, Ready, Refused, Rendered, Reply, Text, to_bytes
from .text_codec import PLAIN, ChatOptions, TextCodec

LIMIT_S = 1.0
LETTERS_PER_S = 200_000
"""Characters of a prompt per extra second of time. SmolLM2's tokenizer encodes about three million per second."""
START_LIMIT_S = 60.0
_reply = msgspec.msgpack.Decoder(Reply)


class TextProcess:
    """Run one checkpoint's template and tokenizer.

    Threads may share it: their requests wait for each other. Call `close` at the end.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._load = Load(
            codec.tokenizer.to_str(),
            codec.chat_template,
            codec.bos_token,
            codec.eos_token,
            dict(codec.special),
            dict(codec.templates),
            codec.tokenizer.encode_special_tokens,
        )
        self._one_at_a_time = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = self._closed = False

    def start(self) -> None:
        """Start the process if it is not running. This does not wait until it is ready.

        Raises:
            ResourceError: the process cannot be started.
        """
        if self._process is not None:
            return
        command = [sys.executable, "-P", "-m", "ranvier.graph.sessions.text_child"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(f"the process for prompts cannot be started: {error}") from None
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stderr.fileno(), False)
        self._is_ready = False
        # in a thread: a tokenizer is larger than a pipe's buffer, and the child reads only once Python has started
        threading.Thread(target=_load, args=(self._process.stdin, self._load), daemon=True).start()

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN) -> list[int]:
        """Return the token ids of a chat, open for the answer.

        Raises:
            CheckpointError: the template or the tokenizer is wrong, refuses the messages, or takes too long.
            ResourceError: the process cannot be started, or this object is closed.
        """
        reply = self._chat(messages, options, encode=True)
        return reply.ids if isinstance(reply, Ids) else []

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN) -> str:
        """Return the text of a chat. Errors are those of `chat_ids`."""
        reply = self._chat(messages, options, encode=False)
        return reply.text if isinstance(reply, Rendered) else ""

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a raw prompt, with the model's special tokens around it. Errors are those of `chat_ids`."""
        limit_s = LIMIT_S + len(text) / LETTERS_PER_S
        reply = self._ask(Text(text, _whole(limit_s), special), limit_s, "tokenizer")
        return reply.ids if isinstance(reply, Ids) else []

    def _chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, *, encode: bool) -> Reply:
        data = [messages, options.tools, options.documents, options.arguments]
        limit_s = LIMIT_S + _letters(data) / LETTERS_PER_S
        request = Chat(
            [dict(message) for message in messages],
            _whole(limit_s),
            encode,
            options.tools,
            options.documents,
            options.template,
            dict(options.arguments),
        )
        return self._ask(request, limit_s, "chat template")

    def _ask(self, request: Chat | Text, limit_s: float, what: str) -> Reply:
        data = _to_bytes(request)
        with self._one_at_a_time:
            if self._closed:
                raise ResourceError("the process for prompts has ended with its run")
            self.start()
            process = self._process
            assert process is not None
            try:
                if not self._is_ready:
                    ready = _receive(process.stdout, START_LIMIT_S)
                    if isinstance(ready, Refused):
                        raise CheckpointError(ready.why)
                    self._is_ready = isinstance(ready, Ready)
                _last_words(process.stderr)  # discard the output of earlier requests
                _send(process.stdin, data, limit_s)
                reply = _receive(process.stdout, limit_s)
            except TimeoutError:
                self._kill()
                raise CheckpointError(f"{what}: took over {limit_s:.0f} s and was stopped") from None
            except (OSError, EOFError, ValueError, msgspec.MsgspecError):
                # the process ended, was closed meanwhile, or sent an invalid message
                last_words = _last_words(process.stderr)
                self._kill()
                if self._closed:
                    raise ResourceError("the process for prompts has ended with its run") from None
                raise CheckpointError(f"{what}: its process has ended, out of time or memory{last_words}") from None
            except CheckpointError:
                self._kill()
                raise
            if isinstance(reply, Refused):
                raise CheckpointError(reply.why)
            return reply

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):  # unsent bytes are no longer needed
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """End the process. A request that waits for it ends with `ResourceError`. Idempotent."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # wakes the thread that waits for a reply
        with self._one_at_a_time:
            self._kill()


def _whole(seconds: float) -> int:
    return int(seconds) + 1


def _letters(value: Any) -> int:
    """Return how many characters all strings in a value have."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_letters(each) for each in value.values())
    return sum(_letters(each) for each in value) if isinstance(value, list | tuple) else 0


def _load(pipe: IO[bytes], load: Load) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process has ended; the thread that waits for a reply sees that
        _send(pipe, to_bytes(load), START_LIMIT_S)


def _send(pipe: IO[bytes] | None, data: bytes, limit_s: float) -> None:
    """Send one message to the process.

    Raises:
        TimeoutError: the process did not read it in time.
        OSError, ValueError: the process has ended, or the pipe is closed.
    """
    assert pipe is not None
    left = memoryview(LENGTH.pack(len(data)) + data)
    until_s = time.monotonic() + limit_s
    while left:
        _wait(pipe, select.POLLOUT, until_s)
        with contextlib.suppress(BlockingIOError):
            left = left[os.write(pipe.fileno(), left) :]


def _wait(pipe: IO[bytes], event: int, until_s: float) -> None:
    poll = select.poll()  # select() accepts no descriptor over 1023
    poll.register(pipe.fileno(), event)
    if not poll.poll(max(0.0, until_s - time.monotonic()) * 1000):
        raise TimeoutError


def _last_words(pipe: IO[bytes] | None) -> str:
    """Return the last line on the process's standard error, as a hint to why it ended."""
    assert pipe is not None
    try:
        said = os.read(pipe.fileno(), 1 << 16).decode(errors="replace").strip()
    except (OSError, ValueError):  # there is no output, or the pipe is closed
        return ""
    return f" ({printable(said.splitlines()[-1])[:300]})" if said else ""


def _to_bytes(request: Chat | Text) -> bytes:
    try:
        return to_bytes(request)
    except UnicodeEncodeError:
        raise RequestError("prompt: expected text, got lone surrogates; decode the bytes first") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"prompt: expected messages of plain data, as in JSON: {describe(error)}") from None


def _receive(pipe: IO[bytes] | None, limit_s: float) -> Reply:
    """Receive one message from the process.

    Raises:
        TimeoutError: no whole message came in time.
        EOFError: the process has ended.
    """
    assert pipe is not None
    until_s = time.monotonic() + limit_s
    data, size = bytearray(), LENGTH.size
    while len(data) < size:
        _wait(pipe, select.POLLIN, until_s)
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            raise EOFError
        data += part
        if len(data) >= LENGTH.size:
            size = LENGTH.size + LENGTH.unpack_from(data)[0]
    reply: Reply = _reply.decode(data[LENGTH.size :])
    return reply
