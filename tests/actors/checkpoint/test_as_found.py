"""Test safetensors as they are found: other names, heads that are stored or not, tensors that no model needs.

The oracle is transformers with the same model; what it reads from the same folder counts where the folder is odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ranvier
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.actors.model import weights
from ranvier.transport.format.header import Row

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES, "gpt2": GPT2, "gpt_neox": {**SIZES, "tie_word_embeddings": False},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0},
    "bloom": {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
}  # fmt: skip
DEEPSEEK = {
    **SIZES, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def saved(folder: Path, family: str, **changes: Any) -> tuple[Path, Any, Tensors]:
    """Write a small checkpoint; return its file, its model and its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**FAMILIES.get(family, DEEPSEEK), **changes})
    ).eval()
    model.save_pretrained(folder)
    return folder / "model.safetensors", model, load_file(folder / "model.safetensors")


def as_transformers_reads_it(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TOKENS = torch.tensor([5, 17, 42, 9, 88, 3, 61, 20])


def scores(folder: Path) -> torch.Tensor:
    """Return the log-probabilities of the tokens after the first, by a whole model in this process."""
    checkpoint = open_checkpoint(folder)
    weights.check_whole(checkpoint)
    kind = BUILT_IN["model"]
    implementation = kind.implementation if checkpoint.config.native else kind.foreign
    actor = load_class(str(implementation), None)()
    actor.load(Context("test", {}, lambda _: None, checkpoint, "float32", (0, checkpoint.config.layers - 1), 64))
    log = tuple(TOKENS.tolist())
    actor.open(ranvier.SessionInfo(session=1, epoch=1, capacity=64, log=log, max_tokens=1, score=True))
    return torch.as_tensor(actor.step(Batch((Row(1, 1, 0, len(log)),), {"token": TOKENS}))["scores"]["scores"])


@torch.inference_mode()
def check(folder: Path, model: Any) -> None:
    expected = model(TOKENS[None]).logits[0].log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]]
    assert (scores(folder) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_names_without_the_prefix_of_the_head(family: str, tmp_path: Path) -> None:
    """Read a checkpoint of which only the model below the head was saved, as transformers does."""
    file, model, tensors = saved(tmp_path, family)
    prefix = model.base_model_prefix + "."
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    check(tmp_path, as_transformers_reads_it(tmp_path))


@pytest.mark.parametrize("begin", ["language_model.", "language_model.model.", "module.", "text."])
def test_names_with_another_prefix(begin: str, tmp_path: Path) -> None:
    """Read a language model that was a part of a larger one, or was wrapped when it was saved."""
    file, model, tensors = saved(tmp_path, "llama", tie_word_embeddings=False)
    given = "model." if begin == "language_model.model." else ""
    save_file({begin + name.removeprefix(given): tensor for name, tensor in tensors.items()}, file)
    if begin == "language_model.model.":  # the head is beside the model, not in it
        moved = load_file(file)
        moved["language_model.lm_head.weight"] = moved.pop("language_model.model.lm_head.weight")
        save_file(moved, file)
    check(tmp_path, model)


def test_names_of_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    """Read names that begin like those of the model itself, and go on with the part that they are of."""
    file, model, tensors = saved(tmp_path, "llama", tie_word_embeddings=False)
    names = {name: name.replace("model.", "model.language_model.", 1) for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, file)
    check(tmp_path, model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_tied_weights_only_the_head_is_stored(family: str, tmp_path: Path) -> None:
    """Take the embedding from the head."""
    file, model, tensors = saved(tmp_path, family)
    embedding = "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, file, metadata={"format": "pt"})
    check(tmp_path, model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_the_file_has_another_head_than_its_config_says(family: str, tmp_path: Path) -> None:
    """Use the head of the file where the config says that it is the embedding, as transformers does."""
    file, model, tensors = saved(tmp_path, family)
    head = torch.randn_like(model.lm_head.weight)
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    theirs = as_transformers_reads_it(tmp_path)
    assert torch.equal(theirs.lm_head.weight, head)
    check(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tensors_that_no_model_needs(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Run a model beside tensors that it does not have, in a layer and outside, of any dtype."""
    file, model, tensors = saved(tmp_path, family)
    extra = torch.zeros(4).to(dtype)
    layer = next(name for name in tensors if ".0." in name).split(".0.")[0]
    more = {f"{layer}.0.self_attn.observer.count": extra, "observer.count": extra.clone()}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})
    check(tmp_path, model)


def test_unneeded_tensors_are_named_in_a_warning(tmp_path: Path, graph_file: Callable[..., Path]) -> None:
    """Name them in `check` and `show`; a bias that the config excludes is still refused."""
    file, _, tensors = saved(tmp_path, "llama")
    save_file({**tensors, "model.layers.0.self_attn.observer": torch.zeros(4)}, file)
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, actors={"all": {"kind": "model"}}, pipeline=["all"]
    )
    graph = ranvier.load(path, overrides={"model.source": str(tmp_path)})
    [warning] = graph.warnings
    assert warning == "tensors that a llama model does not have are not read: model.layers.0.self_attn.observer"
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, file)
    with pytest.raises(
        ranvier.GraphError, match="q_proj.bias is in the file, but a llama model with this config has no"
    ):
        ranvier.load(path, overrides={"model.source": str(tmp_path)})


def test_an_index_that_leaves_out_what_its_files_hold(tmp_path: Path) -> None:
    """Read every tensor of the files that an index names, and do without those that it names and no file has."""
    file, model, tensors = saved(tmp_path, "llama")
    file.unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, tmp_path / "two.safetensors")
    named = dict.fromkeys(names[:5], "one.safetensors") | {
        names[-1]: "two.safetensors",
        "lm_head.weight": "two.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    check(tmp_path, model)


def test_numbers_that_json_cannot_say(tmp_path: Path) -> None:
    """Read the infinity of a config as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 16, "num_heads": 6, "head_dim": 16,
             "n_groups": 2, "chunk_size": 8}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **sizes)).eval()
    model.save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    check(tmp_path, model)


def test_buffers_that_a_file_holds(tmp_path: Path) -> None:
    """Read the bias of experts, which is no parameter of the model but has trained numbers."""
    file, _, tensors = saved(tmp_path, "deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({**tensors, name: torch.linspace(-1, 1, 8)}, file, metadata={"format": "pt"})
    check(tmp_path, as_transformers_reads_it(tmp_path))
