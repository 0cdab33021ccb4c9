"""Follow a grammar along the tokens of an answer: which tokens may come next.

llguidance does the work, on the model's own vocabulary. A mask takes some ten microseconds. A grammar takes milliseconds to
compile, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ranvier.transport.format.errors import RanvierError

from ..component.session import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_COMPILED = 64
_BITS_8 = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


class GrammarError(RanvierError):
    """Report a grammar that cannot be followed."""


class Guides:
    """Compile grammars for one model with `vocab` tokens, each once."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._tokenizers: dict[tuple[str, tuple[int, ...]], LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[Grammar, tuple[int, ...]], LLMatcher] = OrderedDict()

    def of(self, grammar: Grammar, stop_tokens: tuple[int, ...]) -> Guide:
        """Return a guide for a new answer, which one of the stop tokens ends where the grammar allows it.

        Raises:
            GrammarError: the grammar is wrong, or the tokenizer cannot be read.
        """
        key = grammar, stop_tokens
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = self._made(grammar, stop_tokens)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Guide(found.deep_copy(), self._vocab)

    def _made(self, grammar: Grammar, stop_tokens: tuple[int, ...]) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        key = grammar.tokenizer, stop_tokens
        try:
            if key not in self._tokenizers:
                self._tokenizers[key] = LLTokenizer(
                    Path(grammar.tokenizer).read_text(), n_vocab=self._vocab, eos_token=list(stop_tokens)
                )
            made = LLMatcher(self._tokenizers[key], grammar.text)
        except (OSError, ValueError) as error:
            raise GrammarError(f"grammar: {error}") from None
        if made.is_error():
            raise GrammarError(f"grammar: {_first_line(made.get_error())}")
        return made


class Guide:
    """Follow one answer. The answer may also be taken back, as when a step is repeated."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab
        self._taken: list[int] = []

    def allowed(self, answer: Sequence[int]) -> bytes:
        """Return which tokens may follow `answer`: a bit each, the lowest of a byte first.

        Raises:
            GrammarError: the answer does not follow the grammar.
        """
        self._follow(list(answer))
        bits: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"grammar: {_first_line(self._matcher.get_error())}")
        return bits

    def masked(self, logits_V: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        """Return logits with -inf for the tokens that may not follow `answer`. Errors are those of `allowed`."""
        bits_B = torch.frombuffer(bytearray(self.allowed(answer)), dtype=torch.uint8)
        never_B8 = bits_B[:, None] & _BITS_8 == 0
        return logits_V.masked_fill(never_B8.view(-1)[: self._vocab], float("-inf"))

    def _follow(self, answer: list[int]) -> None:
        taken, same = self._taken, 0
        while same < min(len(taken), len(answer)) and taken[same] == answer[same]:
            same += 1
        if same < len(taken):
            self._matcher.rollback(len(taken) - same)
        if answer[same:] and not self._matcher.consume_tokens(answer[same:]):
            why = _first_line(self._matcher.get_error())
            raise GrammarError(f"grammar: the tokens {answer[same:][:8]} do not follow it: {why}")
        self._taken = answer


def _first_line(error: str) -> str:
    """Return what an error of llguidance says, without the state and the grammar that it prints below."""
    return error.partition("\n")[0][:300]
