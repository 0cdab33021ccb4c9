"""Make what OpenAI's endpoints for text have in common: ids, choices, chunks, usage."""

from __future__ import annotations

import abc
from typing import Any

from ..bridge.bridge import Ended
from ..bridge.stream_log import Origin
from ..sessions.generation import Token
from .ids import Ids
from .wording import Wording


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Return how many tokens a request took."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


class Answers(abc.ABC):
    """Collect the answers to one request, and make its chunks. An endpoint derives from it."""

    object: str
    prefix: str
    named = False
    """Its events carry their type as a name, and end with the last of them instead of `[DONE]`."""

    def __init__(
        self, origin: Origin, model: str, wording: Wording, prompt_tokens: int, count: int, *, logprobs: int | None = None,
        with_usage: bool = False,
    ) -> None:  # fmt: skip
        self.ids = Ids(origin.request_id)
        self.id = self.ids.new(self.prefix)
        self.created = origin.created
        self.model, self.wording, self.count, self.logprobs = model, wording, count, logprobs
        self.prompt_tokens = prompt_tokens
        self.texts = [""] * count
        self.reasons: list[str | None] = [None] * count
        self.tokens: list[list[Token]] = [[] for _ in range(count)]
        self._with_usage = with_usage

    def begin(self) -> list[Any]:
        """Return the events before the first token."""
        return []

    @abc.abstractmethod
    def add(self, index: int, event: Token | Ended) -> list[Any]:
        """Take a token or the end of an answer. Return the events that follow from it."""

    def end(self) -> list[Any]:
        """Return the events after all answers."""
        return []

    def error(self, body: dict[str, Any]) -> list[Any]:
        """Return the events of an error that ends the answer. `body` is OpenAI's error object."""
        return [body]

    @abc.abstractmethod
    def whole(self) -> dict[str, Any]:
        """Return the answer that is not streamed."""

    def note(self, index: int, token: Token) -> None:
        """Add a token to an answer."""
        self.texts[index] += token.text
        self.tokens[index].append(token)

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, sum(map(len, self.tokens)))


class Choices(Answers):
    """Make answers as the choices of one object, and as chunks that hold pieces of them."""

    chunk: str

    @abc.abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """Return a whole choice."""

    def end(self) -> list[Any]:
        """Return the events after all answers: the usage, if it was asked for."""
        return [{**self.chunk_with([]), "usage": self.usage}] if self._with_usage else []

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
