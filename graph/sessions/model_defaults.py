"""Read from a model's own files how its makers let it generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import CheckpointError

TOP_K = 50
"""`top_k` of transformers where a model samples and its files do not name it."""


def sampling_of(checkpoint: Checkpoint, seed: int = 0) -> Sampling:
    """Return the sampling that `generation_config.json`, or a GGUF file, asks for; greedy if it asks for none.

    Fields that are left out have the values that transformers gives them.

    Raises:
        CheckpointError: a value is out of its range.
    """
    told: Mapping[str, Any] = {name: value for name, value in checkpoint.generation.items() if value is not None}
    penalty = told.get("repetition_penalty", 1.0)
    try:
        if not told.get("do_sample", False):
            return Sampling(repetition_penalty=penalty, seed=seed)
        return Sampling(
            temperature=told.get("temperature", 1.0),
            top_k=max(0, told.get("top_k", TOP_K)),
            top_p=told.get("top_p", 1.0),
            min_p=told.get("min_p", 0.0),
            repetition_penalty=penalty,
            seed=seed,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: the model's defaults of sampling: {error}") from None
