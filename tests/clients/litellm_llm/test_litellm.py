"""litellm as a client: what it makes of our answers, chunks and errors."""

from __future__ import annotations

import json
import os
from typing import Any

import litellm
import pytest
from pydantic import BaseModel

NAME = os.environ["RANVIER_MODELS"].split(",")[0]
THERE = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none", "max_retries": 0}
ASKED: dict[str, Any] = {
    **THERE, "model": f"openai/{NAME}", "max_tokens": 24, "temperature": 0,
    "messages": [{"role": "user", "content": "Name three colours."}],
}  # fmt: skip
ADD = {
    "type": "function",
    "function": {
        "name": "add", "description": "Adds two numbers.",
        "parameters": {
            "type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"], "additionalProperties": False,
        },
    },
}  # fmt: skip


class Pet(BaseModel):
    kind: str
    legs: int


def words(answer: Any) -> str:
    return answer.choices[0].message.content


def test_answers_with_usage() -> None:
    answer = litellm.completion(**ASKED)
    assert words(answer) and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_is_the_same_answer() -> None:
    chunks = list(litellm.completion(**ASKED, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=ASKED["messages"])
    assert words(whole) == words(litellm.completion(**ASKED))
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"


async def test_asynchronous_answers_and_streams_are_the_same() -> None:
    answer = await litellm.acompletion(**ASKED)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in await litellm.acompletion(**ASKED, stream=True)]
    assert "".join(pieces) == words(answer)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(choice: Any, stream: bool) -> None:
    asked = {**ASKED, "max_tokens": 100, "tools": [ADD], "tool_choice": choice}
    if stream:
        answer = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
    else:
        answer = litellm.completion(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a", "b"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_results_of_tools_are_taken() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        *ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]  # fmt: skip
    assert words(litellm.completion(**{**ASKED, "messages": messages}, tools=[ADD]))


def test_a_schema_of_pydantic() -> None:
    answer = litellm.completion(**{**ASKED, "max_tokens": 200, "frequency_penalty": 0.5}, response_format=Pet)
    Pet.model_validate_json(words(answer))


def test_json_mode() -> None:
    answer = litellm.completion(**ASKED, response_format={"type": "json_object"})
    assert words(answer).lstrip().startswith("{")


def test_choices_stops_and_logprobs() -> None:
    answer = litellm.completion(**{**ASKED, "temperature": 1}, n=2, seed=7, logprobs=True, top_logprobs=2, stop=["."])
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert "." not in choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_completions() -> None:
    asked = {**THERE, "model": f"text-completion-openai/{NAME}", "max_tokens": 8, "temperature": 0}
    answer = litellm.text_completion(prompt="Once upon a time", logprobs=2, echo=True, **asked)
    pieces = [
        each.choices[0].text or "" for each in litellm.text_completion(prompt="Once upon a time", stream=True, **asked)
    ]
    assert answer.choices[0].text == "Once upon a time" + "".join(pieces)
    assert answer.choices[0].logprobs.token_logprobs[0] is None


def test_many_prompts() -> None:
    answer = litellm.text_completion(
        prompt=["Red,", "One,"], model=f"text-completion-openai/{NAME}", max_tokens=4, temperature=0, **THERE
    )
    assert len(answer.choices) == 2


async def test_responses() -> None:
    asked = {
        **THERE,
        "model": f"openai/{NAME}",
        "input": "Name three colours.",
        "max_output_tokens": 24,
        "temperature": 0,
    }
    answer = litellm.responses(**asked)
    events = [event async for event in await litellm.aresponses(**asked, stream=True)]
    assert answer.usage.output_tokens == 24 and answer.status == "incomplete"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == answer.output[0].content[0].text


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"model": "openai/unknown"}, litellm.NotFoundError),
        ({"messages": [{"role": "user", "content": "many words " * 9000}]}, litellm.ContextWindowExceededError),
        ({"temperature": 9}, litellm.BadRequestError),
    ],
)
def test_errors_have_their_kind(wrong: dict[str, Any], expected: type[Exception]) -> None:
    with pytest.raises(expected):
        litellm.completion(**{**ASKED, **wrong})


def test_lists_models() -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key="none", api_base=THERE["api_base"]
    )
    assert any(NAME in name for name in found)
