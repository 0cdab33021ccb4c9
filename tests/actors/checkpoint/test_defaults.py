"""Compare the fields that a config leaves out with transformers, and read what generation_config.json says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.checkpoint.hf_config import from_hf
from ranvier.actors.checkpoint.hf_defaults import DEFAULTS, NAMES, ROPE_THETA
from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import CheckpointError
from ranvier.graph.sessions.model_defaults import sampling_of


def of_library(family: str) -> dict[str, Any]:
    """Return the defaults of transformers' config class."""
    made = {}
    for field in dataclasses.fields(CONFIG_MAPPING[family]):
        if field.default is not dataclasses.MISSING:
            made[field.name] = field.default
    return made


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_table_is_that_of_transformers(family: str) -> None:
    """Give every field the default of transformers' config class, and know the other names of fields."""
    library = of_library(family)
    wrong = {name: (value, library.get(name)) for name, value in DEFAULTS[family].items() if library.get(name) != value}
    assert not wrong
    theirs = dict(CONFIG_MAPPING[family].attribute_map)
    ours = dict(NAMES.get(family, {}))
    if family == "qwen3_moe":  # the library keeps the number of experts under the other name
        theirs = {other: name for name, other in theirs.items()}
    assert ours == theirs


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "gemma3_text", "gpt2"]
)
def test_a_config_of_nothing_is_the_default_model(family: str) -> None:
    """Describe a model whose config says only its type as transformers does."""
    made, library = from_hf({"model_type": family}, "config.json"), CONFIG_MAPPING[family]()
    ours = (made.vocab, made.hidden, made.layers, made.heads, made.context, made.tied)
    assert ours == (
        library.vocab_size, library.hidden_size, library.num_hidden_layers, library.num_attention_heads,
        library.max_position_embeddings, library.tie_word_embeddings,
    )  # fmt: skip
    assert made.kv_heads == getattr(library, "num_key_value_heads", library.num_attention_heads)
    assert made.head_dim == (getattr(library, "head_dim", None) or library.hidden_size // library.num_attention_heads)
    rope = library.rope_parameters if family != "gpt2" else {"rope_theta": 0.0}
    assert made.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert family == "gpt2" or made.rope_theta == ROPE_THETA.get(family, 10_000.0)


def test_the_ends_of_generation_config_count(tiny: Any, tmp_path: Path) -> None:
    """End texts with the tokens of `generation_config.json`, which are often more than those of `config.json`."""
    folder = copied(tiny("ends")[0], tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_checkpoint(folder).config.eos_tokens == (7, 9)
    for said in ("{}", '{"eos_token_id": null, "pad_token_id": 0}', '{"eos_token_id": -1}'):  # as transformers: no end
        (folder / "generation_config.json").write_text(said)
        assert open_checkpoint(folder).config.eos_tokens == ()
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).config.eos_tokens == (2,)


@pytest.mark.parametrize(("said", "expected"), [
    ({}, Sampling()),
    ({"temperature": 0.7, "top_p": 0.9}, Sampling()),
    ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05},
     Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05)),
    ({"repetition_penalty": 1.2, "temperature": None}, Sampling(repetition_penalty=1.2)),
])  # fmt: skip
def test_sampling_as_the_model_says(said: dict[str, Any], expected: Sampling, tiny: Any, tmp_path: Path) -> None:
    """Sample as `generation_config.json` asks, with transformers' values for what it leaves out; else greedily."""
    folder = copied(tiny("ends")[0], tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert sampling_of(open_checkpoint(folder)) == expected


def test_sampling_that_cannot_be_is_refused(tiny: Any, tmp_path: Path) -> None:
    """Name the value of `generation_config.json` that is out of range."""
    folder = copied(tiny("ends")[0], tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 3}))
    with pytest.raises(CheckpointError, match="the model's defaults of sampling: top_p: expected from 0 to 1"):
        sampling_of(open_checkpoint(folder))


def copied(folder: Path, target: Path) -> Path:
    """Copy a checkpoint that a test changes."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_index_may_list_a_tensor_that_no_file_holds(tiny: Any, tmp_path: Path) -> None:
    """Open a sharded checkpoint whose index lists a tied head, and miss the tensor only if it is needed."""
    folder = copied(tiny("ends")[0], tmp_path)
    state = weights_of(folder)
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model-00001-of-00001.safetensors")
    where = {"weight_map": dict.fromkeys([*state, "lm_head.weight"], "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(where))
    opened = open_checkpoint(folder)
    assert opened.config.tied
    with pytest.raises(CheckpointError, match="tensor lm_head.weight is missing"):
        opened.require("lm_head.weight", (320, 48))


@pytest.mark.parametrize(("changed", "tied"), [(False, True), (True, False)], ids=["equal", "different"])
def test_a_head_in_the_file_wins_over_the_config(changed: bool, tied: bool, tiny: Any, tmp_path: Path) -> None:
    """Use a head that differs from the embedding, even by one number, though the config says that they are tied."""
    folder = copied(tiny("ends")[0], tmp_path)
    state = weights_of(folder)
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += float(changed)
    save_file(state | {"lm_head.weight": head}, folder / "model.safetensors")
    assert open_checkpoint(folder).config.tied is tied


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_a_checkpoint_of_the_model_below_the_head(family: str, tiny: Any, tmp_path: Path) -> None:
    """Find the tensors of a checkpoint whose names lack the prefix of the model with its head."""
    if family == "bart":
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        sizes = {
            "d_model": 16,
            "vocab_size": 40,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "decoder_start_token_id": 2,
        }
        sides = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", 1), ("ffn_dim", 8), ("attention_heads", 2))
        }
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes, **sides)).save_pretrained(tmp_path)
        folder = tmp_path
    else:
        sizes = (
            {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64, "vocab_size": 320} if family == "gpt2" else {}
        )
        folder = copied(tiny(f"below {family}", family, **sizes)[0], tmp_path)
    before = set(open_checkpoint(folder).tensors)
    state = {name.partition(".")[2]: value for name, value in weights_of(folder).items() if name != "lm_head.weight"}
    state = {name: value for name, value in state.items() if name != "" and not name.endswith("logits_bias")}
    save_file(state, folder / "model.safetensors")
    after = set(open_checkpoint(folder).tensors)
    assert after and after <= before


def test_a_tensor_of_an_unknown_dtype_is_refused_only_where_it_is_needed(tiny: Any, tmp_path: Path) -> None:
    """Open a checkpoint with a float8 scale beside ordinary weights; refuse a weight of that dtype by name."""
    folder = copied(tiny("ends")[0], tmp_path)
    state = weights_of(folder)
    save_file(
        state | {"model.layers.0.self_attn.k_scale": torch.ones(4).to(torch.float8_e4m3fn)},
        folder / "model.safetensors",
    )
    opened = open_checkpoint(folder)
    opened.require("model.norm.weight", (48,))
    narrow = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file({**state, "model.norm.weight": narrow}, folder / "model.safetensors")
    read = torch.empty(48)
    open_checkpoint(folder).read_into(
        "model.norm.weight", read
    )  # numbers that were only cast, as transformers reads them
    assert torch.equal(read, narrow.float())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F8_E4M3"', b'"F9_E5M3"'))
    with pytest.raises(CheckpointError, match="tensor model.norm.weight: dtype 'F9_E5M3' is not one of F64"):
        open_checkpoint(folder).require("model.norm.weight", (48,))
