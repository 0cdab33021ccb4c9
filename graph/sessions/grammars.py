"""Make grammars from JSON schemas, regular expressions and Lark's notation, and check them before a request begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranvier.actors.component.session import Grammar

from ..file.errors import RequestError
from .text_codec import TextCodec

MOST_BYTES = 1 << 18
WHITE_SPACE: Any = {"whitespace_pattern": r"[ \n\t]{0,16}"}
"""Between the parts of JSON. Without a bound, a small model may write nothing but spaces."""


class Grammars:
    """Make the grammars of one run. The model's tokenizer is written into `folder` once, for the actors that need it."""

    def __init__(self, codec: TextCodec | None, folder: Path) -> None:
        self._codec = codec
        self._file = folder / "tokenizer.json"

    def of(self, given: Mapping[str, Any]) -> Grammar:
        """Return the grammar for `{"json": schema}`, `{"regex": pattern}` or `{"lark": grammar}`.

        Raises:
            RequestError: it has another form, is not supported, or llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError("a grammar needs llguidance; pip install 'ranvier[serve]'") from None
        if self._codec is None:
            raise RequestError("a grammar needs a tokenizer, and the model has none")
        if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= {"json", "regex", "lark"}:
            raise RequestError('grammar: expected {"json": schema}, {"regex": pattern} or {"lark": grammar}')
        [(kind, value)] = given.items()
        try:
            if kind == "json":
                schema = value if isinstance(value, str) else json.dumps(value)
                text = LLMatcher.grammar_from_json_schema(schema, overrides=WHITE_SPACE)
            elif kind == "regex":
                text = LLMatcher.grammar_from_regex(value)
            else:
                text = LLMatcher.grammar_from_lark(value)
        except (TypeError, ValueError) as error:
            raise RequestError(f"grammar: {error}") from None
        if len(text) > MOST_BYTES:
            raise RequestError(f"grammar: expected at most {MOST_BYTES} characters, got {len(text)}")
        wrong = LLMatcher.validate_grammar(text)
        if wrong:
            raise RequestError(f"grammar: {wrong[:1000]}")
        return self.again(Grammar(text, ""))

    def again(self, grammar: Grammar) -> Grammar:
        """Return a grammar that was made before, perhaps by a run that was lost, with this run's tokenizer."""
        assert self._codec is not None
        if not self._file.exists():
            self._file.write_text(self._codec.tokenizer.to_str())
        return Grammar(grammar.text, str(self._file))
