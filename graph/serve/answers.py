"""Make what OpenAI's endpoints for text have in common: ids, choices, chunks, usage."""

from __future__ import annotations

import secrets
import time
from typing import Any

from ..sessions.generation import Token
from .bridge import Ended
from .wording import Wording


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Return how many tokens a request took."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


class Answers:
    """Collect the answers to one request, and make its chunks. An endpoint derives from it."""

    object: str
    chunk: str
    prefix: str
    named = False
    """Whether its events carry their type as a name, and end with the last of them instead of `[DONE]`."""

    def __init__(
        self, model: str, wording: Wording, prompt_tokens: int, count: int, *, logprobs: int | None = None,
        with_usage: bool = False,
    ) -> None:  # fmt: skip
        self.id = f"{self.prefix}{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model, self.wording, self.count, self.logprobs = model, wording, count, logprobs
        self.prompt_tokens = prompt_tokens
        self.texts = [""] * count
        self.reasons: list[str | None] = [None] * count
        self.tokens: list[list[Token]] = [[] for _ in range(count)]
        self._with_usage = with_usage

    # -- what an endpoint defines -----------------------------------------------------------------------------------

    def begin(self) -> list[Any]:
        """Return the events before the first token."""
        return []

    def piece(self, index: int, token: Token) -> Any | None:
        """Return the chunk of a token, or None if it has none."""
        raise NotImplementedError

    def last(self, index: int, reason: str) -> Any:
        """Return the chunk that ends an answer."""
        raise NotImplementedError

    def choice(self, index: int) -> dict[str, Any]:
        """Return a whole choice."""
        raise NotImplementedError

    # -- what they share --------------------------------------------------------------------------------------------

    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of an answer. Return the events that follow from it."""
        if isinstance(event, Ended):
            reason = self.reasons[index] = event.reason
            return [self.last(index, reason)]
        self.texts[index] += event.text
        self.tokens[index].append(event)
        made = self.piece(index, event)
        return [] if made is None else [made]

    def end(self) -> list[Any]:
        """Return the events after all answers: the usage, if it was asked for."""
        return [{**self.chunk_with([]), "usage": self.usage}] if self._with_usage else []

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, sum(map(len, self.tokens)))

    def chunk_with(self, choices: list[Any]) -> dict[str, Any]:
        made = {
            "id": self.id, "object": self.chunk, "created": self.created, "model": self.model, "system_fingerprint": None,
            "choices": choices,
        }  # fmt: skip
        return {**made, "usage": None} if self._with_usage else made

    def whole(self) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        return {
            "id": self.id, "object": self.object, "created": self.created, "model": self.model,
            "system_fingerprint": None, "choices": [self.choice(index) for index in range(self.count)], "usage": self.usage,
        }  # fmt: skip
