"""Answer /v1/completions: prompts as they are, as strings or token ids, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..sessions.generation import Token
from .answers import Answers
from .bodies import CompletionBody
from .problems import Problem
from .wording import Wording

MOST_PROMPTS = 2048


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """Return the prompts of a body, each as text or as token ids.

    Raises:
        Problem: there is none, or there are too many.
    """
    match body.prompt:
        case None:
            raise Problem(
                400, "Missing required parameter: 'prompt'.", param="prompt", code="missing_required_parameter"
            )
        case str():
            return [body.prompt]
        case []:
            raise Problem(400, "prompt: expected at least one", param="prompt", code="invalid_value")
        case [int(), *_]:
            return [body.prompt]  # type: ignore[list-item]
        case many:
            if len(many) > MOST_PROMPTS:
                raise Problem(
                    400,
                    f"prompt: expected at most {MOST_PROMPTS}, got {len(many)}",
                    param="prompt",
                    code="invalid_value",
                )
            return list(many)  # type: ignore[arg-type]


def check(body: CompletionBody) -> None:
    """Refuse what cannot be done, instead of answering something else.

    Raises:
        Problem: the body asks for it.
    """
    if body.suffix:
        raise Problem(400, "suffix: the model continues a text only", param="suffix", code="unsupported_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Problem(400, "best_of: expected the value of n", param="best_of", code="unsupported_value")
    if body.stream_options is not None and not body.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")


class Completions(Answers):
    """Make the choices of completions, or their chunks. `prefixes` are the texts of the prompts, if they are echoed."""

    object = "text_completion"
    chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(
        self, model: str, wording: Wording, prompt_tokens: int, prefixes: Sequence[str], *, logprobs: int | None = None,
        with_usage: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, wording, prompt_tokens, len(prefixes), logprobs=logprobs, with_usage=with_usage)
        self._prefixes = prefixes
        self._offsets = [len(prefix) for prefix in prefixes]

    def begin(self) -> list[Any]:
        return [self._chunk_of(index, text) for index, text in enumerate(self._prefixes) if text]

    def piece(self, index: int, token: Token) -> Any | None:
        if not token.text and token.logprob is None:
            return None
        offset = self._offsets[index]
        self._offsets[index] += len(token.text)
        return self._chunk_of(index, token.text, logprobs=self._logprobs([token], offset))

    def last(self, index: int, reason: str) -> Any:
        return self._chunk_of(index, "", reason=reason)

    def _chunk_of(self, index: int, text: str, reason: str | None = None, logprobs: Any = None) -> Any:
        return self.chunk_with([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def choice(self, index: int) -> dict[str, Any]:
        prefix = self._prefixes[index]
        return {
            "index": index, "text": prefix + self.texts[index], "finish_reason": self.reasons[index],
            "logprobs": self._logprobs(self.tokens[index], len(prefix)),
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Any:
        if self.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [self.wording.text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {
                    self.wording.text(each): value
                    for each, value in {token.id: token.logprob, **token.top_logprobs}.items()
                }
                for token in tokens
            ],
            "text_offset": offsets,
        }
