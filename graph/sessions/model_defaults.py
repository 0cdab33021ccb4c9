"""Read from a model's own files how its makers let it generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import CheckpointError

TOP_K = 50
"""`top_k` of transformers where a model samples and its files do not name it."""

NOT_BUILT_IN: Mapping[str, Any] = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "min_length": 0, "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
    "top_h": None, "guidance_scale": 1.0, "penalty_alpha": 0.0,
}  # fmt: skip
"""Fields of `generation_config.json` that change which tokens are chosen, with the values at which they do not."""


def sampling_of(checkpoint: Checkpoint, seed: int = 0) -> Sampling:
    """Return the sampling that `generation_config.json`, or a GGUF file, asks for; greedy if it asks for none.

    Fields that are left out have the values that transformers gives them.

    Raises:
        CheckpointError: a value is out of its range.
    """
    told: Mapping[str, Any] = {name: value for name, value in checkpoint.generation.items() if value is not None}
    other = next((name for name, nothing in NOT_BUILT_IN.items() if told.get(name, nothing) != nothing), None)
    if other is not None:
        raise CheckpointError(
            f"{checkpoint.path}: the model's defaults of sampling: {other} {told[other]!r:.40} is not built in; "
            "give ranvier.Sampling instead"
        )
    penalty, least = told.get("repetition_penalty", 1.0), told.get("min_new_tokens", 0)
    try:
        if not told.get("do_sample", False):
            return Sampling(repetition_penalty=penalty, min_tokens=least, seed=seed)
        return Sampling(
            temperature=told.get("temperature", 1.0),
            top_k=max(0, told.get("top_k", TOP_K)),
            top_p=told.get("top_p", 1.0),
            min_p=told.get("min_p", 0.0),
            repetition_penalty=penalty,
            min_tokens=least,
            seed=seed,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: the model's defaults of sampling: {error}") from None
