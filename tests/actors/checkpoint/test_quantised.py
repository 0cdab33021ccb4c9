"""Test quantised checkpoints: matrices as the packages write them that people quantise with (see `data/README.md`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ranvier
from ranvier.actors.checkpoint import open_checkpoint, quant_methods
from ranvier.actors.checkpoint.quant_methods import METHODS
from ranvier.actors.checkpoint.quantised import Quantised
from ranvier.actors.checkpoint.tensors import open_tensors
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.actors.errors import CheckpointError
from ranvier.actors.model import weights
from ranvier.actors.model.kernels import packed
from ranvier.actors.model.tensors import KINDS
from ranvier.transport.format.header import Row

DATA = Path(__file__).parent / "data"
FORMS: dict[str, dict[str, Any]] = json.loads((DATA / "quantised.json").read_text())
IN_A_LLAMA = [name for name in FORMS if name not in ("gpt_oss_mxfp4", "ct_mixed", "gptq_dynamic", "fp8_channel_fbgemm")]
"""Forms whose data is a key matrix: 64 rows, and as many columns as the model is wide."""
TILES = {
    "autoround_awq": "int8", "autoround_gptq_asym": "int8", "awq_gemm_g32": "int8", "ct_mxfp4": "int8", "ct_nvfp4": None,
    "ct_w4a16_g32_sym": "int4", "ct_w8a16_channel_sym": "int8", "fp8_block": None, "gptq_w4_g32_sym": "int4",
    "gptq_w4_g32_act_asym": None, "gptq_w8_g32_sym": "int8", "modelopt_nvfp4": None,
}  # fmt: skip
"""Tiles that hold a form without rounding: int4 if its zeros times its scales are float16, too, else int8."""


def tensors_of(form: str) -> dict[str, torch.Tensor]:
    found = load_file(DATA / "quantised.safetensors")
    return {name.split("/")[1]: tensor for name, tensor in found.items() if name.startswith(form + "/")}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], form: str) -> Path:
    """Write a checkpoint whose quantisation is described as in the form's own checkpoint."""
    told = FORMS[form]
    if told["key"].endswith(".json"):
        (folder / told["key"]).write_text(json.dumps(told["config"]))
    else:
        config = {**config, told["key"]: told["config"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def llama(columns: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96, hidden_size=columns, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def quantised_llama(folder: Path, form: str) -> tuple[Path, Any]:
    """Write a llama whose queries, keys and values have the form's matrix; return it, and its model with the float numbers."""
    parts = tensors_of(form)
    [(name, expected)] = FORMS[form]["expected"].items()
    model = llama(expected["shape"][1])
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for part in ("q_proj", "k_proj", "v_proj"):
        del tensors[name.replace("k_proj", part)]
        tensors |= {key.replace("k_proj", part): value.clone() for key, value in parts.items()}
    write(folder, model.config.to_dict(), tensors, form)
    numbers = torch.empty(expected["shape"])
    open_checkpoint(folder).read_into(name, numbers)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight.copy_(numbers)
    return folder, model


def entries_of(folder: Path, form: str) -> dict[str, Any]:
    """Open the tensors of a form without a model around them."""
    write(folder, {}, tensors_of(form), form)
    config = json.loads((folder / "config.json").read_text())
    found: Any = open_tensors(folder / "model.safetensors").tensors
    return quant_methods.entries(found, quant_methods.settings_of(config, folder), folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_has_the_numbers_of_its_package(form: str, tmp_path: Path) -> None:
    """Read every matrix bit for bit as the reference package does, in float32."""
    entries = entries_of(tmp_path, form)
    for name, expected in FORMS[form]["expected"].items():
        entry = entries[name]
        assert isinstance(entry, Quantised)
        assert entry.shape == tuple(expected["shape"])
        entry.check()
        numbers = torch.empty(entry.shape)
        entry.read_into(numbers)
        assert numbers.flatten()[:6].tolist() == expected["first"]
        assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("form", FORMS)
def test_tiles_hold_what_they_can_without_rounding(form: str, tmp_path: Path) -> None:
    """Hold a matrix in tiles of int4 or int8 only if that changes no number."""
    for entry in entries_of(tmp_path, form).values():
        if not isinstance(entry, Quantised) or len(entry.shape) != 2:
            continue
        assert form not in TILES or entry.tile == TILES[form]
        if entry.tile is None or packed.library() is None:
            continue
        numbers = torch.empty(entry.shape)
        entry.read_into(numbers)
        for tile in {"int4": ("int4", "int8"), "int8": ("int8",)}[entry.tile]:
            made = packed.pack_codes([entry.codes(tile), entry.codes(tile)], KINDS[tile])
            assert torch.equal(
                made.rows(torch.arange(2 * entry.shape[0]), torch.float32), torch.cat((numbers, numbers))
            )


def scores(folder: Path, tokens: torch.Tensor, dtype: str, precision: str) -> torch.Tensor:
    """Return the log-probabilities of the tokens after the first, by a whole model in this process."""
    actor = load_class(str(BUILT_IN["model"].implementation), None)()
    actor.load(Context("test", {}, lambda _: None, open_checkpoint(folder), dtype, (0, 0), 64, precision=precision))
    info = ranvier.SessionInfo(session=1, epoch=1, capacity=64, log=tuple(tokens.tolist()), max_tokens=1, score=True)
    actor.open(info)
    return torch.as_tensor(actor.step(Batch((Row(1, 1, 0, len(tokens)),), {"token": tokens}))["scores"]["scores"])


@pytest.mark.parametrize("form", IN_A_LLAMA)
@torch.inference_mode()
def test_a_quantised_model_gives_the_scores_of_the_dequantised_one(form: str, tmp_path: Path) -> None:
    """Give transformers' log-probabilities with the float numbers: in float32, and held as stored within what tiles round.

    Products with tiles of int8 and int4 round the tokens to 255 steps."""
    with torch.inference_mode(False):
        folder, model = quantised_llama(tmp_path, form)
    assert weights.check_whole(open_checkpoint(folder)) == []
    tokens = torch.arange(5, 45)
    expected = model(tokens[None]).logits[0].log_softmax(-1)[range(39), tokens[1:]]
    assert (scores(folder, tokens, "float32", "dtype") - expected).abs().max() < 1e-4
    if packed.library() is not None:
        assert (scores(folder, tokens, "bfloat16", "stored") - expected).abs().mean() < 0.05


@pytest.mark.skipif(packed.library() is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("gptq_w4_g32_sym", "1 x gptq int4 as int4"), ("awq_gemm_g32", "1 x awq int4 as int8"),
        ("ct_nvfp4", "1 x nvfp4 as bfloat16"), ("fp8_block", "1 x fp8 as bfloat16"),
    ],
)  # fmt: skip
def test_show_says_how_the_matrices_are_held(
    form: str, words: str, tmp_path: Path, graph_file: Callable[..., Path]
) -> None:
    """Say for each stored form in which form it is held in memory."""
    from ranvier.graph.plan import show
    from ranvier.graph.plan.plan import plan

    folder, _ = quantised_llama(tmp_path, form)
    model = {"source": "unset", "dtype": "bfloat16", "weights": "stored"}
    path = graph_file(model=model, actors={"all": {"kind": "model"}}, pipeline=["all"])
    text = show.text(plan(ranvier.load(path, overrides={"model.source": str(folder)})))
    [line] = [line for line in text.splitlines() if line.startswith("weights in memory: ")]
    assert words in line
    assert "x float32 as bfloat16" in line


def test_quantised_weights_generate_in_processes(tmp_path: Path, graph_file: Callable[..., Path], runs: Path) -> None:
    """Give the tokens of the dequantised model, in two processes."""
    folder, model = quantised_llama(tmp_path, "gptq_w4_g32_sym")
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, actors={"a": {"kind": "embedding"}, "b": {"kind": "last_stage", "layers": "0"}},
        pipeline=["a", "b"],
    )  # fmt: skip
    with ranvier.start(ranvier.load(path, overrides={"model.source": str(folder)}), runs=runs) as run:
        made = [token.id for token in run.generate([5, 9, 17], max_tokens=12, stop_tokens=())]
    ids = torch.tensor([[5, 9, 17]])
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert made == out[0, 3:].tolist()


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
KEY = "model.layers.0.self_attn.k_proj."


def dropped(name: str) -> Change:
    return lambda _, tensors: tensors.pop(KEY + name)


def setting(**values: Any) -> Change:
    return lambda config, _: config.update(values)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, tensors: tensors.update({KEY + name: change(tensors[KEY + name])})


def with_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        made.view(-1)[0] = value
        return made

    return change


WRONG: list[tuple[str, Change, str]] = [
    ("gptq_w4_g32_sym", dropped("qzeros"), "needs a tensor qzeros beside it, which is missing"),
    ("gptq_w4_g32_sym", setting(bits=5), "bits 5 is not built in; built in: 2, 3, 4, 8"),
    ("gptq_w4_g32_sym", setting(bits=8), "k_proj.g_idx: expected int32 or int64[64], got int32[128]"),
    ("gptq_w4_g32_sym", setting(group_size=0), "group_size: expected a positive integer or -1, got 0"),
    ("gptq_w4_g32_sym", setting(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not built in"),
    ("gptq_w4_g32_sym", setting(checkpoint_format="gptq_v2"), "k_proj.qzeros: expected the zero 8 of a symmetric model, got 7"),
    ("gptq_w4_g32_sym", setting(quant_method="hqq"), "quantised by 'hqq', which is not built in; built in: fp8"),
    ("gptq_w4_g32_sym", changed("scales", lambda t: t[:-1].clone()), "k_proj.scales: expected float16 or bfloat16 or float32[4, 64]"),
    ("gptq_w4_g32_sym", changed("scales", with_number(float("nan"))), "k_proj.scales: expected finite scales, got nan"),
    ("gptq_w4_g32_act_asym", changed("g_idx", with_number(4)), "k_proj.g_idx: expected groups from 0 to 3, got 0 to 4"),
    ("gptq_w4_g32_act_asym", changed("g_idx", with_number(-1)), "k_proj.g_idx: expected groups from 0 to 3, got -1 to 3"),
    ("awq_gemm_g32", dropped("qzeros"), "needs a tensor qzeros beside it, which is missing"),
    ("awq_gemm_g32", setting(version="gemv_fast"), "version 'gemv_fast' is not built in; built in: gemm, gemv"),
    ("awq_gemm_g32", setting(group_size=48), "expected groups that divide 128 columns, got groups of 48"),
    ("fp8_block", dropped("weight_scale_inv"), "needs a tensor weight_scale_inv beside it, which is missing"),
    ("fp8_block", changed("weight_scale_inv", lambda t: t.t().contiguous()), "k_proj.weight_scale_inv: expected float32"),
    ("fp8_block", setting(weight_block_size=[0, 128]), "the size of blocks: expected two positive integers, got [0, 128]"),
    ("fp8_block", setting(fmt="e5m2"), "fmt 'e5m2' is not built in; built in: e4m3"),
    ("fp8_block_ue8m0", changed("weight_scale_inv", lambda t: torch.full_like(t.view(torch.uint8), 255)), "expected finite scales, got nan"),
    ("ct_w4a16_g32_sym", changed("weight_shape", lambda t: t * 2), "k_proj.weight_packed: expected int32[128, 32]"),
    ("ct_w4a16_g32_asym", dropped("weight_zero_point"), "needs a tensor weight_zero_point beside it, which is missing"),
    ("ct_w4a16_g32_sym", setting(ignore=["re:.*k_proj"]), "but quantization_config does not say how model.layers.0.self_attn.k_proj is quantised"),
    ("ct_w4a16_g32_sym", setting(transform_config={"R1": {}}), "transform_config is not built in"),
    ("ct_w4a16_g32_sym", setting(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config of the format 'sparse-24-bitmask'"),
    ("ct_w4a16_g32_sym", setting(config_groups={}), "expected an object 'config_groups', got {}"),
    ("ct_nvfp4", changed("weight_global_scale", with_number(0.0)), "k_proj.weight_global_scale: expected finite scales, got 0.0"),
    ("bnb_nf4_double", dropped("weight.quant_map"), "needs a tensor quant_map beside it, which is missing"),
    ("bnb_nf4_double", changed("weight.nested_absmax", with_number(float("inf"))), "k_proj.weight.nested_absmax: expected finite"),
    ("bnb_fp4", changed("weight.absmax", lambda t: t[:-1].clone()), "k_proj.weight.absmax: expected float32[128], got float32[127]"),
    ("bnb_fp4", changed("weight.quant_state.bitsandbytes__fp4", lambda t: t[:-9].clone()), "expected JSON with shape and blocksize"),
    ("bnb_int8", changed("weight_format", lambda t: t + 1), "k_proj.weight_format: expected 0"),
    ("modelopt_nvfp4", setting(quant_algo="NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ' is not built in; built in: FP8"),
    ("modelopt_nvfp4", changed("weight_scale", lambda t: t[:, :-1].contiguous()), "k_proj.weight_scale: expected float8_e4m3fn[64, 8]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "change", "words"), WRONG, ids=[f"{form}-{number}" for number, (form, _, _) in enumerate(WRONG)]
)
def test_a_file_that_does_not_fit_its_method_is_refused(
    form: str, change: Change, words: str, tmp_path: Path, graph_file: Callable[..., Path]
) -> None:
    """Name file, tensor and field in the check, before anything is started."""
    folder, _ = quantised_llama(tmp_path, form)
    key = FORMS[form]["key"]
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config[key], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, actors={"all": {"kind": "model"}}, pipeline=["all"]
    )
    with pytest.raises(ranvier.GraphError) as caught:
        ranvier.load(path, overrides={"model.source": str(folder)})
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_weights_twice_are_refused(tmp_path: Path) -> None:
    """Refuse a module that has both its plain weight and a quantised one."""
    folder, model = quantised_llama(tmp_path, "gptq_w4_g32_sym")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, KEY + "weight": model.state_dict()[KEY + "weight"]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has both .*k_proj.weight and .*k_proj.qweight"):
        open_checkpoint(folder)


def test_biases_of_zeros_are_not_missed(tmp_path: Path) -> None:
    """Ignore the biases of zeros that some packages write for models without biases; refuse other numbers."""
    folder, _ = quantised_llama(tmp_path, "gptq_w4_g32_sym")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, KEY + "bias": torch.zeros(64)}, folder / "model.safetensors")
    assert weights.check_whole(open_checkpoint(folder)) == []
    save_file({**tensors, KEY + "bias": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="k_proj.bias is in the file, but a llama model with this config has no such"
    ):
        weights.check_whole(open_checkpoint(folder))


def test_every_method_has_data() -> None:
    """Try every method that is built in; `sparseml` is an older name of compressed-tensors."""
    used = {str(told["config"].get("quant_method", "modelopt")) for told in FORMS.values()}
    assert {*METHODS} - {"sparseml"} <= used


@pytest.mark.parametrize("first", ["class", "name", "expression"])
def test_a_group_that_names_a_module_comes_before_its_class(first: str, tmp_path: Path) -> None:
    """Choose the group of a module by its name, else by an expression, else by its class, whatever comes first."""
    form = "ct_w4a16_g32_asym"
    told = json.loads(json.dumps(FORMS[form]))
    [right] = told["config"]["config_groups"].values()
    wrong = {**right, "weights": {**right["weights"], "symmetric": True}}
    name = KEY.removesuffix(".")
    groups = {
        "class": {**wrong, "targets": ["Linear"]}, "expression": {**wrong, "targets": ["re:.*k_proj"]},
        "name": {**right, "targets": [name]},
    }  # fmt: skip
    told["config"]["config_groups"] = {first: groups.pop(first), **groups}
    save_file(tensors_of(form), tmp_path / "model.safetensors")
    found: Any = open_tensors(tmp_path / "model.safetensors").tensors
    numbers = torch.empty(FORMS[form]["expected"][f"{name}.weight"]["shape"])
    quant_methods.entries(found, told["config"], tmp_path)[f"{name}.weight"].read_into(numbers)
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == FORMS[form]["expected"][f"{name}.weight"]["sha256"]


@pytest.mark.parametrize("form", ["fp8_block", "gptq_w4_g32_sym"])
def test_scales_without_settings_are_refused(form: str, tmp_path: Path) -> None:
    """Refuse quantised weights whose config does not say so: without their scales, they would be wrong numbers."""
    folder, _ = quantised_llama(tmp_path, form)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="belongs to quantised weights, but .*config.json has no quantization_config"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("gptq_w4_g32_sym", "gptq"), ("gptq_w4_g32_sym", ["gptq"]), ("gptq_w4_g32_sym", 4), ("gptq_w4_g32_sym", {"bits": 4}),
        ("gptq_w4_g32_sym", {"quant_method": "gptq", "bits": "four"}), ("gptq_w4_g32_sym", {"quant_method": "gptq", "bits": 4, "dynamic": ["x"]}),
        ("gptq_w4_g32_sym", {"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}),
        ("ct_w4a16_g32_sym", {"quant_method": "compressed-tensors", "config_groups": [1]}),
        ("ct_w4a16_g32_sym", {"quant_method": "compressed-tensors", "config_groups": {"g": 5}}),
        ("ct_w4a16_g32_sym", {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": None, "weights": {}}}}),
        ("ct_w4a16_g32_sym", {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [3], "weights": {}}}}),
        ("ct_w4a16_g32_sym", {"quant_method": "compressed-tensors", "ignore": ["re:("], "config_groups": {"g": {"targets": ["Linear"]}}}),
        ("fp8_block", {"quant_method": "fp8", "weight_block_size": "wide"}), ("fp8_block", {"quant_method": {}}),
    ],
)  # fmt: skip
def test_settings_of_other_types_are_refused(form: str, settings: Any, tmp_path: Path) -> None:
    """Raise no other error than that of a checkpoint, and name the folder."""
    folder, _ = quantised_llama(tmp_path, form)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("pattern", ["(.+)+!$", "(a|aa)*b", ".*.*.*.*.*.*.*x", "(", "[a-"])
@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_expressions_that_take_too_long_are_refused(pattern: str, place: str, tmp_path: Path) -> None:
    """Refuse a regular expression that repeats a group or has many repetitions, and one that is none."""
    form = "ct_w4a16_g32_sym"
    told = json.loads(json.dumps(FORMS[form]["config"]))
    if place == "ignore":
        told["ignore"] = [f"re:{pattern}"]
    else:
        told["config_groups"]["more"] = {"targets": [f"re:{pattern}"], "weights": {}}
    save_file(tensors_of(form), tmp_path / "model.safetensors")
    found: Any = open_tensors(tmp_path / "model.safetensors").tensors
    with pytest.raises(CheckpointError, match="quantization_config: "):
        quant_methods.entries(found, told, tmp_path)


def test_an_index_of_zeros_means_groups_in_order(tmp_path: Path) -> None:
    """Take the groups in order where an older GPTQ file has an index of zeros, as vLLM does."""
    form = "gptq_w4_g32_sym"
    tensors = tensors_of(form)
    tensors[KEY + "g_idx"] = torch.zeros_like(tensors[KEY + "g_idx"])
    save_file(tensors, tmp_path / "model.safetensors")
    found: Any = open_tensors(tmp_path / "model.safetensors").tensors
    [(name, expected)] = FORMS[form]["expected"].items()
    numbers = torch.empty(expected["shape"])
    quant_methods.entries(found, FORMS[form]["config"], tmp_path)[name].read_into(numbers)
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("scale", ["tensor", "row", "block"])
def test_experts_of_eight_bits_in_one_tensor(scale: str, tmp_path: Path) -> None:
    """Multiply each expert by its scales: one, one for each row, or one for each block, of which the last are smaller."""
    numbers = torch.randn(3, 40, 48).to(torch.float8_e4m3fn)
    scales, wide = {
        "tensor": (s := torch.rand(3, 1, 1), s), "row": (s := torch.rand(3, 40, 1), s),
        "block": (s := torch.rand(3, 3, 3), s.repeat_interleave(16, 1)[:, :40].repeat_interleave(16, 2)),
    }[scale]  # fmt: skip
    name = "model.layers.0.mlp.experts.gate_up_proj"
    end = "_scale_inv" if scale == "block" else "_scale"
    save_file({name: numbers, name + end: scales}, tmp_path / "model.safetensors")
    found: Any = open_tensors(tmp_path / "model.safetensors").tensors
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16] if scale == "block" else None}
    made = quant_methods.entries(found, settings, tmp_path)
    assert made.keys() == {name}
    read = torch.empty(3, 40, 48)
    made[name].read_into(read)
    assert torch.equal(read, numbers.float() * wide)
