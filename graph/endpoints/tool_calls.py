"""Find the calls of tools in what a model writes, while it writes.

Each family of templates has its form:

    Hermes, Qwen, SmolLM   <tool_call>{"name": …, "arguments": {…}}</tool_call>, also a list of such objects
    Mistral                [TOOL_CALLS][{"name": …, "arguments": {…}}], or [TOOL_CALLS]name[ARGS]{…}
    Llama 3                {"name": …, "parameters": {…}} as the whole answer, perhaps after <|python_tag|>

The template says which one it is. What turns out not to be a call stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..sessions.generation import Token
from .ids import Ids
from .wording import Wording

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_HEAD_MAY_COME = 400
"""Characters within which an object must show that it is a call."""
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\[ARGS\]\s*(?=\{)")


@dataclass(frozen=True, slots=True)
class Begun:
    """A call begins: the function's name, and a new id for the call."""

    number: int
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A further piece of a call's arguments, which are one JSON object together."""

    number: int
    piece: str


@dataclass(frozen=True, slots=True)
class Family:
    """Describe how a family writes calls: what stands before and after them."""

    before: str
    after: str = ""
    bare: bool = False
    """An answer that begins with an object may be a call, without anything before it."""

    @property
    def signs(self) -> tuple[str, ...]:
        """Return the signs of calls, which are special tokens in many vocabularies."""
        return self.before, self.after, "[ARGS]"


HERMES, MISTRAL, LLAMA = (
    Family("<tool_call>", "</tool_call>"),
    Family("[TOOL_CALLS]"),
    Family("<|python_tag|>", bare=True),
)


