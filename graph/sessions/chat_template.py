"""Render a chat's messages to text with the checkpoint's template, as transformers' `apply_chat_template` does.

The template is untrusted, so it runs in a sandbox. jinja2's immutable sandbox refuses attributes that lead out of it
(CVE-2024-34359 was a loader without it) and bounds ranges. It cannot stop one long operation, nor bound memory:
`x ** 10 ** 9` is a single call in C. So a run renders in a separate process, which can be killed (text_process.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ranvier.actors.errors import CheckpointError

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_TEXT_CHARACTERS = 1 << 22
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients and templates pass the reasoning of an earlier answer."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    bos_token: str = "",
    eos_token: str = "",
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt for `messages` (`role` and `content`), open for the assistant's answer.

    Args:
        template: the template's text.
        messages: the chat. A key whose value is None counts as left out.
        bos_token: the token that begins a text; "" if the model has none. `eos_token` is the one that ends it.
        tools: JSON schemas of functions that the model may call.
        documents: documents with `title` and `text` that the answer may use.
        arguments: further variables of the template, such as `enable_thinking`. They replace all others.

    Raises:
        CheckpointError: the template is wrong, refuses the messages, or tries what the sandbox forbids.
    """
    variables = {
        **{name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token},
        "messages": [_message(message) for message in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": True,
        **(arguments or {}),
    }
    try:
        parts, size = [], 0
        for part in _compiled(template).generate(variables):
            size += len(part)
            if size > MAX_TEXT_CHARACTERS:
                raise CheckpointError(
                    f"chat template: expected at most {MAX_TEXT_CHARACTERS} characters of text, got more"
                )
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
        SyntaxError,
    ) as error:
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from None


def check(template: str) -> None:
    """Check the syntax of a template. It is not compiled: that computes its constants, which may take for ever.

    Raises:
        CheckpointError: the syntax is wrong.
    """
    _check_length(template)
    try:
        _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template: line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it.

    Clients send `content: null` beside calls of tools, and many templates would print it. The reasoning of an earlier
    answer gets the names that templates read.
    """
    made = {key: value for key, value in message.items() if value is not None}
    reasoning = next((made[name] for name in REASONING if name in made), None)
    return made if reasoning is None else {"thinking": reasoning, **made, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """Accept `{% generation %}`, with which templates mark what an assistant wrote, for training."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """Offer `dict` to templates, without its other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Refuse names that begin with an underscore: none of them may lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}, which begins with an underscore")


@functools.lru_cache(maxsize=16)  # for SmolLM2's template, parsing takes 1.35 of 1.77 ms
def _compiled(template: str) -> jinja2.Template:
    _check_length(template)
    return _environment().from_string(template)


def _check_length(template: str) -> None:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise CheckpointError(
            f"chat template: expected at most {MAX_TEMPLATE_CHARACTERS} characters, got {len(template)}"
        )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    environment.filters["tojson"] = _tojson
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's built-in filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
