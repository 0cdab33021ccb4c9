"""Answer /v1/completions: prompts as they are, as strings or token ids, one or many."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bridge.bridge import Ended
from ..bridge.problems import Problem
from ..bridge.stream_log import Origin
from ..sessions.generation import Token
from .answers import Choices
from .bodies import CompletionBody
from .wording import Wording

MOST_PROMPTS = 2048


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """Return the prompts of a body, each as text or as token ids.

    Raises:
        Problem: there is none, or there are too many.
    """
    given = body.prompt
    if given is None:
        raise Problem(400, "Missing required parameter: 'prompt'.", param="prompt", code="missing_required_parameter")
    if isinstance(given, str):
        return [given]
    ids = [each for each in given if isinstance(each, int)]
    many = [each for each in given if not isinstance(each, int)]
    if not given or len(many) > MOST_PROMPTS:
        raise Problem(
            400, f"prompt: expected 1 to {MOST_PROMPTS}, got {len(given)}", param="prompt", code="invalid_value"
        )
    return [*many] if many else [ids]


def check(body: CompletionBody) -> None:
    """Refuse what cannot be done, instead of answering something else.

    Raises:
        Problem: the body asks for it.
    """
    if body.suffix:
        raise Problem(400, "suffix: the model continues a text only", param="suffix", code="unsupported_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Problem(400, "best_of: expected the value of n", param="best_of", code="unsupported_value")
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise Problem(400, "max_tokens: 0 needs echo: true and no stream", param="max_tokens", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")


@dataclass(frozen=True, slots=True)
class Echo:
    """Hold what is shown of a prompt before its answer: nothing, its text, and if asked for what its tokens scored."""

    text: str = ""
    tokens: Sequence[int] = ()
    ranks: Sequence[tuple[float, dict[int, float]]] = ()
    """For each token but the first: its log-probability, and those of the likeliest tokens there."""


class Completions(Choices):
    """Make the choices of completions, or their chunks. There is an echo for each choice."""

    object = "text_completion"
    chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(
        self, origin: Origin, model: str, wording: Wording, prompt_tokens: int, echoes: Sequence[Echo], *,
        logprobs: int | None = None, with_usage: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(origin, model, wording, prompt_tokens, len(echoes), logprobs=logprobs, with_usage=with_usage)
        self._echoes = echoes
        self._offsets = [len(echo.text) for echo in echoes]

    def begin(self) -> list[Any]:
        return [
            self._chunk_of(index, echo.text, logprobs=self._echoed(echo))
            for index, echo in enumerate(self._echoes)
            if echo.text
        ]

    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of an answer. Return its chunk, if it completes text or has log-probabilities."""
        if isinstance(event, Ended):
            self.reasons[index] = event.reason
            return [self._chunk_of(index, "", reason=event.reason)]
        self.note(index, event)
        if not event.text and event.logprob is None:
            return []
        offset = self._offsets[index]
        self._offsets[index] += len(event.text)
        return [self._chunk_of(index, event.text, logprobs=self._made([event], offset))]

    def _chunk_of(self, index: int, text: str, reason: str | None = None, logprobs: Any = None) -> Any:
        return self.chunk_with([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def choice(self, index: int) -> dict[str, Any]:
        echo = self._echoes[index]
        before, made = self._echoed(echo), self._made(self.tokens[index], len(echo.text))
        both = {name: before[name] + made[name] for name in made} if before is not None and made is not None else made
        return {
            "index": index, "text": echo.text + self.texts[index], "finish_reason": self.reasons[index], "logprobs": both,
        }  # fmt: skip

    def _made(self, tokens: Sequence[Token], offset: int) -> dict[str, list[Any]] | None:
        """Return the log-probabilities of tokens of an answer, whose text begins at `offset`."""
        if self.logprobs is None:
            return None
        rows = [(token.id, token.logprob, {token.id: token.logprob, **token.top_logprobs}) for token in tokens]
        return self._listed(rows, [len(token.text) for token in tokens], offset)

    def _echoed(self, echo: Echo) -> dict[str, list[Any]] | None:
        """Return the log-probabilities of a prompt. The first token has none."""
        if self.logprobs is None or not echo.tokens:
            return None
        rows: list[tuple[int, float | None, dict[int, float | None] | None]] = [(echo.tokens[0], None, None)]
        rows += [
            (token, logprob, {token: logprob, **top})
            for token, (logprob, top) in zip(echo.tokens[1:], echo.ranks, strict=True)
        ]
        return self._listed(rows, [len(self.wording.text(token)) for token in echo.tokens], 0)

    def _listed(
        self, rows: Sequence[tuple[int, float | None, Mapping[int, float | None] | None]], lengths: Sequence[int], offset: int
    ) -> dict[str, list[Any]]:  # fmt: skip
        text = self.wording.text
        return {
            "tokens": [text(token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [
                None if top is None else {text(token): value for token, value in top.items()} for _, _, top in rows
            ],
            "text_offset": list(itertools.accumulate(lengths[:-1], initial=offset)) if rows else [],
        }
