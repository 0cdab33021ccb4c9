"""Answer /v1/responses without state: input items become a chat, and the answer becomes output items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..bridge.bridge import Ended
from ..bridge.problems import Problem
from ..bridge.stream_log import Origin
from ..sessions.generation import Token
from . import schemas
from .answers import Answers
from .bodies import (
    Body,
    FunctionCall,
    FunctionTool,
    JsonSchema,
    Message,
    ObjectFormat,
    OtherPart,
    Sampled,
    TextFormat,
    ToolCall,
)
from .chat import check_parts, entry
from .tool_calls import Arguments, Begun, Calls, Family, pieces
from .wording import Wording


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Any = None


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


class NamedFlatTool(Body):
    type: Literal["function"]
    name: str


class FlatSchema(JsonSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: Annotated[TextFormat | ObjectFormat | FlatSchema, Field(discriminator="type")] | None = None
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
    tool_choice: Literal["none", "auto", "required"] | NamedFlatTool | None = None
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
    moderation: Any = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
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
    check_parts(item.content, path)
    return "".join(part.text for part in item.content if isinstance(part, InputText))


def check(body: ResponseBody) -> None:
    """Refuse what cannot be done, instead of answering something else.

    Raises:
        Problem: the body asks for it.
    """
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise Problem(400, "tool_choice: there are no tools", param="tool_choice", code="invalid_value")


def grammar_of(body: ResponseBody, family: Family) -> dict[str, Any] | None:
    """Return the grammar that the body's `text.format` or `tool_choice` asks for; None: none.

    Raises:
        Problem: a schema is missing, or a tool is not there.
    """
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        return schemas.of_calls(body.tools or (), choice.name if isinstance(choice, NamedFlatTool) else None, family)
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, ObjectFormat):
        return {"json": {"type": "object"}}
    if isinstance(wanted, FlatSchema):
        return schemas.of_schema(wanted.schema_, "text.format.schema")
    return None


class Response(Answers):
    """Make the object of a response, or its events: its output is messages and calls of functions, in their order."""

    object = "response"
    prefix = "resp_"
    named = True

    def __init__(
        self, origin: Origin, body: ResponseBody, model: str, wording: Wording, prompt_tokens: int, family: Family | None
    ) -> None:  # fmt: skip
        super().__init__(origin, model, wording, prompt_tokens, 1, logprobs=body.top_logprobs)
        self._body = body
        self._calls = (
            Calls(family, self.ids, several=body.parallel_tool_calls is not False) if family is not None else None
        )
        self._output: list[dict[str, Any]] = []
        """The items; the last one is open until another begins, or the answer ends."""
        self._number = -1

    def begin(self) -> list[Any]:
        return [
            self._event("response.created", response=self._whole("in_progress", [])),
            self._event("response.in_progress", response=self._whole("in_progress", [])),
        ]

    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of the answer. Return the events that follow from it."""
        if isinstance(event, Ended):
            self.reasons[0] = event.reason
            made = self._found(self._calls.rest() if self._calls is not None else [], [])
            if not self._output:
                made += self._begun(self._message())
            last = "response.completed" if event.reason == "stop" else "response.incomplete"
            return [*made, *self._over(self._status), self._event(last, response=self.whole())]
        self.note(index, event)
        found = pieces(self._calls, self.wording, event)
        if not found and event.logprob is not None:
            found = [""]
        return self._found(found, [] if self.logprobs is None else [entry(self.wording, event)])

    def _found(self, found: Sequence[str | Begun | Arguments], logprobs: list[Any]) -> list[Any]:
        """Return the events of what was found in the answer. `logprobs` are those of the token that brought it."""
        made: list[Any] = []
        for each in found:
            match each:
                case str():
                    if not self._output or self._output[-1]["type"] != "message":
                        made += [*self._over("completed"), *self._begun(self._message())]
                    part = self._output[-1]["content"][0]
                    part["text"] += each
                    part["logprobs"] += logprobs
                    made.append(self._event("response.output_text.delta", **self._at, delta=each, logprobs=logprobs))
                    logprobs = []
                case Begun(_, name, call_id):
                    item = {"id": self.ids.new("fc_"), "type": "function_call", "status": "in_progress",
                            "name": name, "call_id": call_id, "arguments": ""}  # fmt: skip
                    made += [*self._over("completed"), *self._begun(item)]
                case Arguments(_, piece):
                    self._output[-1]["arguments"] += piece
                    made.append(self._event("response.function_call_arguments.delta", **self._at, delta=piece))
        return made

    def _message(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {
            "id": self.ids.new("msg_"), "type": "message", "status": "in_progress", "role": "assistant",
            "content": [part],
        }  # fmt: skip

    @property
    def _at(self) -> dict[str, Any]:
        """Return the place of the last item, as the events about it name it."""
        item = self._output[-1]
        at = {"output_index": len(self._output) - 1, "item_id": item["id"]}
        return {**at, "content_index": 0} if item["type"] == "message" else at

    def _begun(self, item: dict[str, Any]) -> list[Any]:
        """Begin an item."""
        self._output.append(item)
        if item["type"] != "message":
            return [self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))]
        added = self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item={**item, "content": []}
        )
        part = {**item["content"][0], "logprobs": []}
        return [added, self._event("response.content_part.added", **self._at, part=part)]

    def _over(self, status: str) -> list[Any]:
        """End the last item, if there is one."""
        if not self._output:
            return []
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            made = [
                self._event("response.output_text.done", **self._at, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", **self._at, part=part),
            ]
        else:
            made = [
                self._event(
                    "response.function_call_arguments.done", **self._at, name=item["name"], arguments=item["arguments"]
                )
            ]
        return [*made, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    @property
    def _status(self) -> str:
        return "completed" if self.reasons[0] == "stop" else "incomplete"

    def error(self, body: dict[str, Any]) -> list[Any]:
        """Return the events of an error that ends the answer."""
        told = body["error"]
        shown = {"code": told["code"], "message": told["message"]}
        failed = {**self._whole("failed", self._output), "error": shown}
        return [
            self._event("error", **shown, param=told["param"]), self._event("response.failed", response=failed)
        ]  # fmt: skip

    def whole(self) -> dict[str, Any]:
        return self._whole(self._status, self._output)

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
            "output": output, "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": body.temperature,
            "text": {"format": self._format}, "tool_choice": self._choice, "tools": self._tools,
            "top_p": body.top_p, "truncation": "disabled",
            "usage": {
                "input_tokens": spent["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": spent["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": spent["total_tokens"],
            } if over else None,
            "user": body.user, "metadata": body.metadata or {},
        }  # fmt: skip

    @property
    def _format(self) -> dict[str, Any]:
        wanted = self._body.text.format if self._body.text is not None else None
        return wanted.model_dump(by_alias=True, exclude_none=True) if wanted is not None else {"type": "text"}

    @property
    def _choice(self) -> Any:
        choice = self._body.tool_choice
        return choice.model_dump() if isinstance(choice, NamedFlatTool) else choice or "auto"

    @property
    def _tools(self) -> list[Any]:
        return [{"strict": None, "parameters": None, **tool.model_dump()} for tool in self._body.tools or ()]