def family_of(template: str) -> Family:
    """Return the family of a chat template; Hermes, in whose words models are told of tools, if it names no other."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and ("python_tag" in template or '"parameters"' in template):
        return LLAMA
    return HERMES


def pieces(calls: Calls | None, wording: Wording, token: Token) -> Sequence[str | Begun | Arguments]:
    """Return what a token adds to an answer: text, and if calls are looked for, their beginnings and arguments."""
    if calls is None:
        return [token.text] if token.text else []
    special = wording.special(token.id)
    return calls.add(special if special in calls.family.signs else token.text)


class Calls:
    """Split a text that grows into content and calls; without `several`, calls after the first are left out."""

    def __init__(self, family: Family, ids: Ids, *, several: bool = True) -> None:
        self._ids = ids
        self._several = several
        self.family = family
        self._held = ""
        self._content = ""
        """What was passed on as content so far, as far as it matters: whether anything was."""
        self._inside = False
        self._value: _Value | None = None
        self.count = 0

    def add(self, text: str) -> list[str | Begun | Arguments]:
        """Take a further piece of text. Return what is known from it, content as strings."""
        self._held += text
        return self._allowed(self._known(last=False))

    def rest(self) -> list[str | Begun | Arguments]:
        """Return what was held back, at the end of the answer."""
        return self._allowed(self._known(last=True))

    def _allowed(self, found: list[str | Begun | Arguments]) -> list[str | Begun | Arguments]:
        return found if self._several else [each for each in found if isinstance(each, str) or not each.number]

    def _known(self, *, last: bool) -> list[str | Begun | Arguments]:
        made: list[str | Begun | Arguments] = []
        while True:
            before = len(self._held), self._inside, self._value
            if self._value is not None:
                made += self._arguments()
            elif self._inside:
                made += self._call(last=last)
            else:
                made += self._plain(last=last)
            if (len(self._held), self._inside, self._value) == before:
                return made

    def _plain(self, *, last: bool) -> list[str | Begun | Arguments]:
        """Pass text on, up to where calls may begin."""
        family, held = self.family, self._held
        at = held.find(family.before)
        if at >= 0:
            self._held, self._inside = held[at + len(family.before) :], True
            return self._said(held[:at]) if (self._content + held[:at]).strip() else []
        begins = not self._content.strip()
        if family.bare and begins and held.lstrip().startswith("{") and not last:
            self._inside = True
            return []
        keep = 0 if last else _overlap(held, family.before)
        text = held[: len(held) - keep]
        if begins and not text.strip() and not last:  # white space before a call is not content
            return []
        self._held = held[len(held) - keep :]
        return self._said(text)

    def _said(self, text: str) -> list[str | Begun | Arguments]:
        if self.count and not text.strip():  # between calls, and after the last one
            return []
        self._content += text[:80]
        return [text] if text else []

    def _call(self, *, last: bool) -> list[str | Begun | Arguments]:
        """Find the head of the next call, or the end of the calls."""
        family = self.family
        held = self._separated(last=last)
        if held is None:
            return []
        if family.after and held.startswith(family.after):
            self._held, self._inside = held[len(family.after) :], False
            return []
        named = _NAMED.match(held)
        found = named or _HEAD.match(held)
        name = found and (found[1] if named else _string(found[1]))
        if found is not None and name is not None:
            self._held, self._value = held[found.end() :], _Value(closing=0 if named else 1)
            self.count += 1
            return [Begun(self.count - 1, name, self._ids.new("call_"))]
        whole = _whole_object(held) if held.startswith("{") else None
        if whole is not None:  # its fields come in another order
            value, end = whole
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(value.get("name"), str) and isinstance(arguments, dict):
                self._held, self.count = held[end:], self.count + 1
                number = self.count - 1
                return [Begun(number, value["name"], self._ids.new("call_")),
                        Arguments(number, json.dumps(arguments, ensure_ascii=False))]  # fmt: skip
        if last or whole is not None or (len(held) > _HEAD_MAY_COME and not held.startswith("{")):
            return self._not_a_call()
        return []

    def _separated(self, *, last: bool) -> str | None:
        """Return what was held without the signs between calls; None if it may still become such a sign."""
        held, before = self._held, self.family.before
        while True:
            held = held.lstrip(" \n\r\t,;")
            if held.startswith(before):
                held = held[len(before) :]
            elif held and before.startswith(held) and not last:
                return None
            elif held[:1] in ("[", "]"):
                held = held[1:]
            else:
                return held

    def _not_a_call(self) -> list[str | Begun | Arguments]:
        text, self._held, self._inside = self._held, "", False
        if self.count and not text.strip(" \n\r\t,;[]"):
            return []
        begun = "" if self.family.bare and text.lstrip().startswith("{") else self.family.before
        return self._said(begun + text if text.strip() else "")

    def _arguments(self) -> list[str | Begun | Arguments]:
        assert self._value is not None
        piece, rest, done = self._value.take(self._held)
        self._held = rest
        if done:
            self._value = None
        return [Arguments(self.count - 1, piece)] if piece else []


class _Value:
    """Follow a JSON object to its end, and then over the `closing` brackets of the object around it."""

    def __init__(self, closing: int) -> None:
        self._closing = closing
        self._depth = 0
        self._string = self._escaped = self._over = False
        self._end = 0

    def take(self, text: str) -> tuple[str, str, bool]:
        """Return the part of a text that belongs to the value, the part after it, and whether it is over."""
        for at, letter in enumerate(text):
            if self._over:
                if letter == "}" and self._closing:
                    return text[: self._end], text[at + 1 :], True
                if letter.isspace():
                    continue
                return text[: self._end], text[at:], True
            if self._follow(letter):
                self._over, self._end = True, at + 1
                if not self._closing:
                    return text[: at + 1], text[at + 1 :], True
        if self._over:
            piece, self._end = text[: self._end], 0
            return piece, "", False
        return text, "", False

    def _follow(self, letter: str) -> bool:
        """Take a character. Return whether it ends the value."""
        if self._escaped:
            self._escaped = False
        elif self._string:
            self._escaped, self._string = letter == "\\", letter != '"'
        elif letter == '"':
            self._string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def _overlap(text: str, sign: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a sign."""
    return next((length for length in range(min(len(sign) - 1, len(text)), 0, -1) if text.endswith(sign[:length])), 0)


def _string(literal: str) -> str | None:
    """Return the value of a JSON string, or None if it is none."""
    try:
        return str(json.loads(literal))
    except ValueError:
        return None


def _whole_object(text: str) -> tuple[dict[str, Any], int] | None:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # not whole yet, or no JSON
        return None
    return (value, end) if isinstance(value, dict) else None
