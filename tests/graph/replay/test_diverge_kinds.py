"""Compare models that are cut in unusual ways with transformers: encoder–decoders, and models that run whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph.replay.diverge import Divergence, diverge

SOURCES = ((5, 17, 200, 33, 8, 99, 140, 3, 61, 12), (7, 7, 250), (9, 30, 31))
SIDES: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 300, "d_model": 48, "d_kv": 10, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 6,
        "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    },
    "marian": {
        "vocab_size": 300, "d_model": 48, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 3, "forced_eos_token_id": None,
    },
}  # fmt: skip
GRAPH: Mapping[str, Any] = {
    "actors": {
        "source": {"kind": "encoder_embedding"}, "begins_to_read": {"kind": "encoder", "layers": "0-1"},
        "reads": {"kind": "encoder", "layers": "2-3"}, "embed": {"kind": "embedding"},
        "begins": {"kind": "decoder", "layers": "0-1"}, "ends": {"kind": "decoder", "layers": 2}, "head": {"kind": "head"},
    },
    "edges": [
        "source.hidden -> begins_to_read.hidden", "begins_to_read.hidden -> reads.hidden", "reads.hidden -> begins.memory",
        "reads.hidden -> ends.memory", "embed.hidden -> begins.hidden", "begins.hidden -> ends.hidden",
        "ends.hidden -> head.hidden", {"from": "head.token", "to": "embed.token", "feedback": True},
    ],
}  # fmt: skip
WHOLE: Mapping[str, Any] = {"actors": {"all": {"kind": "model"}}, "pipeline": ["all"]}
SMALL = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6}
RunOf = Callable[[Any, Mapping[str, Any], Sequence[Sequence[int]]], tuple[Path, Path]]


@pytest.fixture
def run_of(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> RunOf:
    """Provide `run_of(model, graph, prompts)`, which returns the folder of a recorded run and the checkpoint.

    The checkpoint is made of this transformers model. All prompts run at once."""

    def run(model: Any, content: Mapping[str, Any], prompts: Sequence[Sequence[int]]) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp("run")
        model.save_pretrained(place / "model")
        (place / "graph.yaml").write_text(json.dumps({
            "ranvier": 1, "name": "t", "model": {"source": "./model", "dtype": "float32"}, "record": {}, **content,
        }))  # fmt: skip

        async def one(launched: ranvier.Run, prompt: Sequence[int]) -> None:
            async for _ in launched.generate(prompt, max_tokens=4, stop_tokens=()):
                pass

        async def main() -> Path:
            async with ranvier.launch(ranvier.load(place / "graph.yaml"), runs=runs) as launched:
                async with trio.open_nursery() as nursery:
                    for prompt in prompts:
                        nursery.start_soon(one, launched, prompt)
                return launched.dir

        return trio.run(main), place / "model"

    return run


def made(family: str, sizes: Mapping[str, Any], of: str = "AutoModelForCausalLM") -> Any:
    """Return a random model of transformers."""
    import transformers

    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **sizes)
    return getattr(transformers, of).from_config(config, dtype=torch.float32).eval()


def with_other_weights(model: Any, *names: str) -> Any:
    """Copy the model, and change one number of every matrix whose name contains all of `names`."""
    other = copy.deepcopy(model)
    found = [
        weight for name, weight in other.named_parameters() if all(part in name for part in names) and weight.dim() > 1
    ]
    assert found
    with torch.no_grad():
        for weight in found:
            weight[-1, -1] += 4.0
    return other


def told(folder: Path, other: Path | None, reference: Path | None) -> Divergence:
    """Return where the runs diverge."""
    return diverge(folder, other, None, reference, lambda _what, _share: None)


FAULTS = [
    pytest.param("t5", ("encoder", "block.2", "wo"), "reads", 2, "encoder hidden 3"),
    pytest.param("t5", ("encoder", "block.3", "wo"), "reads", 3, "encoder hidden 4", marks=pytest.mark.slow),
    pytest.param("t5", ("decoder", "block.0", "wo"), "begins", 0, "hidden 1", marks=pytest.mark.slow),
    pytest.param(
        "marian", ("encoder", "layers.1", "fc2"), "begins_to_read", 1, "encoder hidden 2", marks=pytest.mark.slow
    ),
    pytest.param(
        "marian", ("decoder", "layers.2", "encoder_attn.out_proj"), "ends", 2, "hidden 3", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("family", "wrong", "actor", "layer", "tensor"), FAULTS)
def test_an_encoder_and_its_decoder(
    family: str, wrong: tuple[str, ...], actor: str, layer: int, tensor: str, run_of: RunOf
) -> None:
    """Name actor, layer and tensor of a fault, against transformers and against a right run.

    The faulty run's streams come in another order. The right run does not differ from transformers."""
    model = made(family, SIDES[family], "AutoModelForSeq2SeqLM")
    right, checkpoint = run_of(model, GRAPH, SOURCES)
    other, _ = run_of(with_other_weights(model, *wrong), GRAPH, SOURCES[::-1])
    for found in (told(other, None, checkpoint), told(right, other, None)):
        assert (found.actor, found.edge, found.layer) == (actor, None, layer), found.what
        assert found.first is not None and found.first.place.name == tensor
        assert not found.notes
    same = told(right, None, None)
    assert same.first is None, same.what
    assert {"encoder hidden 0", "encoder hidden 4", "hidden 0", "hidden 3", "logits"} <= {
        place.name for place in same.largest
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("cpmant", {**SMALL, "dim_head": 8, "dim_ff": 96, "prompt_types": 4, "prompt_length": 8}),
        ("mamba", {**SMALL, "state_size": 8}),
        ("rwkv", {**SMALL, "attention_hidden_size": 48, "context_length": 128}),
        ("lfm2", {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
                  "layer_types": ["conv", "full_attention"] * 2}),
    ],
)  # fmt: skip
def test_a_model_that_runs_whole(family: str, sizes: Mapping[str, Any], run_of: RunOf) -> None:
    """Compare the layers of a model that runs whole.

    It has states, has no cache, or sees the prompt in both directions."""
    model = made(family, sizes)
    right, checkpoint = run_of(model, WHOLE, SOURCES)
    other, _ = run_of(with_other_weights(model, ".2."), WHOLE, SOURCES)
    for found in (told(other, None, checkpoint), told(right, other, None)):
        assert (found.actor, found.edge, found.layer) == ("all", None, 2), found.what
    same = told(right, None, None)
    assert same.first is None, same.what
    assert {"hidden 0", "hidden 4", "logits"} <= {place.name for place in same.largest}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("xlnet", {"vocab_size": 320, "d_model": 48, "n_layer": 4, "n_head": 6, "d_inner": 96, "initializer_range": 0.2}),
        ("blt", {
            "vocab_size": 320, "max_position_embeddings": 128, "patch_size": 4, "encoder_hash_byte_group_vocab": 50,
            "patcher_config": {**SMALL, "intermediate_size": 96, "num_hidden_layers": 1},
            "encoder_config": {**SMALL, "intermediate_size": 96, "hidden_size_global": 96, "num_hidden_layers": 1},
            "decoder_config": {**SMALL, "intermediate_size": 96, "hidden_size_global": 96, "num_hidden_layers": 2},
            "global_config": {**SMALL, "intermediate_size": 96, "hidden_size": 96},
        }),
    ],
)  # fmt: skip
def test_a_model_whose_layers_have_nothing_of_each_token(family: str, sizes: Mapping[str, Any], run_of: RunOf) -> None:
    """Compare only the logits of a model whose layers have no tensor per token."""
    model = made(family, sizes)
    right, checkpoint = run_of(model, WHOLE, SOURCES)
    same = told(right, None, None)
    assert same.first is None, same.what
    assert {place.name for place in same.largest} == {"logits"}
    other, _ = run_of(with_other_weights(model, "lm_head" if family == "blt" else "word_embedding"), WHOLE, SOURCES)
    found = told(other, None, checkpoint)
    assert (found.actor, found.layer) == ("all", None), found.what
