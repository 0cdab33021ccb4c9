"""Answer /v1/embeddings: texts or token ids go through a graph that ends in one vector each."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bridge.bridge import Bridge
from ..bridge.problems import FAILED, Problem
from .answers import usage
from .bodies import EmbeddingBody

MOST_INPUTS = 2048
AT_ONCE = 4
"""Inputs of one request that are on their way together: enough to keep the stages of a graph busy."""


async def answer(body: EmbeddingBody, bridge: Bridge, model: str) -> dict[str, Any]:
    """Return the vectors of a body's inputs, as floats or as float32 in base64.

    Raises:
        Problem: the graph makes no vectors, an input is empty, or there are too many.
    """
    if not bridge.run.plan.graph.embeds:
        raise Problem(400, f"the model {model!r} makes no embeddings", param="model", code="unsupported_model")
    ids = [await bridge.tokens(each, raw=True) if isinstance(each, str) else each for each in _inputs(body)]
    free = asyncio.Semaphore(AT_ONCE)

    async def vector(tokens: Sequence[int]) -> Any:
        async with free:
            return await bridge.embedded(tokens)

    vectors = await asyncio.gather(*map(vector, ids))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(made, body)} for index, made in enumerate(vectors)
    ]
    spent = usage(sum(map(len, ids)), 0)
    return {
        "object": "list", "data": data, "model": model,
        "usage": {name: spent[name] for name in ("prompt_tokens", "total_tokens")},
    }  # fmt: skip


def _inputs(body: EmbeddingBody) -> list[str | list[int]]:
    given = body.input
    if isinstance(given, str):
        inputs: list[str | list[int]] = [given]
    else:
        ids = [each for each in given if isinstance(each, int)]
        inputs = [ids] if ids else [each for each in given if not isinstance(each, int)]
    if not 1 <= len(inputs) <= MOST_INPUTS or not all(inputs):
        raise Problem(
            400, f"input: expected 1 to {MOST_INPUTS} texts or lists of tokens, none of them empty", param="input",
            code="invalid_value",
        )  # fmt: skip
    return inputs


def _encoded(vector: Any, body: EmbeddingBody) -> Any:
    numbers = np.asarray(vector, dtype=np.float32)
    if numbers.ndim == 2 and len(numbers) == 1:
        numbers = numbers[0]
    if numbers.ndim != 1:
        raise Problem(500, f"embedding: expected one vector, got the shape {list(numbers.shape)}", FAILED)
    if body.dimensions not in (None, len(numbers)):
        raise Problem(
            400, f"dimensions: the model has {len(numbers)}, and cannot give others", param="dimensions",
            code="unsupported_value",
        )  # fmt: skip
    return base64.b64encode(numbers.tobytes()).decode() if body.encoding_format == "base64" else numbers.tolist()
