"""Choose tokens from logits: the same (seed, position) gives the same draw on any host at any time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from ..component.session import MOST_LOGPROBS, Sampling
from ..errors import NotFinite
from .kernels import packed

NOWHERE = 2**31 - 1
"""Stand for the token of a row whose largest logit is not finite."""
_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) keyed by (seed, position), by SplitMix64 (Steele, Lea and Flood 2014) over both."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        state = mixed ^ (mixed >> 31)
    return (state >> 11) / (1 << 53)


def filtered(logits_V: torch.Tensor, sampling: Sampling, seen: Sequence[int], prompt_tokens: int = 0) -> torch.Tensor:
    """Return float32 logits after all that `Sampling` asks for, with -inf for tokens that are excluded.

    The order and the edge cases are those of transformers' logits processors. `seen` holds the prompt and the answer so
    far, and `prompt_tokens` says how many of them are the prompt.
    """
    logits_V = adjusted(logits_V, sampling, seen, prompt_tokens)
    if not sampling.greedy and sampling.temperature != 1:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        least = torch.topk(logits_V, sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = torch.sort(logits_V)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[-1] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    return logits_V


def adjusted(logits_V: torch.Tensor, sampling: Sampling, seen: Sequence[int], prompt_tokens: int = 0) -> torch.Tensor:
    """Return float32 logits after biases and penalties, which also apply to greedy decoding."""
    logits_V = logits_V.float()
    repeated = sampling.repetition_penalty != 1 and len(seen) > 0
    answer = seen[prompt_tokens:] if sampling.presence_penalty or sampling.frequency_penalty else ()
    if not (repeated or answer or sampling.logit_bias):
        return logits_V
    logits_V = logits_V.clone()
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits_V[torch.tensor(tokens)] += torch.tensor(biases)
    if repeated:
        tokens_S = torch.tensor(sorted(set(seen)))
        picked, penalty = logits_V[tokens_S], sampling.repetition_penalty
        logits_V[tokens_S] = torch.where(picked < 0, picked * penalty, picked / penalty)
    if answer:
        tokens_S, counts_S = torch.unique(torch.tensor(answer), return_counts=True)
        logits_V[tokens_S] -= sampling.presence_penalty + sampling.frequency_penalty * counts_S
    return logits_V


def choose(
    logits_V: torch.Tensor,
    sampling: Sampling,
    position: int,
    seen: Sequence[int],
    prompt_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
) -> int:
    """Return the token for `position`: the likeliest if `sampling` is greedy, else a draw keyed by (seed, position).

    Args:
        logits_V: the model's logits, any floating dtype, one per token of the vocabulary.
        sampling: how to choose.
        position: the position of the token in its session.
        seen: the tokens of the prompt and of the answer so far, for the penalties.
        prompt_tokens: how many of them are the prompt.
        stop_tokens: tokens that are excluded until the answer has `sampling.min_tokens` tokens.

    Raises:
        NotFinite: the largest logit is not a finite number.
    """
    if stop_tokens and len(seen) - prompt_tokens < sampling.min_tokens:
        known = [token for token in stop_tokens if 0 <= token < logits_V.numel()]
        logits_V = logits_V.index_fill(0, torch.tensor(known, dtype=torch.long), float("-inf"))
    if sampling.greedy:
        return likeliest(adjusted(logits_V, sampling, seen, prompt_tokens).contiguous()[None], 0)
    _make_sure_of_logit(float(logits_V.max()))
    # float64: a draw must not fall into the rounding error at the end of the cumulative sum
    cumulative = filtered(logits_V, sampling, seen, prompt_tokens).double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], right=True)
    return min(int(drawn), int(cumulative.numel()) - 1)


def as_they_are(sampling: Sampling) -> bool:
    """Return whether each token is the likeliest one by the model's own logits, so that `likeliest` finds it."""
    changed = sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias or sampling.min_tokens
    return sampling.greedy and not changed and sampling.repetition_penalty == 1


def likeliest(logits_RV: torch.Tensor, row: int, allowed: bytes | None = None) -> int:
    """Return the token with the largest logit of a row of contiguous float32 logits, with few operations of torch.

    `allowed`, which needs compiled kernels, has a bit for each token: only tokens whose bit is set are looked at.

    Raises:
        NotFinite: the largest logit is not a finite number, or no token is allowed.
    """
    kernels, count = packed.library(), logits_RV.shape[1]
    at = logits_RV.data_ptr() + 4 * count * row
    if kernels is None:
        token = int(logits_RV[row].argmax())
    elif allowed is None:
        token = kernels.ranvier_largest(at, count)
    else:
        assert 8 * len(allowed) >= count
        token = kernels.ranvier_largest_allowed(at, count, allowed)
        if token < 0:
            raise NotFinite("logits", -math.inf)
    _make_sure_of_logit(ctypes.c_float.from_address(at + 4 * token).value)  # NaN is the largest for both
    return token


def likeliest_of_each(logits_RV: torch.Tensor) -> list[int]:
    """Return the token with the largest logit of each row; NOWHERE where that logit is not finite.

    The logits are contiguous, in float32. The tokens are found where the logits are, in this machine's memory by all threads.
    """
    kernels, (rows, count) = packed.library(), logits_RV.shape
    if kernels is not None and logits_RV.is_cpu:
        places = (ctypes.c_int64 * rows)()
        kernels.ranvier_largest_of_rows(logits_RV.data_ptr(), rows, count, places)
        return list(places)
    best_R, token_R = logits_RV.max(-1)  # NaN is the largest
    found: list[int] = token_R.masked_fill(~best_R.isfinite(), NOWHERE).tolist()
    return found


def make_sure_of(token: int, logits_RV: torch.Tensor, row: int) -> int:
    """Return a token that was found for a row of logits.

    Raises:
        NotFinite: it is NOWHERE.
    """
    if token == NOWHERE:
        raise NotFinite("logits", float(logits_RV[row].max()))
    return token


def _make_sure_of_logit(best: float) -> None:
    if not math.isfinite(best):
        raise NotFinite("logits", best)


def log_probabilities(logits_V: torch.Tensor, token: int, most: int) -> torch.Tensor:
    """Return the log-probabilities of a token and of the `most` likeliest ones, float32 [2 * (MOST_LOGPROBS + 1)].

    They are those of the model, before penalties and temperature. Pairs of a token's id and its log-probability: first
    the given token, then the likeliest ones. The pairs that were not asked for have the id -1.
    """
    logits_V = logits_V.float()
    total = logits_V.logsumexp(-1)
    made = torch.full((MOST_LOGPROBS + 1, 2), -1.0)
    made[0] = torch.stack([torch.tensor(float(token)), logits_V[token] - total])
    count = min(most, logits_V.numel())
    if count:
        values, tokens = logits_V.topk(count)
        made[1 : count + 1, 0], made[1 : count + 1, 1] = tokens.float(), values - total
    return made.view(-1)
