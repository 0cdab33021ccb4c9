"""Define the bodies of requests, with the fields that OpenAI's endpoints have and clients send.

Types are strict and unknown fields are refused, as OpenAI does. Every optional field may be null. A few fields of other servers
(`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `chat_template_kwargs`) are accepted, too.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bridge.problems import INVALID, Problem

MOST_CHOICES = 128
MOST_STOPS = 16
Body_ = TypeVar("Body_", bound="Body")
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """A JSON object without fields that are not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted and ignored: chunks are not padded."""


class Sampled(Body):
    """Hold what every request for text has."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # of other servers
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None
    """Accepted and without effect here."""


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class OtherPart(BaseModel):
    """An image, a sound or a file, which no graph takes."""

    model_config = ConfigDict(extra="allow")
    type: Literal["image_url", "input_audio", "file", "video_url", "input_image", "input_file"]


Part = Annotated[TextPart | RefusalPart | OtherPart, Field(discriminator="type")]


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None
    audio: Any = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None


class FunctionTool(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatBody(Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionTool] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # accepted and without effect here
    audio: Any = None
    metadata: dict[str, str] | None = None
    moderation: Any = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class CompletionBody(Sampled):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: str | None = None


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeBody(Body):
    """The body of /tokenize: a text (`content`, or `prompt`), or the messages of a chat."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special: bool | None = None
    """llama.cpp's name for `add_special_tokens`, which is vLLM's. Both are true if left out."""
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


def parsed(kind: type[Body_], data: bytes) -> Body_:
    """Return a body of this kind.

    Raises:
        Problem: it is not JSON, or a field is missing, unknown or wrong. The problem names the first such field.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(wrong, key=lambda each: len(each["loc"]))  # of a union, the branch that fits furthest
    if first["type"] == "json_invalid":
        raise Problem(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2]}")
    path = _path(first["loc"], json.loads(data), first["type"] == "missing")
    match first["type"]:
        case "extra_forbidden":
            raise Problem(
                400, f"Unrecognized request argument supplied: {path}", INVALID, param=path, code="unknown_parameter"
            )
        case "missing":
            raise Problem(400, f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
        case kind_of_error:
            code = "invalid_type" if kind_of_error.endswith("_type") else "invalid_value"
            raise Problem(400, f"Invalid value for '{path}': {first['msg']}.", param=path, code=code)


def _path(location: tuple[int | str, ...], body: Any, missing: bool) -> str:
    """Return a field's place as OpenAI writes it: `messages[0].content`. The names of a union's types are no part of it."""
    text, at = "", body
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if isinstance(part, int) and isinstance(at, list):
            text += f"[{part}]"
            at = at[part] if part < len(at) else None
        elif isinstance(part, str) and isinstance(at, dict) and (part in at or (missing and last)):
            text += f".{part}" if text else part
            at = at.get(part)
    return text
