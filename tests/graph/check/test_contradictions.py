"""Refuse a checkpoint whose config contradicts its tensors, before the run is ready.

Nothing is left out or filled in silently."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranvier

NEOX = {
    "vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "initializer_range": 0.2,
    "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip


def contradicting(folder: Path, into: Path, **changes: Any) -> Path:
    """Copy a checkpoint, and change these values of its config."""
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, **changes}))
    return into


@pytest.mark.parametrize(
    ("name", "family", "made_with", "changes", "words"),
    [
        ("plain", "llama", {}, {"num_hidden_layers": 5}, "expected 5 layers, as the config says, got 6 (tensor model.layers.5."),
        ("plain", "llama", {}, {"num_hidden_layers": 7}, "expected 7 layers, as the config says, got 6 (tensor model.layers.5."),
        ("biased", "llama", {"attention_bias": True}, {"attention_bias": False},
         "tensor model.layers.0.self_attn.k_proj.bias is in the file, but a llama model with this config has no such tensor"),
        ("plain", "llama", {}, {"hidden_size": 32}, "model.embed_tokens.weight: expected shape (320, 32), got (320, 48)"),
        ("plain", "llama", {}, {"num_key_value_heads": 3}, "k_proj.weight: expected shape (24, 48), got (16, 48)"),
        ("plain", "llama", {}, {"num_attention_heads": 5, "head_dim": 8}, "expected heads as a multiple of 2 key-value heads, got 5"),
        ("other-gpt_neox", "gpt_neox", NEOX, {"num_hidden_layers": 5},
         "expected 5 layers, as the config says, got 4 (tensor gpt_neox.layers.3."),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_its_tensors(
    name: str, family: str, made_with: dict[str, Any], changes: dict[str, Any], words: str, tiny: Any,
    graph_file: Callable[..., Path], tmp_path: Path, split: Any,
) -> None:  # fmt: skip
    """Find the contradiction in the check."""
    folder, _ = tiny(name, family, **made_with)
    changed = contradicting(folder, tmp_path / "model", **changes)
    path = graph_file(model={"source": "./model", "dtype": "float32"}, **split(1, 6))
    assert changed.parent == path.parent
    with pytest.raises(ranvier.GraphError, match=re.escape(words)):
        ranvier.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 64}, ".mlp.dense_4h_to_h.weight: expected shape (48, 64), got (48, 96)"),
        pytest.param({"missing": "gpt_neox.layers.2.mlp.dense_4h_to_h.weight"},
                     "tensor gpt_neox.layers.2.mlp.dense_4h_to_h.weight is missing (missing tensors: 1)", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_the_librarys_own_layers_are_not_given(
    changes: dict[str, Any], words: str, tiny: Any, graph_file: Callable[..., Path], tmp_path: Path, runs: Path, split: Any
) -> None:  # fmt: skip
    """Refuse to start if transformers' layers lack a tensor or get one of a wrong shape.

    The library alone would compute with random numbers instead."""
    from safetensors.torch import load_file, save_file

    folder, _ = tiny("other-gpt_neox", "gpt_neox", **NEOX)
    missing = changes.pop("missing", None)
    changed = contradicting(folder, tmp_path / "model", **changes)
    if missing is not None:
        tensors = load_file(changed / "model.safetensors")
        del tensors[missing]
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    path = graph_file(model={"source": "./model", "dtype": "float32"}, **split(2, 4))
    with pytest.raises(ranvier.ActorFailed, match=re.escape(words)) as caught:
        ranvier.start(ranvier.load(path), runs=runs)
    assert caught.value.actor in ("first.0", "last.0")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma4_assistant"}, "is no model by itself: it drafts for another"),
        ({"model_type": "bert"}, "transformers knows no causal model of that type"),
        ({"model_type": "no-such-thing"}, "transformers knows no causal model of that type"),
    ],
)
def test_families_that_cannot_be_run_are_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    """Refuse a family that cannot be run, and give the reason."""
    from ranvier.actors.checkpoint.hf_config import from_hf
    from ranvier.actors.errors import NotBuiltIn

    with pytest.raises(NotBuiltIn, match=words):
        from_hf(config, "config.json")
