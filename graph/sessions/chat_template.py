"""Render a chat's messages to text with the checkpoint's template. The template is untrusted, so it runs in a sandbox.

jinja2's immutable sandbox refuses attributes that lead out of it (CVE-2024-34359 was a loader without it) and bounds
ranges. It cannot stop one long operation, nor bound memory: `x ** 10 ** 9` is a single call in C. So a run renders in a
separate process, which can be killed (text_process.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ranvier.actors.errors import CheckpointError

MAX_TEMPLATE_BYTES = 1 << 18
MAX_TEXT_BYTES = 1 << 22


def render(template: str, messages: Sequence[Mapping[str, Any]], bos_token: str, eos_token: str) -> str:
    """Return the prompt for `messages` (`role` and `content`), open for the assistant's answer.

    Raises:
        CheckpointError: the template is wrong, refuses the messages, or tries what the sandbox forbids.
    """
    try:
        parts, size = [], 0
        for part in _compiled(template).generate(
            messages=list(messages), add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
        ):
            size += len(part)
            if size > MAX_TEXT_BYTES:
                raise CheckpointError(f"chat template: expected at most {MAX_TEXT_BYTES} characters of text, got more")
            parts.append(part)
        return "".join(parts)
    except SecurityError as error:
        raise CheckpointError(f"chat template: the sandbox forbids this: {error}") from None
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        MemoryError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=16)  # for SmolLM2's template, parsing takes 1.35 of 1.77 ms
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"chat template: expected at most {MAX_TEMPLATE_BYTES} characters, got {len(template)}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's built-in filter escapes for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)
