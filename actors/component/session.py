"""Define what an actor receives about a session when it opens, as plain data without torch.

A session is one client's stream through the graph: a generation, or one forward call. Its id, its epoch and a position
identify every step that it takes. Everything that an actor keeps for it is a function of those three.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .inside import Edit, Read

LEAST_TEMPERATURE = 1e-5
"""Below this, logits divided by the temperature would overflow. vLLM has the same limit."""
MOST_BIAS = 1e6
MOST_BIASES = 1024
MOST_LOGPROBS = 20
"""Maximum number of likeliest tokens whose log-probabilities a request may ask for, as in OpenAI's API."""
_NUMBERS = (
    ("temperature", float), ("top_k", operator.index), ("top_p", float), ("min_p", float), ("repetition_penalty", float),
    ("presence_penalty", float), ("frequency_penalty", float), ("min_tokens", operator.index), ("seed", operator.index),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sampling:
    """Describe how the head chooses a token. Temperature 0 is greedy and needs no other field.

    The fields are applied in this order, which is transformers' order: bias, penalties, minimum of tokens, temperature,
    top-k, top-p, min-p. A temperature under 1e-5, and top-p 0, are greedy, too.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep the tokens with at least this share of the likeliest token's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that were seen before by this (Keskar et al. 2019); 1 does not change them."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the answer has already (OpenAI's API)."""
    frequency_penalty: float = 0.0
    """Subtract this from the logits of a token once for each time that the answer has it (OpenAI's API)."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Add these numbers to the logits of these tokens, by id."""
    min_tokens: int = 0
    """Exclude the stop tokens until the answer has this many tokens, and ignore stop strings until then."""
    seed: int = 0
    """Determine each draw, together with the position: the same seed gives the same text, even after a recovery."""

    def __post_init__(self) -> None:
        for name, kind in _NUMBERS:
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))  # Python's own types: numpy's cannot be sent
            except (TypeError, ValueError):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r:.80}") from None
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        checks = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("temperature", self.temperature < math.inf, "a finite number"),
            ("top_k", 0 <= self.top_k < 1 << 63, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "over 0 and finite"),
            ("presence_penalty", abs(self.presence_penalty) <= MOST_BIAS, f"from {-MOST_BIAS:g} to {MOST_BIAS:g}"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MOST_BIAS, f"from {-MOST_BIAS:g} to {MOST_BIAS:g}"),
            ("min_tokens", 0 <= self.min_tokens < 1 << 31, "at least 0"),
            ("seed", 0 <= self.seed < 1 << 63, "from 0 to 2^63 - 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is always chosen."""
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Return biases as pairs of token id and number, in the order of the ids.

    Raises:
        ValueError: they are not such pairs, or are too many.
    """
    try:
        pairs = given.items() if isinstance(given, Mapping) else given
        made = tuple(sorted((operator.index(token), float(bias)) for token, bias in pairs))
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias: expected numbers by token id, got {given!r:.80}") from None
    if len(made) > MOST_BIASES:
        raise ValueError(f"logit_bias: expected at most {MOST_BIASES} tokens, got {len(made)}")
    wrong = next((pair for pair in made if not abs(pair[1]) <= MOST_BIAS or pair[0] < 0), None)
    if wrong is not None:
        raise ValueError(
            f"logit_bias: expected ids from 0 on and numbers up to {MOST_BIAS:g}, got {wrong[0]}: {wrong[1]}"
        )
    return made


@dataclass(frozen=True, slots=True)
class Grammar:
    """Describe which texts an answer may be: a grammar in llguidance's form, and the file of the model's tokenizer (JSON)."""

    text: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Describe one session, as every actor receives it before the session's first row.

    `log` holds the token ids known so far: the prompt, and after a recovery also the generated tokens. Everything that an
    actor keeps can be rebuilt from it. `capacity` is the largest number of positions that the session may hold.
    """

    session: int
    epoch: int
    capacity: int
    log: tuple[int, ...] = ()
    max_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logits: bool = False
    """If true, the head sends the logits of every generated position to the gateway."""
    logprobs: int | None = None
    """If set, the head sends the log-probability of each generated token to the gateway, with those of so many likeliest."""
    grammar: Grammar | None = None
    """If set, the head chooses only tokens that this grammar allows."""
    prompt: int | None = None
    """Number of tokens of the log that were there before the answer. None: all."""
    score: bool = False
    """If true, nothing is generated, and the head sends the log-probability of each token of the log except the first.

    With `logprobs`, it also sends those of so many likeliest tokens in each place."""
    edits: tuple[Edit, ...] = ()
    """Changes of the tensors inside the model, in the order in which they are made."""
    reads: tuple[Read, ...] = ()
    """Tensors inside the model that the gateway gets."""
    traceparent: str = ""
    """W3C trace context of the request's root span (spans.py); empty if the request is not traced."""
    kept: int = 0
    """Number of positions that actors still hold from the previous epoch (see `Actor.rewind`). The rows begin after them."""
    replicas: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Replicas at which the session is opened, by actor. For an actor that is left out, it is replica 0.

    The replicas do not change while the session is open."""

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of the log belong to the prompt; the rest was generated before a recovery."""
        return len(self.log) if self.prompt is None else self.prompt

    def finished(self, generated: int, token: int) -> bool:
        """Return whether `token`, the `generated`-th of the stream, ends it. The gateway and the head use the same rule."""
        return generated >= self.max_tokens or token in self.stop_tokens

    def reason(self, token: int) -> str:
        """Return why a stream that `token` has ended is over: "stop" or "length"."""
        return "stop" if token in self.stop_tokens else "length"
