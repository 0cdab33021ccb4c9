"""Test prompts over a model's original context: the same tokens in any chunking, as transformers in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ranvier
from ranvier.actors.checkpoint import open_checkpoint

ORIGINAL = 32
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 4.0, 7.0, 10.0],
}  # fmt: skip
SCALED = {
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": ("llama", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "yarn": ("qwen2", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "longrope": ("phi3", LONGROPE),
    "longrope without new computation": ("llama", LONGROPE),
}  # fmt: skip
LENGTHS = [(12, 6), (100, 8), (28, 16)]
"""Lengths of prompts and answers: under the original context, over it, and crossing it during the answer."""


def prompt(length: int) -> list[int]:
    return [3 + (7 * i * i + 11 * i) % 290 for i in range(length)]


def by_transformers(folder: Path, ids: list[int], count: int) -> list[int]:
    """Generate with a model that has not seen another text: its rotary embeddings remember the longest."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=count,
        do_sample=False, eos_token_id=[],
    )  # fmt: skip
    return [int(token) for token in made[0, len(ids) :]]


def model_of(tiny: Any, name: str) -> Path:
    family, rope = SCALED[name]
    more = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    longest = ORIGINAL if rope["rope_type"] == "dynamic" else 256
    folder, _ = tiny(f"scaled {name}", family, rope_parameters=rope, max_position_embeddings=longest, **more)
    return Path(folder)


QUICK = ("yarn", "longrope")
"""What the quick tests try: the scaling that runs natively and changes most, and the one that opens sessions again."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SCALED])
def test_a_prompt_over_the_original_context_is_the_same_in_any_chunks(
    name: str, tiny: Any, graph_file: Callable[..., Path], runs: Path, split: Any
) -> None:
    """Give transformers' tokens for prompts in chunks of 16 and in one piece.

    All sessions run in the same processes, the longest first: none may change the frequencies of another.
    """
    folder = model_of(tiny, name)
    expected = {length: by_transformers(folder, prompt(length), count) for length, count in LENGTHS}
    for chunk in (16, 128):
        path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=chunk, **split(2, 6))
        with ranvier.start(ranvier.load(path, overrides={"model.source": str(folder)}), runs=runs) as run:
            for length, count in reversed(LENGTHS):
                made = [token.id for token in run.generate(prompt(length), max_tokens=count, stop_tokens=())]
                assert made == expected[length], f"{length} tokens, chunks of {chunk}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "longrope", "longrope without new computation"])
def test_an_actor_that_is_lost_beyond_the_original_context_changes_nothing(
    name: str, tiny: Any, graph_file: Callable[..., Path], runs: Path, split: Any
) -> None:
    """Replay a session whose answer has crossed the original context: the same tokens as without the loss."""
    import os
    import signal

    folder = model_of(tiny, name)
    expected = by_transformers(folder, prompt(28), 16)
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(2, 6))
    with ranvier.start(ranvier.load(path, overrides={"model.source": str(folder)}), runs=runs) as run:
        made = []
        for token in run.generate(prompt(28), max_tokens=16, stop_tokens=()):
            made.append(token.id)
            if len(made) == 10:
                lost = next(pid for label, pid in run.pids.items() if not label.startswith("first"))
                os.kill(lost, signal.SIGKILL)
    assert made == expected


@pytest.mark.parametrize(("name", "native"), [("yarn", True), ("longrope", False), ("dynamic", False)])
def test_who_scales(name: str, native: bool, tiny: Any) -> None:
    """Run yarn by the native blocks, and what follows the length by transformers' layers."""
    config = open_checkpoint(model_of(tiny, name)).config
    assert config.native is native
    assert config.recomputed_after == (ORIGINAL if name == "longrope" else 0)


@pytest.mark.slow
def test_scores_of_a_text_over_the_original_context_are_those_of_one_piece(
    tiny: Any, graph_file: Callable[..., Path], runs: Path, split: Any
) -> None:
    """Score a text in chunks with the frequencies of the whole text."""
    from transformers import AutoModelForCausalLM

    folder, ids = model_of(tiny, "longrope"), prompt(80)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)[range(79), ids[1:]]
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(2, 6))
    with ranvier.start(ranvier.load(path, overrides={"model.source": str(folder)}), runs=runs) as run:
        made = torch.tensor(run.score(ids))
    assert (made - scores).abs().max() < 1e-4
