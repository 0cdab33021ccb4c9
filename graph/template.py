"""A chat's messages to text, by the template that a checkpoint brings: code of a stranger's, so in a sandbox.

jinja2's immutable sandbox refuses attributes that lead out (CVE-2024-34359 was a loader without it) and bounds ranges; on
top of it the length of the text, the memory and the time are bounded.
"""

from __future__ import annotations

import ctypes
import json
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ranvier.actors.errors import CheckpointError

MAX_TEMPLATE_BYTES = 1 << 18
MAX_TEXT_BYTES = 1 << 22
TIME_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 256 << 20


def render(template: str, messages: Sequence[dict[str, str]], bos_token: str, eos_token: str) -> str:
    """The prompt for `messages` (`role` and `content`), open for the assistant's answer.

    Raises:
        CheckpointError: the template is wrong, refuses the messages, or tries what a template must not.
    """
    if len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"chat template: expected at most {MAX_TEMPLATE_BYTES} letters, got {len(template)}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _tojson
    try:
        with _TimeLimit(), _MemoryLimit():
            parts, size = [], 0
            compiled = environment.from_string(template)
            for part in compiled.generate(
                messages=list(messages), add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
            ):
                size += len(part)
                if size > MAX_TEXT_BYTES:
                    raise CheckpointError(f"chat template: made over {MAX_TEXT_BYTES} letters")
                parts.append(part)
            return "".join(parts)
    except _TooLong:
        raise CheckpointError(f"chat template: took over {TIME_LIMIT_S:.0f} s") from None
    except SecurityError as error:
        raise CheckpointError(f"chat template: tried what a template must not: {error}") from None
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # not jinja2's own, which escapes for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _TooLong(BaseException):
    """Raised into the thread that renders."""


class _TimeLimit:
    """Ends the code within after a second, in whatever thread it runs: a timer raises `_TooLong` there."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._active, self._fired = True, False
        self._timer = threading.Timer(TIME_LIMIT_S, self._fire)
        self._timer.daemon = True
        self._timer.start()

    def _fire(self) -> None:
        with self._lock:
            if self._active:
                self._fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_TooLong))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active = False
        self._timer.cancel()
        if self._fired:
            for _turn in range(10_000):  # let it be raised here, if it was not yet, and not somewhere later
                pass


class _MemoryLimit:
    """Lets the process grow by so much and no more while a template runs: a string that doubles itself forty times is
    one operation each time, which no clock interrupts."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + MEMORY_LIMIT_BYTES
        if self._before[0] == resource.RLIM_INFINITY or limit < self._before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)
