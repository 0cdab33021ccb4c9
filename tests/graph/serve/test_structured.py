"""Give answers that follow a schema, an expression or a tool, whatever the model would rather say."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
import trio
from linux import FAST

import ranvier
from ranvier.graph.endpoints import schemas

SMOLLM2 = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
ASKED: dict[str, Any] = {
    "model": "smollm2",
    "temperature": 0,
    "messages": [{"role": "user", "content": "Describe a person."}],
}


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=130)
    likes: list[Annotated[str, pydantic.Field(max_length=20)]] = pydantic.Field(max_length=2)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"], "additionalProperties": False,
        },
    },
}  # fmt: skip
OTHER = {"type": "function", "function": {"name": "nothing"}}


def of_schema(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": model.model_json_schema(), "strict": True},
    }


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema(server: Any, temperature: float) -> None:
    """Answer with JSON of the schema, greedily and drawn, and end there."""
    made = server.client().chat.completions.create(
        **{**ASKED, "temperature": temperature}, seed=3, response_format=of_schema(Person), max_tokens=400
    )
    assert made.choices[0].finish_reason == "stop"
    Person.model_validate_json(made.choices[0].message.content)


def test_any_object(server: Any) -> None:
    """Answer with some JSON object."""
    made = server.client().chat.completions.create(**ASKED, response_format={"type": "json_object"}, max_tokens=300)
    text = made.choices[0].message.content
    assert text.lstrip().startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call(server: Any, choice: Any, stream: bool) -> None:
    """Call a tool that must be called, with arguments of its schema; in pieces, too."""
    tools = [WEATHER] if choice == "required" else [OTHER, WEATHER]
    asked = {**ASKED, "tools": tools, "tool_choice": choice, "max_tokens": 200}
    if stream:
        deltas = [chunk.choices[0] for chunk in server.client().chat.completions.create(**asked, stream=True)]
        pieces = [call for delta in deltas for call in delta.delta.tool_calls or ()]
        name, arguments = pieces[0].function.name, "".join(piece.function.arguments for piece in pieces)
        reason = deltas[-1].finish_reason
        assert pieces[0].id and len(pieces) > 2
    else:
        whole = server.client().chat.completions.create(**asked).choices[0]
        [call] = whole.message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, whole.finish_reason
        assert whole.message.content is None
    assert (name, reason) == ("weather", "tool_calls")
    found = json.loads(arguments)
    assert set(found) == {"city", "days"} and 1 <= found["days"] <= 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_the_older_form(server: Any, stream: bool) -> None:
    """Answer a body with `functions` as its clients read it: in `function_call`. Take their history, and their "none"."""
    asked = {**ASKED, "functions": [WEATHER["function"]], "max_tokens": 200}
    forced = {**asked, "function_call": {"name": "weather"}}
    if stream:
        deltas = [chunk.choices[0] for chunk in server.client().chat.completions.create(**forced, stream=True)]
        pieces = [delta.delta.function_call for delta in deltas if delta.delta.function_call]
        name, arguments = pieces[0].name, "".join(piece.arguments for piece in pieces)
        reason = deltas[-1].finish_reason
    else:
        [whole] = server.client().chat.completions.create(**forced).choices
        name, arguments, reason = *_pair(whole.message.function_call), whole.finish_reason
        assert whole.message.tool_calls is None
    assert (name, reason) == ("weather", "function_call") and "city" in json.loads(arguments)
    history = [*ASKED["messages"], {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": arguments}},
               {"role": "function", "name": "weather", "content": "21 C"}]  # fmt: skip
    told = [server.post("/tokenize", {"messages": each})[1]["count"] for each in (ASKED["messages"], history)]
    assert told[1] > told[0] + 15, "the model sees the call"
    with_them, without = (
        server.post("/v1/chat/completions", {**asked, "function_call": choice, "max_tokens": 1})[1]["usage"]
        for choice in ("auto", "none")
    )
    assert with_them["prompt_tokens"] > without["prompt_tokens"]


def _pair(call: Any) -> tuple[str, str]:
    return call.name, call.arguments


OPEN = {"type": "function", "function": {"name": "open_object", "parameters": {
    "type": "object", "properties": {"place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    "required": ["place"]}}}  # fmt: skip


@pytest.mark.parametrize(("tool", "keys"), [(OPEN, {"place"}), (OTHER, set())])
def test_a_call_has_the_arguments_that_its_tool_lists(server: Any, tool: dict[str, Any], keys: set[str]) -> None:
    """Invent no arguments, although JSON Schema would allow any; a tool that lists none gets none."""
    made = server.client().chat.completions.create(**ASKED, tools=[tool], tool_choice="required", max_tokens=120)
    assert made.choices[0].finish_reason == "tool_calls"
    [call] = made.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == keys and (not keys or arguments["place"].keys() == {"x"})


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"type": "object", "properties": {"a": {"type": "object", "properties": {}}}},
         {"type": "object", "properties": {"a": {"type": "object", "properties": {}, "additionalProperties": False}},
          "additionalProperties": False}),
        ({"properties": {"properties": {"type": "string"}}},
         {"properties": {"properties": {"type": "string"}}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        ({"properties": {}, "additionalProperties": {"properties": {}}},
         {"properties": {}, "additionalProperties": {"properties": {}, "additionalProperties": False}}),
        ({"properties": {}, "anyOf": [{"properties": {}}]},
         {"properties": {}, "anyOf": [{"properties": {}, "additionalProperties": False}]}),
        ({"$defs": {"a": {"properties": {}}}, "allOf": [{"$ref": "#/$defs/a"}]},
         {"$defs": {"a": {"properties": {}}}, "allOf": [{"$ref": "#/$defs/a"}]}),
        ({"items": [{"properties": {}}, True]}, {"items": [{"properties": {}, "additionalProperties": False}, True]}),
    ],
)  # fmt: skip
def test_objects_are_closed(schema: dict[str, Any], found: dict[str, Any]) -> None:
    """Close objects that list their properties, at any depth, but none that is open by its own words or combined."""
    before = json.dumps(schema)
    assert schemas.closed(schema) == found
    assert json.dumps(schema) == before


def test_responses_follow_schemas_and_call_functions(server: Any) -> None:
    """Answer /v1/responses with JSON of a schema, and with a call of a function, whole and as events."""
    asked = {"model": "smollm2", "temperature": 0, "input": "Describe a person.", "max_output_tokens": 400}
    made = server.client().responses.parse(**asked, text_format=Person)
    assert made.status == "completed" and isinstance(made.output_parsed, Person)
    tool = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"], "strict": True}
    whole = server.client().responses.create(**asked, tools=[tool], tool_choice="required")
    [call] = whole.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments).keys() == {"city", "days"} and whole.output_text == ""
    events = list(
        server.client().responses.create(
            **asked, tools=[tool], tool_choice={"type": "function", "name": "weather"}, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments and len(pieces) > 2
    assert events[-1].response.output[0].arguments == call.arguments
    answered = server.client().responses.create(
        model="smollm2", max_output_tokens=4, tools=[tool],
        input=[{"role": "user", "content": "How is the weather in Ulm?"}, call.model_dump(exclude_none=True),
               {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )  # fmt: skip
    assert answered.usage.input_tokens > whole.usage.input_tokens


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "other"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "missing"}}}, "tool_choice"),
    ],
)
def test_what_cannot_be_followed_is_refused(server: Any, changes: dict[str, Any], param: str | None) -> None:
    """Refuse a schema that cannot be followed, and say why, before anything is computed."""
    status, answer, _ = server.post("/v1/chat/completions", {**ASKED, **changes})
    assert status == 400 and answer["error"]["message"]
    if param is not None:
        assert answer["error"]["param"] == param


def test_a_grammar_holds_through_a_recovery(runs: Path) -> None:
    """Follow an expression with the same text although the head is killed in the middle of it."""
    graph = ranvier.load(SMOLLM2, overrides=FAST)
    pattern = r"(red|green|blue)(, (red|green|blue)){9}\."

    async def answer(run: ranvier.Run, kill: bool) -> str:
        text, killed = "", not kill
        async for token in run.generate("Name colours.", max_tokens=60, grammar={"regex": pattern}):
            text += token.text
            if len(text) > 12 and not killed:
                killed = True
                os.kill(next(pid for label, pid in run.pids.items() if label.startswith("head")), signal.SIGKILL)
        return text

    async def main() -> list[str]:
        async with ranvier.launch(graph, runs=runs) as run:
            made = [await answer(run, False), await answer(run, True)]
            assert len(run.recoveries) == 1
            return made

    first, second = trio.run(main)
    assert first == second and re.fullmatch(pattern, first)
