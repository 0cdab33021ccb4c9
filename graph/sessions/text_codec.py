"""Convert text to token ids and back, and the messages of a chat to text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from ranvier.actors.errors import CheckpointError, describe

from . import chat_template


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Describe what a chat's template gets beside the messages. All of it is plain data, as in JSON."""

    tools: Sequence[Any] | None = None
    """JSON schemas of functions that the model may call."""
    documents: Sequence[Any] | None = None
    """Documents that the answer may use, each with `title` and `text`."""
    template: str | None = None
    """The name of one of the model's templates; None: `tool_use` if there are tools and such a template, else the default."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


PLAIN = ChatOptions()


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Convert text to token ids and back, and the messages of a chat to text.

    `chat_template` is the default template, and `templates` holds those that have names. `special` holds the special
    tokens by the names that templates use (`bos_token`). Of a token that stands twice in a vocabulary, the library knows
    one id; `twins` maps the others to it.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    bos_token: str
    eos_token: str
    special: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[int, int] = field(default_factory=dict)
    cleans: bool = False
    """If true, the spaces that a vocabulary of words leaves before punctuation are removed (see `cleaned`)."""
    _controls: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The result of `controls`, which each request asks for: the library takes a millisecond."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return token ids. With `special`, add the model's special tokens around the text.

        A raw prompt needs them. A chat does not: its template writes them.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN) -> str:
        """Return the text of a chat, open for the answer.

        Raises:
            CheckpointError: there is no such template, the template is wrong, or it refuses the messages.
        """
        return chat_template.render(
            self.template(options),
            messages,
            self.bos_token,
            self.eos_token,
            tools=options.tools,
            documents=options.documents,
            arguments={**self.special, **options.arguments},
        )

    def template(self, options: ChatOptions = PLAIN) -> str:
        """Return the template for a chat.

        Raises:
            CheckpointError: there is none.
        """
        name = options.template
        if name is None and options.tools is not None and "tool_use" in self.templates:
            name = "tool_use"
        if name is None or (name == "default" and "default" not in self.templates):
            if self.chat_template is not None:
                return self.chat_template
            if self.templates:
                raise CheckpointError(
                    f"the model has no default chat template; name one of {', '.join(sorted(self.templates))}"
                )
            raise CheckpointError("the model has no chat template; use a raw prompt (--raw, raw=True)")
        if name not in self.templates:
            known = ", ".join(sorted({"default", *self.templates})) if self.chat_template else ", ".join(self.templates)
            raise CheckpointError(f"the model has no chat template {name!r:.80}; its templates: {known or 'none'}")
        return self.templates[name]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN) -> list[int]:
        """Return the token ids of a chat, open for the answer.

        Only the template can write control tokens. A message that spells one (`<|im_end|>`), also in parts that the
        template joins, stays ordinary text. Errors are those of `render`.
        """
        rendered, controls = self.render(messages, options), self.controls()
        given = [messages, options.tools, options.documents, options.arguments]
        hidden = _Hidden(controls, given)
        if not hidden.needed:
            return self.encode(rendered, special=False)
        pattern = re.compile(f"({'|'.join(map(re.escape, sorted(controls, key=len, reverse=True)))})")
        apart = self._render_hidden(hidden, messages, options)
        if pattern.findall(rendered) == pattern.findall(apart):
            return self.encode(rendered, special=False)
        # Hiding signs everywhere may change what a template does, such as looking for `</think>` in an earlier answer.
        # So only whole tokens are hidden, if no template has joined or changed parts of one.
        whole = _Hidden(controls, given, whole=True)
        less = self._render_hidden(whole, messages, options)
        if pattern.findall(less) == pattern.findall(apart):
            apart, hidden = less, whole
        ids: list[int] = []
        for part in pattern.split(apart):
            token = controls.get(part)
            ids += [token] if token is not None else self._ordinary(hidden.restored(part), controls)
        return ids

    def _render_hidden(self, hidden: _Hidden, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        tools, documents = hidden.hide(options.tools), hidden.hide(options.documents)
        return self.render(
            hidden.hide(messages), ChatOptions(tools, documents, options.template, hidden.hide(options.arguments))
        )

    def controls(self) -> dict[str, int]:
        """Return the ids of the special tokens by their texts."""
        if not self._controls:
            added = self.tokenizer.get_added_tokens_decoder().items()
            self._controls.update({each.content: number for number, each in added if each.special and each.content})
        return self._controls

    def _ordinary(self, text: str, controls: Mapping[str, int]) -> list[int]:
        """Encode text in which nothing is a control token."""
        if not text:
            return []
        splits, self.tokenizer.encode_special_tokens = self.tokenizer.encode_special_tokens, True
        try:
            ids = self.encode(text, special=False)
            if not set(ids).isdisjoint(controls.values()):  # even so, BPE made one: split it after its first character
                cut = "|".join(
                    f"(?<={re.escape(word[0])})(?={re.escape(word[1:])})" for word in controls if len(word) > 1
                )
                ids = [token for part in re.split(cut, text) if part for token in self.encode(part, special=False)]
            return ids
        finally:
            self.tokenizer.encode_special_tokens = splits

    def decode(self, ids: Sequence[int]) -> str:
        """Return text without special tokens.

        Raises:
            CheckpointError: the tokenizer's library failed.
        """
        text = self.decode_as_it_is(ids)
        return cleaned(text) if self.cleans else text

    def decode_as_it_is(self, ids: Sequence[int]) -> str:
        """Return what the tokenizer's decoder makes, before spaces are removed. Errors are those of `decode`."""
        known = [self.twins.get(token, token) for token in ids] if self.twins else list(ids)
        try:
            text: str = self.tokenizer.decode(known, skip_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics do not derive from Exception
            raise CheckpointError(f"tokenizer: cannot decode: {describe(error)}") from None
        return text


_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
            (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def cleaned(text: str) -> str:
    """Return a text without spaces before punctuation, as transformers' `clean_up_tokenization` does."""
    for before, after in _CLEANED:
        text = text.replace(before, after)
    return text


class _Hidden:
    """Replace the first characters of control tokens in messages by private-use characters.

    No template can then build a control token from the text of messages.
    """

    PRIVATE = range(0x10_0000, 0x10_FFFE)
    """Supplementary private use area B. No language uses these characters, and no template looks for one."""

    def __init__(self, controls: Iterable[str], messages: Any, *, whole: bool = False) -> None:
        said = set(json.dumps(messages, ensure_ascii=False, default=str))
        free = (chr(number) for number in self.PRIVATE if chr(number) not in said)
        signs = set() if whole else {control[0] for control in controls if not control[0].isalnum()}
        self._there = str.maketrans({sign: next(free) for sign in sorted(signs & said - {'"', "\\"})})
        # A letter is hidden only where a whole token stands: templates compare words, such as those of roles.
        words = [word for word in controls if (whole or word[0].isalnum()) and {*json.dumps(word)[1:-1]} <= said]
        words.sort(key=len, reverse=True)
        stands = {first: next(free) for first in sorted({word[0] for word in words})}
        self._words = {word: stands[word[0]] + word[1:] for word in words}
        back = {stand: chr(sign) for sign, stand in self._there.items()} | {
            stand: first for first, stand in stands.items()
        }
        self._back = str.maketrans(back)
        self._escaped = {json.dumps(stand)[1:-1]: json.dumps(first)[1:-1] for stand, first in back.items()}
        self.needed = bool(self._there or self._words)

    def hide(self, value: Any) -> Any:
        """Return the value with the characters replaced in all of its strings, including the keys of mappings."""
        if isinstance(value, str):
            for word, stand in self._words.items():
                value = value.replace(word, stand)
            return value.translate(self._there)
        if isinstance(value, Mapping):
            return {
                self.hide(key): each.translate(self._there)
                if key == "role" and isinstance(each, str)
                else self.hide(each)
                for key, each in value.items()
            }
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def restored(self, text: str) -> str:
        """Return a text with its own characters, also where JSON has escaped what stood for them."""
        for stand, first in self._escaped.items():
            text = text.replace(stand, first)
        return text.translate(self._back)
