"""Tell a model of tools in words, if its chat template does not: in the form of Hermes, which many models were trained with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

WORDS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def knows_tools(template: str) -> bool:
    """Return whether a chat template writes the tools that it is given."""
    return "tools" in template


def in_words(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the messages of a chat with tools, calls and results as texts. The tools stand in the first, system message."""
    made = [_in_words(message) for message in messages]
    if not tools:
        return made
    told = WORDS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if made and made[0]["role"] == "system":
        return [{**made[0], "content": f"{made[0]['content']}\n\n{told}"}, *made[1:]]
    return [{"role": "system", "content": told}, *made]


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    texts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(text for text in texts if text)}
