"""Check that synchronous training equals plain torch autograd in one process, for every schedule and cut.

The results are equal to rounding, in float32 and over ten steps. The oracle computes whole batches, so it has neither
the same micro-batches nor the same order of sums."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stand_in
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import ranvier
from ranvier.graph.check.devices import DeviceCheck
from ranvier.graph.trace import summary
from ranvier.graph.training.trainer import Trained
from ranvier.transport.format.codec import parse
from ranvier.transport.format.tensors import encode, from_buffer

STEPS, BATCH, MICRO = 10, 24, 4
ADAMW = {"kind": "adamw", "lr": 0.001, "weight_decay": 0.1, "clip": 0.1}
Train = Callable[..., Trained]
Make = Callable[..., ranvier.Graph]
Tiny = Callable[..., tuple[Path, Any]]


def _parts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_parts", Path(__file__).with_name("parts.py"))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


parts = _parts()


def losses(trained: Trained) -> list[float]:
    """Return the loss of each training step."""
    return [told["loss"] for told in trained.history if "validation" not in told]


def weights(trained: Trained) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of each actor in the last training checkpoint."""
    assert trained.folder is not None
    files = [file for file in trained.folder.glob("*.safetensors") if ".state" not in file.name]
    return {file.stem: load_file(file) for file in files}


def same_losses(got: Sequence[float], expected: Sequence[float]) -> None:
    """Assert that the losses of all steps are equal, to 1e-5 of their size."""
    assert len(got) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(got, expected, strict=True), 1):
        assert abs(one - other) <= 1e-5 * abs(other), f"step {step}: {one}, expected {other}"


