"""Check cache, sampling and attention against transformers, and by their own invariants."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ranvier.actors.checkpoint.config import ModelConfig
from ranvier.actors.component.session import Sampling, SessionInfo
from ranvier.actors.model.blocks import attend
from ranvier.actors.model.kv_cache import KVCache, SessionCache
from ranvier.actors.model.sampling import choose, filtered, uniform

CONFIG = ModelConfig("llama", 16, 32, 2, 4, 2, 8, 64, 64, 1e-5, 1e4, None, True)


@pytest.mark.parametrize("seed", range(12))
def test_filters_are_those_of_transformers(seed: int) -> None:
    """Keep the same tokens with the same logits as transformers.

    The settings mix penalty, temperature, top-k, top-p and min-p."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    logits = torch.randn(50) * 3
    sampling = Sampling(
        temperature=rng.choice([0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 7, 60]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.05, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.3]),
    )
    seen = [3, 3, 17, 42]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(MinPLogitsWarper(sampling.min_p))
    expected = processors(torch.tensor([seen]), logits[None].clone())[0]
    assert torch.allclose(filtered(logits, sampling, seen), expected, atol=1e-6)


def test_draws_follow_the_distribution_and_the_key() -> None:
    """Draw ten thousand positions as softmax says, and draw the same tokens again for the same seed."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(temperature=1.0, seed=11)
    draws = [choose(logits, sampling, position, ()) for position in range(10_000)]
    counts = torch.bincount(torch.tensor(draws), minlength=4) / 10_000
    assert (counts - logits.softmax(-1)).abs().max() < 0.02
    assert draws[:50] == [choose(logits, sampling, position, ()) for position in range(50)]
    assert draws[:50] != [choose(logits, Sampling(temperature=1.0, seed=12), position, ()) for position in range(50)]


def test_uniform_is_uniform() -> None:
    """Spread the numbers evenly over [0, 1), with mean 1/2 and variance 1/12."""
    values = torch.tensor([uniform(seed, position) for seed in range(20) for position in range(500)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / 12) < 0.005


def test_greedy_with_a_penalty() -> None:
    """Choose another token once the penalty puts the likeliest token behind it."""
    assert choose(torch.tensor([2.0, 1.9]), Sampling(), 0, [0]) == 0
    assert choose(torch.tensor([2.0, 1.9]), Sampling(repetition_penalty=1.2), 0, [0]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    """Refuse a sampling setting that is out of range, and name it."""
    [name] = wrong
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_a_session_survives_plain_data() -> None:
    """Restore an equal SessionInfo from its plain data."""
    info = SessionInfo(1, 2, 30, (1, 2), 5, (9,), Sampling(0.5, seed=3), logits=True)
    assert msgspec.convert(msgspec.to_builtins(info), SessionInfo) == info


def test_the_cache_takes_each_position_once() -> None:
    """Refuse a step at any position but the end, or over the capacity, and leave the cache unchanged."""
    cache = KVCache(20, lambda capacity: SessionCache(CONFIG, 2, capacity, torch.float32))
    cache.open(1, 12)
    cache.at(1, 0, 5).length = 5
    for position in (0, 4, 6):
        with pytest.raises(ValueError, match=f"session 1: expected position 5, got {position}"):
            cache.at(1, position, 1)
    with pytest.raises(ValueError, match="over its capacity 12"):
        cache.at(1, 5, 8)
    assert cache.at(1, 5, 7).length == 5


def test_the_cache_admits_what_fits() -> None:
    """Admit a session only if its tokens fit, and free them when it closes or opens again."""
    cache = KVCache(20, lambda capacity: SessionCache(CONFIG, 2, capacity, torch.float32))
    cache.open(1, 12)
    with pytest.raises(MemoryError, match="session 2 needs 9 tokens, 8 of 20 are free"):
        cache.open(2, 9)
    cache.open(1, 5)  # opened again: its 12 tokens are freed first
    cache.open(2, 9)
    cache.close(1)
    cache.close(1)
    assert cache.reserved == 9


@pytest.mark.parametrize("window", [0, 4, 20])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 9), (5, 5), (3, 9)])
def test_attention_is_causal_attention(tokens: int, positions: int, window: int) -> None:
    """Match the plain formula with repeated heads.

    The cases are a first step, one token, a whole prompt and a later chunk."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(tokens, 6, 8), torch.randn(2, positions, 8), torch.randn(2, positions, 8)
    expected = torch.empty(tokens, 6, 8)
    for token in range(tokens):
        last = positions - tokens + token + 1
        for head in range(6):
            first = max(0, last - window) if window else 0
            scores = keys[head // 3, first:last] @ query[token, head] / 8**0.5
            expected[token, head] = scores.softmax(-1) @ values[head // 3, first:last]
    seen = max(0, positions - tokens + 1 - window) if window else 0  # the caller passes only positions in the window
    mixed = attend(query, keys[:, seen:], values[:, seen:], 8**-0.5, window)
    assert torch.allclose(mixed.view(tokens, 6, 8), expected, atol=1e-5)
