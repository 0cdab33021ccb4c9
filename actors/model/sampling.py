"""Choose tokens from logits: the same (seed, position) gives the same draw on any host at any time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..component.session import Sampling

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


def filtered(logits_V: torch.Tensor, sampling: Sampling, seen: Sequence[int]) -> torch.Tensor:
    """Return float32 logits after penalty, temperature, top-k, top-p and min-p, with -inf for tokens that are excluded.

    The order and the edge cases are those of transformers' logits processors.
    """
    logits_V = logits_V.float()
    if sampling.repetition_penalty != 1 and seen:
        tokens = torch.tensor(sorted(set(seen)))
        picked = logits_V[tokens]
        penalty = sampling.repetition_penalty
        logits_V = logits_V.clone()
        logits_V[tokens] = torch.where(picked < 0, picked * penalty, picked / penalty)
    if sampling.temperature not in (0, 1):
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


def choose(logits_V: torch.Tensor, sampling: Sampling, position: int, seen: Sequence[int]) -> int:
    """Return the token for `position`: the likeliest if the temperature is 0, else a draw keyed by (seed, position).

    Args:
        logits_V: the model's logits, any floating dtype, one per token of the vocabulary.
        seen: the tokens of the prompt and of the answer so far, for the repetition penalty.
    """
    if sampling.temperature == 0:
        if sampling.repetition_penalty != 1:
            logits_V = filtered(logits_V, Sampling(repetition_penalty=sampling.repetition_penalty), seen)
        return int(logits_V.argmax())
    # float64: a draw must not fall into the rounding error at the end of the cumulative sum
    cumulative = filtered(logits_V, sampling, seen).double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], right=True)
    return min(int(drawn), int(cumulative.numel()) - 1)
