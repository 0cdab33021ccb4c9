"""Score how likely a language model finds a text: each window of tokens is a separate session, several at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from .run import Run

AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Score:
    """Hold the score of a text.

    `tokens` counts the scored tokens: all except the first of each window. `nll` is the sum of their negative
    log-likelihoods (natural logarithm).
    """

    tokens: int
    nll: float

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_per_token)


async def score(run: Run, ids: Sequence[int], window: int, progress: Callable[[float], None]) -> Score:
    """Score `ids` in windows that do not overlap. A last window of one token is left out.

    Raises:
        RequestError: there are fewer than two tokens, or a window is longer than the model's context.
    """
    starts = range(0, max(1, len(ids) - 1), window)
    found: dict[int, list[float]] = {}
    limit = trio.CapacityLimiter(AT_ONCE)

    async def one(start: int) -> None:
        async with limit:
            found[start] = await run.score(ids[start : start + window])
            progress(len(found) / len(starts))

    async with trio.open_nursery() as nursery:
        for start in starts:
            nursery.start_soon(one, start)
    return Score(sum(map(len, found.values())), -math.fsum(value for values in found.values() for value in values))
