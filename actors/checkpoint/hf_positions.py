"""Read from a `config.json` how rotary frequencies are scaled, and which context that gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import NotBuiltIn
from . import bounds
from .config import RopeScaling


def context_of(family: str, most: int, rope: Mapping[str, Any]) -> int:
    """Return how many positions a model can use: `factor` times the original ones, if its rotary frequencies are scaled.

    The rule is vLLM's. The configs of some ways of scaling, and of gemma3, give the number after scaling.
    """
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or factor is None or "gemma3" in family:
        return most
    before = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    numbers = bounds.number(factor, 0.0, 1e6) and bounds.whole(before or most, 1, bounds.MOST_COUNT)
    return min(max(most, int((before or most) * factor)), bounds.MOST_COUNT) if numbers else most


def rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    """Return how the frequencies are scaled, by the `rope_parameters` (earlier `rope_scaling`) of a config; None: not.

    Raises:
        NotBuiltIn: transformers' layers must do it.
        KeyError: a field is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    outside = config.get("original_max_position_embeddings")  # it takes precedence, as in transformers
    before = int(outside or rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            before,
        )
    if kind == "yarn":
        return _yarn(rope, before, int(config["max_position_embeddings"]))
    if kind == "longrope" and rope.get("short_factor") == rope.get("long_factor") and rope.get("attention_factor"):
        factors = tuple(float(factor) for factor in rope["short_factor"])
        return RopeScaling("factors", 1.0, factors=factors, attention_factor=float(rope["attention_factor"]))
    raise NotBuiltIn(f"rope type {kind!r} is not built in; built in: default, linear, llama3, yarn")


def _yarn(rope: Mapping[str, Any], before: int, most: int) -> RopeScaling:
    """Convert yarn's fields; `before` is the original context, and `most` the one after scaling.

    Where they do not give the factor of attention, it follows from the factor of the context, and that from the contexts.
    """

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    factor = float(rope["factor"]) if rope.get("factor") is not None else most / before
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None:
        attention = scale(one) / scale(all_dims) if one and all_dims else scale(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_context=before,
        attention_factor=float(attention),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
    )
