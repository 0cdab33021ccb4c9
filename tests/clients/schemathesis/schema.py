"""Write a schema of our endpoints (OpenAPI 3.1) from the types of the openai package: `schema.py MODEL`, to standard output.

Bodies are what OpenAI's clients may send, answers what they expect. Answers are kept short: a body must bound its tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParams
from pydantic import TypeAdapter

ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string", "minLength": 1}, "type": {"type": "string", "minLength": 1},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
        },
    }},
}  # fmt: skip
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 49151}}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "minLength": 1}}}
NOT_HERE = {
    "access_programs", "audio", "background", "background_options", "context_management", "conversation", "image",
    "moderation", "previous_response_id", "prompt", "prompt_cache_options", "suffix", "truncation", "web_search_options",
}  # fmt: skip
"""Fields that the server refuses, since it has nothing to do for them: few bodies with them would get further."""


WITHIN: dict[str, dict[str, Any]] = {
    "frequency_penalty": {"minimum": -2, "maximum": 2}, "presence_penalty": {"minimum": -2, "maximum": 2},
    "temperature": {"minimum": 0, "maximum": 2}, "top_p": {"minimum": 0, "maximum": 1},
    "top_logprobs": {"minimum": 0, "maximum": 20}, "n": {"minimum": 1, "maximum": 2}, "best_of": {"minimum": 1, "maximum": 2},
    "messages": {"minItems": 1, "maxItems": 3}, "stop": {"maxItems": 4},
}  # fmt: skip
"""Bounds that the types do not have, and the service does."""


def schema_of(type_: Any, definitions: dict[str, Any], *, closed: bool = False) -> dict[str, Any]:
    """Return the schema of a type. What it refers to is added to the definitions. Objects that are closed have no other fields."""
    name = type_.__module__.rpartition(".")[2] + type_.__name__
    made = TypeAdapter(type_).json_schema(ref_template=f"#/components/schemas/{name}_{{model}}")
    more = made.pop("$defs", {})
    for each in (made, *more.values()):
        if closed and "properties" in each:
            each["additionalProperties"] = False
    definitions |= {f"{name}_{model}": each for model, each in more.items()}
    return made


def bounded(body: dict[str, Any], model: str, most: str) -> dict[str, Any]:
    """Return the schema of a body that asks for few tokens of the model."""
    for name in NOT_HERE - ({"prompt"} if most == "max_tokens" else set()):
        body["properties"].pop(name, None)
    body["properties"]["model"] = {"enum": [model]}
    body["properties"][most] = {"type": "integer", "minimum": 1, "maximum": 3}
    body["required"] = sorted({*body.get("required", ()), "model", most} | ({"input"} & set(body["properties"])))
    for name in WITHIN.keys() & body["properties"].keys():
        body["properties"][name] = {"allOf": [body["properties"][name], WITHIN[name]]}
    return body


def answers(good: dict[str, Any], *, may_stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": good}}
    if may_stream:
        content["text/event-stream"] = {"schema": EVENT}
    wrong = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
    return {"200": {"description": "done", "content": content}} | dict.fromkeys(
        ("400", "404", "408", "413", "415"), wrong
    )


def main() -> None:
    model, kept = sys.argv[1], {}
    paths: dict[str, Any] = {}
    posts = {
        "/chat/completions": (ChatParams, ChatCompletion, "max_completion_tokens"),
        "/completions": (TextParams, Completion, "max_tokens"),
        "/responses": (ResponseParams, Response, "max_output_tokens"),
    }
    for path, (params, answer, most) in posts.items():
        body = bounded(schema_of(params, kept, closed=True), model, most)
        body["properties"]["stream"] = {"type": ["boolean", "null"]}
        content = {"application/json": {"schema": body}}
        paths[path] = {"post": {
            "requestBody": {"required": True, "content": content},
            "responses": answers(schema_of(answer, kept), may_stream=True),
        }}  # fmt: skip
    own = {
        "/tokenize": ({"content": {"type": "string"}, "model": {"enum": [model]}}, {"tokens": IDS}),
        "/detokenize": (
            {"tokens": {**IDS, "maxItems": 50}, "model": {"enum": [model]}},
            {"content": {"type": "string"}},
        ),
    }
    for path, (asked, told) in own.items():
        body = {"type": "object", "properties": asked, "required": list(asked), "additionalProperties": False}
        paths[path] = {"post": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": answers({"type": "object", "properties": told, "required": list(told)}),
        }}  # fmt: skip
    one = schema_of(Model, kept)
    listed = {
        "type": "object", "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": one, "minItems": 1}},
    }  # fmt: skip
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "examples": [model]},
    }
    paths["/models"] = {"get": {"responses": answers(listed)}}
    paths["/models/{name}"] = {"get": {"parameters": [name], "responses": answers(one)}}
    json.dump({
        "openapi": "3.1.0", "info": {"title": "OpenAI's interface, as served", "version": "1"}, "paths": paths,
        "components": {"schemas": kept},
    }, sys.stdout)  # fmt: skip


if __name__ == "__main__":
    main()
