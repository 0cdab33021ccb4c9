"""Answer /v1/responses without state: input items become a chat, and the answer becomes output items."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..sessions.generation import Token
from .answers import Answers
from .bodies import Body, FunctionCall, FunctionTool, Message, OtherPart, Sampled, ToolCall
from .bridge import Ended
from .chat import entry
from .problems import Problem
from .wording import Wording


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | OtherPart, Field(discriminator="type")]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class FlatTool(FunctionTool):
    type: Literal["function"]


class PlainText(Body):
    type: Literal["text"]


class TextSettings(Body):
    format: PlainText | None = None
    verbosity: str | None = None


class ResponseBody(Body):
    """The body of /v1/responses."""

    model: str
    input: str | list[InputMessage | InputCall | InputOutput]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    text: TextSettings | None = None
    store: bool | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    # accepted and without effect here
    include: list[str] | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None


def sampled(body: ResponseBody) -> Sampled:
    """Return the fields that a request of any endpoint has."""
    return Sampled(model=body.model, temperature=body.temperature, top_p=body.top_p, stream=body.stream)


def messages_of(body: ResponseBody) -> list[Message]:
    """Return the input as the messages of a chat.

    Raises:
        Problem: an item holds an image or a file.
    """
    made: list[Message] = []
    if body.instructions:
        made.append(Message(role="system", content=body.instructions))
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    if not items:
        raise Problem(400, "input: expected text or at least one item", param="input", code="invalid_value")
    for number, item in enumerate(items):
        if isinstance(item, InputMessage):
            made.append(Message(role=item.role, content=_text(item, f"input[{number}].content")))
        elif isinstance(item, InputCall):
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            made.append(Message(role="assistant", tool_calls=[call]))
        else:
            made.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
    return made


def _text(item: InputMessage, path: str) -> str:
    if isinstance(item.content, str):
        return item.content
    other = next((part for part in item.content if isinstance(part, OtherPart)), None)
    if other is not None:
        raise Problem(
            400, f"{path}: expected parts of text, got {other.type}; the model takes text only", param=path,
            code="unsupported_content",
        )  # fmt: skip
    return "".join(part.text for part in item.content if isinstance(part, InputText))


def tools_of(body: ResponseBody) -> list[dict[str, Any]] | None:
    """Return the tools that the template is given, in the form that templates expect; None: none."""
    if body.tool_choice == "none" or not body.tools:
        return None
    return [
        {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"strict", "type"})}
        for each in body.tools
    ]


class Response(Answers):
    """Make the object of a response, or its events."""

    object = "response"
    prefix = "resp_"
    named = True

    def __init__(self, body: ResponseBody, model: str, wording: Wording, prompt_tokens: int) -> None:
        super().__init__(model, wording, prompt_tokens, 1, logprobs=body.top_logprobs)
        self._body = body
        self._message = f"msg_{secrets.token_hex(12)}"
        self._number = -1

    def begin(self) -> list[Any]:
        at = {"output_index": 0, "item_id": self._message, "content_index": 0}
        return [
            self._event("response.created", response=self._whole("in_progress", [])),
            self._event("response.in_progress", response=self._whole("in_progress", [])),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **at, part=self._part("", [])),
        ]

    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of the answer. Return the events that follow from it."""
        at = {"output_index": 0, "item_id": self._message, "content_index": 0}
        if not isinstance(event, Ended):
            self.note(index, event)
            if not event.text and event.logprob is None:
                return []
            return [self._event("response.output_text.delta", **at, delta=event.text, logprobs=self._entries([event]))]
        self.reasons[0] = event.reason
        text, logprobs = self.texts[0], self._entries(self.tokens[0])
        last = "response.completed" if event.reason == "stop" else "response.incomplete"
        return [
            self._event("response.output_text.done", **at, text=text, logprobs=logprobs),
            self._event("response.content_part.done", **at, part=self._part(text, logprobs)),
            self._event("response.output_item.done", output_index=0, item=self._items()[0]),
            self._event(last, response=self.whole()),
        ]

    def whole(self) -> dict[str, Any]:
        return self._whole("completed" if self.reasons[0] == "stop" else "incomplete", self._items())

    def _items(self) -> list[Any]:
        status = "completed" if self.reasons[0] == "stop" else "incomplete"
        return [self._item(status, [self._part(self.texts[0], self._entries(self.tokens[0]))])]

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {"id": self._message, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _entries(self, tokens: Sequence[Token]) -> list[Any]:
        return [] if self.logprobs is None else [entry(self.wording, token) for token in tokens]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _whole(self, status: str, output: list[Any]) -> dict[str, Any]:
        body, over = self._body, status in ("completed", "incomplete")
        spent: Mapping[str, Any] = self.usage
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": False,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.model,
            "output": output, "parallel_tool_calls": bool(body.parallel_tool_calls), "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": body.temperature,
            "text": {"format": {"type": "text"}}, "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()], "top_p": body.top_p, "truncation": "disabled",
            "usage": {
                "input_tokens": spent["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": spent["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": spent["total_tokens"],
            } if over else None,
            "user": body.user, "metadata": body.metadata or {},
        }  # fmt: skip
