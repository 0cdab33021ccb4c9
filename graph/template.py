"""A chat's messages to text, by the template that a checkpoint brings: code of a stranger's, so in a sandbox.

jinja2's immutable sandbox refuses attributes that lead out (CVE-2024-34359 was a loader without it); on top of it ranges
and the length of the text are bounded, and a template that takes longer than a second is ended.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ranvier.actors.errors import CheckpointError

MAX_TEMPLATE_BYTES = 1 << 18
MAX_TEXT_BYTES = 1 << 22
TIME_LIMIT_S = 1.0


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
        with _TimeLimit():
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
    except SecurityError as error:
        raise CheckpointError(f"chat template: tried what a template must not: {error}") from None
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # not jinja2's own, which escapes for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _TimeLimit:
    """Ends the code within after a second. Only the main thread can be interrupted; elsewhere there is no limit of
    time, but those of the sandbox hold."""

    def __enter__(self) -> None:
        self._armed = threading.current_thread() is threading.main_thread()
        if self._armed:
            self._before = signal.signal(signal.SIGALRM, self._over)
            signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)

    def __exit__(self, *_: object) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _over(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise CheckpointError(f"chat template: took over {TIME_LIMIT_S:.0f} s")