def same_weights(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that all weights are equal, to 1e-4."""
    for name, tensor in got.items():
        assert float((tensor.detach() - expected[name].detach()).abs().max()) <= 1e-4, name


def plain(
    held: Iterable[nn.Parameter], loss_of: Callable[[int], torch.Tensor], clip: float | None = 0.1
) -> list[float]:
    """Run the oracle, which is AdamW over whole batches, and return its losses."""
    held, told = list(held), []
    optimizer = torch.optim.AdamW(held, 0.001, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(held, clip)
        optimizer.step()
        told.append(float(loss.detach()))
    return told


def numbers(step: int) -> dict[str, torch.Tensor]:
    """Return the training batch of this step."""
    made: dict[str, torch.Tensor] = parts.Numbers(BATCH)(step, False)
    return made


def training(**more: Any) -> dict[str, Any]:
    """Return a training section with these changes."""
    return {
        "data": {"source": "./parts.py:Numbers", "args": {"batch": BATCH}}, "batch": BATCH, "micro_batches": MICRO,
        "steps": STEPS, "optimizer": ADAMW, **more,
    }  # fmt: skip


# -- layers in a row ----------------------------------------------------------------------------------------------------

WIDTHS = (8, 16, 12, 10, 4)


def dense(count: int, tmp_path: Path) -> tuple[dict[str, Any], list[str], list[nn.Module]]:
    """Cut four dense layers into `count` actors, with their weights in files.

    Return the actors, the edges and the layers."""
    torch.manual_seed(3)
    layers = [parts.Layer(one, two, last=two == 4) for one, two in itertools.pairwise(WIDTHS)]
    size = 4 // count
    actors: dict[str, Any] = {}
    for index in range(count):
        own = layers[index * size : (index + 1) * size]
        state = {
            f"layers.{at}.{name}": value for at, layer in enumerate(own) for name, value in layer.state_dict().items()
        }
        save_file(state, tmp_path / f"actor{index}.safetensors")
        first, last = index * size, (index + 1) * size
        actors[f"actor{index}"] = {
            "kind": "./parts.py:Several", "args": {"widths": list(WIDTHS[first : last + 1]), "ends": last == 4},
            "weights": f"./actor{index}.safetensors", **({"inputs": {"x": "float32[pictures, 8]"}} if index == 0 else {}),
        }  # fmt: skip
    edges = ["gateway.x -> actor0.x", *(f"actor{index}.output -> actor{index + 1}.x" for index in range(count - 1))]
    return actors, [*edges, f"actor{count - 1}.output -> gateway.made"], layers


@pytest.mark.parametrize(
    ("count", "schedule"),
    [
        (4, "1f1b"), (4, "zero-bubble"),
        *(pytest.param(count, schedule, marks=pytest.mark.slow)
          for count, schedule in [(2, "gpipe"), (1, "1f1b"), (2, "1f1b"), (4, "gpipe"), (2, "zero-bubble"), (1, "gpipe"), (1, "zero-bubble"),
                                    (4, "eager"), (2, "eager"), (1, "eager")]),
    ],
)  # fmt: skip
def test_dense_layers(count: int, schedule: str, graph: Make, trained: Train, tmp_path: Path) -> None:
    """Train dense layers as torch does, with gradients that are clipped in each step."""
    actors, edges, layers = dense(count, tmp_path)
    loss = [{"of": f"actor{count - 1}.output", "target": "label"}]
    made = trained(graph(actors, edges, training(schedule=schedule, loss=loss)))
    whole = nn.Sequential(*layers)
    expected = plain(
        whole.parameters(), lambda step: F.cross_entropy(whole(numbers(step)["x"]), numbers(step)["label"])
    )
    same_losses(losses(made), expected)
    for index in range(count):
        size = 4 // count
        own = nn.ModuleDict({str(at): layers[index * size + at] for at in range(size)})
        same_weights(
            weights(made)[f"actor{index}"], {f"layers.{name}": value for name, value in own.state_dict().items()}
        )
    norms = [told["norm"] for told in made.history]
    assert min(norms) > 0.1, "clipped each time"


def test_dense_layers_on_a_device(graph: Make, trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train dense layers on a second device, in real processes, as torch does on the processor."""
    parts_file = tmp_path / "parts.py"
    there = "for layer in self.layers:\n            assert stand_in.there(x)"
    code = parts_file.read_text().replace("for layer in self.layers:", there, 1)
    assert "stand_in.there" in code
    parts_file.write_text(code.replace("import time\n", f"import time\n{stand_in.SOURCE}", 1))
    monkeypatch.setattr(DeviceCheck, "devices", lambda *_: [])
    actors, edges, layers = dense(2, tmp_path)
    placed = {name: {**actor, "device": "cuda:0"} for name, actor in actors.items()}
    loss = [{"of": "actor1.output", "target": "label"}]
    section = training(schedule="1f1b", loss=loss)
    made = trained(graph(placed, edges, section))
    whole = nn.Sequential(*layers)
    expected = plain(
        whole.parameters(), lambda step: F.cross_entropy(whole(numbers(step)["x"]), numbers(step)["label"])
    )
    same_losses(losses(made), expected)


@pytest.mark.slow
def test_interleaved_and_recomputed_and_a_schedule_of_ones_own(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Give the same numbers for an interleaved schedule, for recomputation, and for a custom schedule.

    The interleaved schedule has four actors on two cores. Recomputation computes activations twice. A file gives the
    order of the custom schedule."""
    actors, edges, layers = dense(4, tmp_path)
    dealt = {name: {**actor, "cpus": [index % 2]} for index, (name, actor) in enumerate(actors.items())}
    own = "\n".join(f"actor{index}: F0 F1 F2 F3 B3 B2 B1 I0 W0 U  # backwards" for index in range(4))
    (tmp_path / "own.schedule").write_text(own)
    loss = [{"of": "actor3.output", "target": "label"}]
    found = [
        losses(trained(graph(dealt, edges, training(schedule="interleaved", loss=loss)), out="one")),
        losses(
            trained(graph(actors, edges, training(schedule="./own.schedule", loss=loss, recompute=True)), out="two")
        ),
    ]
    whole = nn.Sequential(*layers)
    expected = plain(
        whole.parameters(), lambda step: F.cross_entropy(whole(numbers(step)["x"]), numbers(step)["label"])
    )
    for got in found:
        same_losses(got, expected)


def test_branches_a_join_and_two_losses(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Train branches, a join and several losses as torch does.

    A trunk's output goes to two branches, whose outputs are joined. One loss is on a frozen part, and three are on the
    join."""
    torch.manual_seed(5)
    trunk, one, two = parts.Layer(8, 16), parts.Layer(16, 12), parts.Layer(16, 12)
    join = parts.Join(12, 8)
    fixed = parts.Layer(8, 4, last=True)
    held = {"trunk": trunk, "one": one, "two": two, "join": join, "fixed": fixed}
    save_file(
        {f"{name}.{key}": value for name, part in held.items() for key, value in part.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    layer = {"kind": "./parts.py:Layer", "weights": "./w.safetensors"}
    actors = {
        "trunk": {**layer, "args": {"width": 8, "to": 16}, "inputs": {"x": "float32[pictures, 8]"}},
        "one": {**layer, "args": {"width": 16, "to": 12}}, "two": {**layer, "args": {"width": 16, "to": 12}},
        "join": {"kind": "./parts.py:Join", "args": {"width": 12, "to": 8}, "weights": "./w.safetensors"},
        "fixed": {**layer, "args": {"width": 8, "to": 4, "last": True}},
    }  # fmt: skip
    edges = [
        "gateway.x -> trunk.x", "trunk.output -> one.x", "trunk.output -> two.x", "one.output -> join.a",
        "two.output -> join.b", "join.logits -> fixed.x", "fixed.output -> gateway.made", "join.size -> gateway.size",
    ]  # fmt: skip
    terms = [
        {"of": "fixed.output", "target": "label"}, {"of": "join.logits", "kind": "mse", "target": "wished", "weight": 0.3},
        {"of": "join.size", "kind": "mean", "weight": 0.1}, {"of": "join.logits", "kind": "l1", "target": "wished", "weight": 0.2},
    ]  # fmt: skip
    made = trained(graph(actors, edges, training(loss=terms, frozen=["fixed"])))

    def loss_of(step: int) -> torch.Tensor:
        given = numbers(step)
        middle = trunk(given["x"])
        joined = join(one(middle), two(middle))
        answer = F.cross_entropy(fixed(joined["logits"]), given["label"])
        more = 0.3 * F.mse_loss(joined["logits"], given["wished"]) + 0.2 * F.l1_loss(joined["logits"], given["wished"])
        return answer + more + 0.1 * joined["size"].mean()

    learning = [weight for name, part in held.items() if name != "fixed" for weight in part.parameters()]
    same_losses(losses(made), plain(learning, loss_of))
    for name, part in held.items():
        same_weights(weights(made)[name], part.state_dict())
    assert set(made.history[0]["losses"]) == {"fixed.output", "join.logits mse", "join.logits l1", "join.size"}


@pytest.mark.slow
def test_an_actor_of_ones_own_that_holds_modules(graph: Make, trained: Train) -> None:
    """Train a custom actor that holds modules, without extra code. Its step is the forward pass."""
    actors = {"own": {"kind": "./parts.py:Own"}}
    made = trained(
        graph(actors, ["gateway.x -> own.x", "own.y -> gateway.y"], training(loss=[{"of": "own.y", "target": "label"}]))
    )
    torch.manual_seed(11)
    inner, outer = nn.Linear(8, 16), nn.Linear(16, 4)

    def loss_of(step: int) -> torch.Tensor:
        x = numbers(step)["x"]
        return F.cross_entropy(outer(torch.tanh(inner(x))) + x[:, :4], numbers(step)["label"])

    same_losses(losses(made), plain([*inner.parameters(), *outer.parameters()], loss_of))
    expected = {
        f"{name}.{key}": value
        for name, part in (("inner", inner), ("outer", outer))
        for key, value in part.state_dict().items()
    }
    same_weights(weights(made)["own"], expected)


# -- models -------------------------------------------------------------------------------------------------------------

CONTEXT, SEQUENCES = 12, 8


def model_training(vocabulary: int, **more: Any) -> dict[str, Any]:
    """Return a training section for a model with this vocabulary."""
    args = {"batch": SEQUENCES, "context": CONTEXT, "vocabulary": vocabulary}
    data = {"source": "./parts.py:Tokens", "args": args, "context": CONTEXT}
    return {**training(), "data": data, "batch": SEQUENCES, **more}


@pytest.mark.parametrize(
    ("family", "count", "changes"),
    [
        ("llama", 4, {}),
        pytest.param("llama", 2, {"schedule": "zero-bubble"}, marks=pytest.mark.slow),
        pytest.param("llama", 2, {}, marks=pytest.mark.slow),
        pytest.param("llama", 1, {}, marks=pytest.mark.slow),
        pytest.param("llama", 4, {"tie_word_embeddings": False}, marks=pytest.mark.slow),
        pytest.param(
            "gpt2",
            2,
            {"vocab_size": 320, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen3", 2, {}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", 2, {"sliding_window": 4, "layer_types": None}, marks=pytest.mark.slow),
    ],
)
def test_models(
    family: str, count: int, changes: dict[str, Any], graph: Make, trained: Train, tiny: Tiny, split: Any
) -> None:
    """Train models as transformers and torch autograd do, in losses and in every weight of the checkpoint.

    Tied embeddings at both ends of a pipeline are one weight."""
    if family == "gpt2":
        changes = {**changes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    changes = dict(changes)
    schedule = changes.pop("schedule", "1f1b")
    folder, model = tiny(f"learns-{family}-{'-'.join(map(str, changes.values()))}", family, **changes)
    layers = model.config.num_hidden_layers
    content = split(count, layers)
    edges: list[Any] = []
    names = content["pipeline"]
    for before, after in itertools.pairwise(names):
        edges.append(f"{before}.hidden -> {after}.hidden")
    edges.append({"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True})
    made = trained(
        graph(
            content["actors"],
            edges,
            model_training(320, schedule=schedule),
            model={"source": str(folder), "dtype": "float32"},
        )
    )

    learner = copy.deepcopy(model).train()

    def loss_of(step: int) -> torch.Tensor:
        given = parts.Tokens(SEQUENCES, CONTEXT, 320)(step, False)
        logits = learner(given["token"].view(SEQUENCES, CONTEXT), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), given["target"])

    same_losses(losses(made), plain(learner.parameters(), loss_of))
    assert made.folder is not None
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    same_weights(dict(again.named_parameters()), dict(learner.named_parameters()))


def test_a_quantised_model_trains_to_a_plain_one(
    graph: Make, trained: Train, tiny: Tiny, split: Any, tmp_path: Path
) -> None:
    """Train the numbers of an FP8 checkpoint as torch autograd does, and write a checkpoint that is not quantised."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    original, _ = tiny("learns-fp8", "llama", num_hidden_layers=2, tie_word_embeddings=False)
    folder = tmp_path / "fp8"
    shutil.copytree(original, folder)
    plainly, quantised = load_file(original / "model.safetensors"), {}
    for name, weight in list(plainly.items()):
        if "_proj" in name:
            scale = weight.abs().max() / 448
            quantised |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.view(1)}
            plainly[name] = quantised[name].float() * scale
    save_file({**plainly, **quantised}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    content = split(2, 2)
    names = content["pipeline"]
    edges: list[Any] = [
        f"{names[0]}.hidden -> {names[1]}.hidden",
        {"from": f"{names[1]}.token", "to": f"{names[0]}.token", "feedback": True},
    ]
    made = trained(
        graph(content["actors"], edges, model_training(320), model={"source": str(folder), "dtype": "float32"})
    )

    learner = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).train()
    learner.load_state_dict(plainly)

    def loss_of(step: int) -> torch.Tensor:
        given = parts.Tokens(SEQUENCES, CONTEXT, 320)(step, False)
        logits = learner(given["token"].view(SEQUENCES, CONTEXT), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), given["target"])

    same_losses(losses(made), plain(learner.parameters(), loss_of))
    assert made.folder is not None
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    same_weights(dict(again.named_parameters()), dict(learner.named_parameters()))


MIXTURE = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MIXTRAL = {**MIXTURE, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {**MIXTURE, "head_dim": 12, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip


def mixture_cut(layers: Sequence[str]) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Cut each layer into attention, experts 0-1, experts 2-3 and combine.

    Return the actors, the edges, and the names of the actors that have a `balance` output."""
    actors: dict[str, Any] = {"embed": {"kind": "embedding"}}
    edges: list[Any] = []
    before = "embed"
    for layer in layers:
        at, mix = f"attention{layer}", f"combine{layer}"
        actors[at] = {"kind": "attention", "layers": layer}
        actors[mix] = {"kind": "combine", "layers": layer}
        edges.append(f"{before}.hidden -> {at}.hidden")
        edges += [f"{at}.{port} -> {mix}.{port}" for port in ("residual", "index", "weight")]
        for first in (0, 2):
            name = f"experts{layer}from{first}"
            actors[name] = {"kind": "experts", "layers": layer, "experts": f"{first}-{first + 1}"}
            for port in (f"expert{first}", f"expert{first + 1}"):
                edges += [f"{at}.{port} -> {name}.{port}", f"{name}.{port} -> {mix}.{port}"]
        before = mix
    actors["head"] = {"kind": "head"}
    edges += [f"{before}.hidden -> head.hidden", {"from": "head.token", "to": "embed.token", "feedback": True}]
    return actors, edges, [f"attention{layer}" for layer in layers]


@pytest.mark.parametrize(
    ("family", "changes", "count", "schedule"),
    [
        ("mixtral", MIXTRAL, 0, "1f1b"),
        *(pytest.param("mixtral", MIXTRAL, count, schedule, marks=pytest.mark.slow)
          for count, schedule in [(1, "1f1b"), (2, "1f1b"), (4, "1f1b"), (2, "zero-bubble"), (0, "gpipe"), (0, "zero-bubble")]),
        pytest.param("qwen3_moe", {**QWEN, "norm_topk_prob": False}, 0, "1f1b", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 40}, 2, "1f1b", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_mixtures_of_experts(
    family: str, changes: dict[str, Any], count: int, schedule: str, graph: Make, trained: Train, tiny: Tiny, split: Any
) -> None:
    """Train mixtures of experts as transformers does, with the balancing loss of each layer.

    The experts are in `count` stages together with everything else, or in separate actors if `count` is 0."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    folder, model = tiny(f"learns-mixture-{family}", family, **changes)
    if count:
        content = split(count, 2)
        actors, names = content["actors"], content["pipeline"]
        edges: list[Any] = [f"{one}.hidden -> {two}.hidden" for one, two in itertools.pairwise(names)]
        edges.append({"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True})
        uneven = [name for name in names if actors[name]["kind"] not in ("embedding", "head")]
    else:
        actors, edges, uneven = mixture_cut(["0", "1"])
        names = ["head"]
    terms = [{"of": f"{names[-1]}.logits", "target": "target"}]
    terms += [{"of": f"{name}.balance", "kind": "mean", "weight": 0.02} for name in uneven]
    section = model_training(320, schedule=schedule, loss=terms, recompute=family == "qwen3_moe")
    checked = graph(actors, edges, section, model={"source": str(folder), "dtype": "float32"})
    made = trained(checked)

    learner = copy.deepcopy(model).train()

    def loss_of(step: int) -> torch.Tensor:
        given = parts.Tokens(SEQUENCES, CONTEXT, 320)(step, False)
        total = torch.zeros(())
        for ids, targets in zip(given["token"].chunk(MICRO), given["target"].chunk(MICRO), strict=True):
            # The balancing loss is taken per micro-batch, because it is no mean over tokens.
            out = learner(ids.view(-1, CONTEXT), use_cache=False, output_router_logits=True)
            answer = F.cross_entropy(out.logits.flatten(0, 1), targets)
            balances = sum(load_balancing_loss_func((logits,), 4, 2) for logits in out.router_logits)
            total = total + (answer + 0.02 * balances) / MICRO
        return total

    same_losses(losses(made), plain(learner.parameters(), loss_of))
    assert made.folder is not None
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    same_weights(dict(again.named_parameters()), dict(learner.named_parameters()))
    if not count:
        only_where_rows_went(checked, made)


def only_where_rows_went(checked: ranvier.Graph, made: Trained) -> None:
    """Check that an expert returns as many rows as it gets in each micro-batch.

    All experts of a layer together get two rows per token."""
    assert made.run_dir is not None
    read = summary.read(made.run_dir)
    routed = [
        (index, edge) for index, edge in enumerate(checked.edges)
        if edge.out.startswith("expert") and edge.source.startswith("attention")
    ]  # fmt: skip
    assert len(routed) == 8
    sent: Counter[int] = Counter()
    for index, edge in routed:
        there, back = (
            {record.rows[0][2]: record.nbytes for record in read.sent[f"{name}.0"] if record.edge == index}
            for name in (edge.source, edge.target)
        )
        assert there == back, edge.name
        assert len(there) == STEPS * MICRO
        sent.update(there)
    assert set(sent.values()) == {
        2 * 2 * (SEQUENCES // MICRO * CONTEXT) * 48 * 4
    }  # layers, choices, tokens, width, bytes


@pytest.mark.slow
def test_half_precision_has_masters(graph: Make, trained: Train, tiny: Tiny, split: Any) -> None:
    """Update float32 master weights of bfloat16, so that steps too small for bfloat16 add up.

    The oracle does the same with transformers' model. Tied embeddings are at both ends."""
    folder, model = tiny("llama")
    content = split(4, 6)
    names = content["pipeline"]
    edges: list[Any] = [f"{before}.hidden -> {after}.hidden" for before, after in itertools.pairwise(names)]
    edges.append({"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True})
    slow = model_training(320, optimizer={**ADAMW, "lr": 1e-5, "weight_decay": 0.0})
    made = trained(graph(content["actors"], edges, slow, model={"source": str(folder), "dtype": "bfloat16"}))
    learner = copy.deepcopy(model).train().bfloat16()
    held = {name: weight.detach().float() for name, weight in learner.named_parameters()}
    optimizer = torch.optim.AdamW(held.values(), 1e-5, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        given = parts.Tokens(SEQUENCES, CONTEXT, 320)(step, False)
        logits = learner(given["token"].view(SEQUENCES, CONTEXT), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), given["target"])
        loss.backward()
        for name, weight in learner.named_parameters():
            held[name].grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        nn.utils.clip_grad_norm_(held.values(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for name, weight in learner.named_parameters():
                weight.copy_(held[name])
        expected.append(float(loss.detach()))
    assert losses(made) == pytest.approx(expected, rel=3e-3)
    assert made.folder is not None
    state = load_file(made.folder / "blocks0.state.safetensors")
    own, theirs = state["weight/layer0_down"], held["model.layers.0.mlp.down_proj.weight"]
    assert own.dtype is torch.float32
    moved = theirs - model.state_dict()["model.layers.0.mlp.down_proj.weight"].bfloat16().float()
    assert float(moved.abs().mean()) > 3e-5, "the oracle has gone somewhere"
    assert float((own - theirs).abs().mean()) < 0.3 * float(moved.abs().mean())
    exported = load_file(made.folder / "blocks0.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert exported.dtype is torch.bfloat16


def test_lora(graph: Make, trained: Train, tiny: Tiny, split: Any) -> None:
    """Train LoRA adapters as torch does, and save merged weights, with only the adapters as training state.

    The oracle computes each matrix of the blocks as W + scale · B A, with autograd over A and B. Embedding, norms and
    head do not change."""
    folder, model = tiny("llama")
    content = split(4, 6)
    names = content["pipeline"]
    edges: list[Any] = [f"{before}.hidden -> {after}.hidden" for before, after in itertools.pairwise(names)]
    edges.append({"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True})
    section = model_training(320, lora={"rank": 4, "alpha": 8}, save={"every": 5})
    made = trained(graph(content["actors"], edges, section, model={"source": str(folder), "dtype": "float32"}))
    frozen = {name: weight.detach() for name, weight in model.named_parameters()}
    parts_of = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
    }  # fmt: skip
    pairs: dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]] = {}
    for layer in range(6):
        for name, owns in parts_of.items():
            whole = torch.cat([frozen[f"model.layers.{layer}.{part}.weight"] for part in owns])
            generator = torch.Generator().manual_seed(zlib.crc32(f"layer{layer}_{name}".encode()))
            down = torch.empty(4, whole.shape[1]).normal_(0, whole.shape[1] ** -0.5, generator=generator)
            pairs[layer, name] = nn.Parameter(torch.zeros(len(whole), 4)), nn.Parameter(down)

    def merged() -> dict[str, torch.Tensor]:
        found = dict(frozen)
        for (layer, name), (up, down) in pairs.items():
            product, start = 2.0 * (up @ down), 0
            for part in parts_of[name]:
                key = f"model.layers.{layer}.{part}.weight"
                found[key] = frozen[key] + product[start : start + len(frozen[key])]
                start += len(frozen[key])
        return found

    def loss_of(step: int) -> torch.Tensor:
        given = parts.Tokens(SEQUENCES, CONTEXT, 320)(step, False)
        ids = given["token"].view(SEQUENCES, CONTEXT)
        logits = functional_call(model, merged(), (ids,), {"use_cache": False}).logits
        return F.cross_entropy(logits.flatten(0, 1), given["target"])

    same_losses(losses(made), plain([each for pair in pairs.values() for each in pair], loss_of))
    expected = {name: weight.detach() for name, weight in merged().items()}
    for tensors in weights(made).values():
        same_weights(tensors, expected)
    assert made.folder is not None
    state = load_file(made.folder / "blocks0.state.safetensors")
    assert state and all("_lora_" in name for name in state if name.startswith("weight/")), "nothing else is kept"
    moved = expected["model.layers.0.mlp.down_proj.weight"] - frozen["model.layers.0.mlp.down_proj.weight"]
    assert float(moved.abs().max()) > 1e-4


@pytest.mark.parametrize("codec", ["int8", pytest.param("topk:0.25+zstd", marks=pytest.mark.slow)])
def test_codecs_of_gradients_feed_back_what_they_lose(codec: str, graph: Make, trained: Train, tmp_path: Path) -> None:
    """Add what a gradient's codec loses to the next gradient.

    The oracle encodes and decodes each gradient between its two halves as the edge does."""
    actors, edges, layers = dense(2, tmp_path)
    edges[1] = {"from": "actor0.output", "to": "actor1.x", "gradient_codec": codec}
    made = trained(graph(actors, edges, training(loss=[{"of": "actor1.output", "target": "label"}])))
    first, second = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])
    held = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(held, 0.001, weight_decay=0.1)
    parsed, owed, expected = parse(codec), torch.zeros(BATCH // MICRO, WIDTHS[2]), []
    for step in range(STEPS):
        optimizer.zero_grad()
        given, told = numbers(step), []
        for x, label in zip(given["x"].chunk(MICRO), given["label"].chunk(MICRO), strict=True):
            between = first(x)
            seen = between.detach().requires_grad_()
            loss = F.cross_entropy(second(seen), label)
            (loss / MICRO).backward()
            assert seen.grad is not None
            whole = seen.grad + owed
            meta, packed, _ = encode("output", whole, parsed, look=False)
            between.backward(from_buffer(meta, packed))
            owed = whole - from_buffer(meta, packed)
            told.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(held, 0.1)
        optimizer.step()
        expected.append(sum(told) / MICRO)
    same_losses(losses(made), expected)
    assert float(owed.abs().max()) > 0, "nothing was lost"
    assert made.run_dir is not None
    read = summary.read(made.run_dir)
    sizes = {record.nbytes for record in read.sent["actor1.0"] if record.edge == 1}
    assert max(sizes) < 0.6 * 4 * owed.numel(), sizes
