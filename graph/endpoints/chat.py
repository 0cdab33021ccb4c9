"""Answer /v1/chat/completions: from its body to a prompt, and from tokens to chunks and choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..bridge.bridge import Ended
from ..bridge.problems import Problem
from ..sessions.generation import Token
from . import schemas
from .answers import Choices
from .bodies import (
    ChatBody,
    FunctionTool,
    Message,
    NamedFunction,
    NamedTool,
    ObjectFormat,
    OtherPart,
    RefusalPart,
    SchemaFormat,
    TextPart,
)
from .tool_calls import Arguments, Begun, Calls, Family, pieces
from .wording import Wording


def messages_of(given: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as chat templates take them: texts as one string, arguments of calls as objects.

    Raises:
        Problem: a message holds an image, a sound or a file.
    """
    made = []
    for number, message in enumerate(given):
        role = "system" if message.role == "developer" else message.role
        one: dict[str, Any] = {"role": role, "content": _text(message, f"messages[{number}].content")}
        if message.role == "function":  # its older name
            one["role"] = "tool"
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(message, name) is not None:
                one[name] = getattr(message, name)
        calls = [(call.id, call.function) for call in message.tool_calls or ()]
        if message.function_call is not None:
            calls.append(("", message.function_call))
        if calls:
            one["tool_calls"] = [
                {"id": name, "type": "function",
                 "function": {"name": function.name, "arguments": _object(function.arguments)}}
                for name, function in calls
            ]  # fmt: skip
        made.append(one)
    return made


def _text(message: Message, path: str) -> str:
    if isinstance(message.content, str) or message.content is None:
        return message.content or message.refusal or ""
    check_parts(message.content, path)
    return "".join(
        part.text if isinstance(part, TextPart) else part.refusal
        for part in message.content
        if isinstance(part, TextPart | RefusalPart)
    )


def check_parts(parts: Sequence[object], path: str) -> None:
    """Check that the parts of a content are text.

    Raises:
        Problem: one is an image, a sound or a file.
    """
    other = next((part for part in parts if isinstance(part, OtherPart)), None)
    if other is not None:
        raise Problem(
            400, f"{path}: expected parts of text, got {other.type}; the model takes text only", param=path,
            code="unsupported_content",
        )  # fmt: skip


