"""Find calls in what models write, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.graph.endpoints.ids import Ids
from ranvier.graph.endpoints.tool_calls import HERMES, LLAMA, MISTRAL, Arguments, Begun, Calls, Family, family_of
from ranvier.graph.endpoints.tool_prompts import in_words

WEATHER = {"city": 'Köln "Süd" {a}', "days": [1, 2], "deep": {"x": "}"}}
ONE = json.dumps({"name": "weather", "arguments": WEATHER})
CASES: list[tuple[Family, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [("weather", WEATHER)]),
    (
        HERMES,
        f"Let me look. <tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>\n",
        "Let me look. ",
        [("weather", WEATHER)] * 2,
    ),
    (HERMES, f"<tool_call>[{ONE}, {ONE}]</tool_call>", "", [("weather", WEATHER)] * 2),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", {"a": 1})]),
    (HERMES, f"\n \n<tool_call>{ONE}</tool_call>", "", [("weather", WEATHER)]),
    (HERMES, "No call, only a < b and <tool_ something.", "No call, only a < b and <tool_ something.", []),
    (HERMES, "<tool_call>nothing that can be read</tool_call>", "<tool_call>nothing that can be read</tool_call>", []),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]", "", [("weather", WEATHER)]),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": {"b": []}}[TOOL_CALLS]g[ARGS]{}', "", [("f", {"a": {"b": []}}), ("g", {})]),
    (LLAMA, '{"name": "f", "parameters": {"a": "x"}}', "", [("f", {"a": "x"})]),
    (
        LLAMA,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 1}}',
        "",
        [("f", {}), ("g", {"a": 1})],
    ),
    (LLAMA, '{"some": "other object"} and text', '{"some": "other object"} and text', []),
    (LLAMA, "Plain {text}.", "Plain {text}.", []),
]


@pytest.mark.parametrize(("family", "text", "content", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 400), max_size=60))
def test_calls_in_any_pieces(family: Family, text: str, content: str, calls: list[Any], cuts: list[int]) -> None:
    """Find the same content and calls in any pieces of a text."""
    ends = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = Calls(family, Ids("x"))
    found = [each for a, b in itertools.pairwise(ends) for each in parser.add(text[a:b])] + parser.rest()
    assert "".join(each for each in found if isinstance(each, str)) == content
    begun = [each for each in found if isinstance(each, Begun)]
    assert len({each.id for each in begun}) == len(begun)
    made = [
        (each.name, json.loads("".join(a.piece for a in found if isinstance(a, Arguments) and a.number == each.number)))
        for each in begun
    ]
    assert made == calls


@pytest.mark.parametrize(
    "head",
    ['{"name": "a\\q", "arguments": {"b": 1}}', '{"name": "a\nb", "arguments": {"b": 1}}', '{"a": ' + "[" * 200_000],
)
def test_what_is_no_json_is_text(head: str) -> None:
    """Take what looks like a call and is no JSON for text: a model may write anything."""
    parser = Calls(HERMES, Ids("x"))
    found = parser.add("<tool_call>" + head) + parser.rest()
    assert "".join(each for each in found if isinstance(each, str)) == "<tool_call>" + head


def test_calls_after_the_first_are_left_out() -> None:
    """Keep one call where the client wants no parallel ones."""
    parser = Calls(HERMES, Ids("x"), several=False)
    text = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{"b": 1}}}}</tool_call>' for name in "fg")
    found = parser.add(text) + parser.rest()
    assert [each.name for each in found if isinstance(each, Begun)] == ["f"]
    assert "".join(each.piece for each in found if isinstance(each, Arguments)) == '{"b": 1}'


def test_arguments_come_as_they_are_written() -> None:
    """Pass the pieces of arguments on before the call is complete."""
    parser = Calls(HERMES, Ids("x"))
    assert [type(each) for each in parser.add('<tool_call>{"name": "f", "arguments": {"a"')] == [Begun, Arguments]
    assert parser.add(': "b') == [Arguments(0, ': "b')]


@pytest.mark.parametrize(
    ("template", "family"),
    [("{{ '<tool_call>' }}", HERMES), ("[TOOL_CALLS]", MISTRAL), ("<|python_tag|>", LLAMA), ("{{ messages }}", HERMES)],
)
def test_the_template_says_which_family(template: str, family: Family) -> None:
    """Know a family by the signs in its template. A model that is told of tools in words is told in those of Hermes."""
    assert family_of(template) is family


def test_tools_in_words() -> None:
    """Tell a model whose template knows no tools of them, of earlier calls and of their results, in its texts."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function",
                                                                  "function": {"name": "weather", "arguments": {"city": "Ulm"}}}]}  # fmt: skip
    told = in_words([{"role": "user", "content": "Hi"}, called, {"role": "tool", "content": "21 C"}], [tool])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert json.dumps(tool) in told[0]["content"]
    parser = Calls(HERMES, Ids("x"))
    made = parser.add(told[2]["content"]) + parser.rest()
    assert [type(each) for each in made] == [Begun, Arguments] and '"Ulm"' in made[1].piece
    assert "21 C" in told[3]["content"] and "tool_calls" not in told[2]
    system = in_words([{"role": "system", "content": "Be kind."}], [tool])
    assert len(system) == 1 and system[0]["content"].startswith("Be kind.\n\n")
    plain = [{"role": "user", "content": "Hi"}]
    assert in_words(plain, None) == plain