def _object(arguments: str) -> Any:
    """Return the arguments of a call as an object if they are JSON, else as they are."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def functions_of(body: ChatBody) -> list[FunctionTool]:
    """Return the functions that the model may call, also those of the older field `functions`."""
    return [tool.function for tool in body.tools or ()] + list(body.functions or ())


def choice_of(body: ChatBody) -> object:
    """Return the choice among the tools, also that of the older field `function_call`."""
    return body.function_call if body.tool_choice is None and body.functions else body.tool_choice


def tools_of(functions: Sequence[FunctionTool], choice: object) -> list[dict[str, Any]] | None:
    """Return functions in the form that templates expect; None if there are none, or the choice is "none"."""
    if choice == "none" or not functions:
        return None
    return [
        {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"strict", "type"})}
        for each in functions
    ]


def forced_calls(body: ChatBody) -> bool:
    """Return whether the answer must be a call of a tool."""
    return (
        body.tool_choice == "required"
        or isinstance(body.tool_choice, NamedTool)
        or isinstance(body.function_call, NamedFunction)
    )


def grammar_of(body: ChatBody, family: Family) -> dict[str, Any] | None:
    """Return the grammar that the body's `response_format` or `tool_choice` asks for; None: none.

    Raises:
        Problem: a schema is missing, or a tool is not there.
    """
    if forced_calls(body):
        chosen = next(
            (each for each in (body.tool_choice, body.function_call) if each and not isinstance(each, str)), None
        )
        name = chosen.function.name if isinstance(chosen, NamedTool) else chosen.name if chosen is not None else None
        return schemas.of_calls(functions_of(body), name, family)
    wanted = body.response_format
    if isinstance(wanted, ObjectFormat):
        return {"json": {"type": "object"}}
    if isinstance(wanted, SchemaFormat):
        return schemas.of_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")
    return None


def check(body: ChatBody) -> None:
    """Refuse what cannot be done, instead of answering something else.

    Raises:
        Problem: the body asks for it.
    """
    refused = {
        "modalities": body.modalities is not None and body.modalities != ["text"],
        "audio": body.audio is not None,
        "web_search_options": body.web_search_options is not None,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise Problem(400, f"{name}: this value is not supported here", param=name, code="unsupported_value")
    if forced_calls(body) and not (body.tools or body.functions):
        raise Problem(400, "tool_choice: there are no tools", param="tool_choice", code="invalid_value")
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")


class Chat(Choices):
    """Make the choices of a chat, or its chunks."""

    object = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, *given: Any, body: ChatBody, family: Family | None = None, **options: Any) -> None:
        super().__init__(*given, **options)
        self._older = not body.tools and bool(body.functions)
        """Calls are shown in the older form, `function_call`."""
        several = body.parallel_tool_calls is not False and not self._older
        self._calls = [
            Calls(family, self.ids, several=several) if family is not None else None for _ in range(self.count)
        ]
        self._made: list[list[dict[str, Any]]] = [[] for _ in range(self.count)]
        self._contents = [""] * self.count

    def begin(self) -> list[Any]:
        return [self._chunk_of(index, {"role": "assistant", "content": ""}) for index in range(self.count)]

    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of an answer. Return the chunks that follow: of text, of calls, of the end."""
        calls = self._calls[index]
        if isinstance(event, Ended):
            found = calls.rest() if calls is not None else []
            made = [self._chunk_of(index, delta) for delta in self._deltas(index, found)]
            called = "function_call" if self._older else "tool_calls"
            reason = called if calls is not None and calls.count and event.reason == "stop" else event.reason
            self.reasons[index] = reason
            return [*made, self._chunk_of(index, {}, reason=reason)]
        self.note(index, event)
        deltas = self._deltas(index, pieces(calls, self.wording, event))
        if not deltas and event.logprob is not None:
            deltas = [{"content": ""}]
        logprobs = [self._logprobs([event]), *[None] * (len(deltas) - 1)]
        return [self._chunk_of(index, delta, logprobs=each) for delta, each in zip(deltas, logprobs, strict=False)]

    def _deltas(self, index: int, found: Sequence[str | Begun | Arguments]) -> list[dict[str, Any]]:
        """Return the changes of a message, and make them in the whole one."""
        deltas: list[dict[str, Any]] = []
        made = self._made[index]
        for each in found:
            match each:
                case str():
                    self._contents[index] += each
                    deltas.append({"content": each})
                case Begun(number, name, name_of_call):
                    function = {"name": name, "arguments": ""}
                    made.append({"id": name_of_call, "type": "function", "function": function})
                    shown = {"tool_calls": [{"index": number, **made[-1], "function": dict(function)}]}
                    deltas.append({"function_call": dict(function)} if self._older else shown)
                case Arguments(number, piece):
                    made[number]["function"]["arguments"] += piece
                    shown = {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}
                    deltas.append({"function_call": {"arguments": piece}} if self._older else shown)
        return deltas

    def _chunk_of(self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> Any:
        return self.chunk_with([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def choice(self, index: int) -> dict[str, Any]:
        """Return a whole choice."""
        calls = self._made[index]
        content = self._contents[index] or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls and self._older:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return {
            "index": index, "message": message, "logprobs": self._logprobs(self.tokens[index]),
            "finish_reason": self.reasons[index],
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token]) -> Any:
        if self.logprobs is None:
            return None
        return {"content": [entry(self.wording, token) for token in tokens], "refusal": None}


def entry(wording: Wording, token: Token) -> dict[str, Any]:
    """Return a token with its log-probability, and the likeliest ones."""
    own = _one(wording, token.id, token.logprob or 0.0)
    return {**own, "top_logprobs": [_one(wording, each, value) for each, value in token.top_logprobs.items()]}


def _one(wording: Wording, token: int, logprob: float) -> dict[str, Any]:
    return {"token": wording.text(token), "logprob": max(logprob, -9999.0), "bytes": list(wording.to_bytes(token))}
