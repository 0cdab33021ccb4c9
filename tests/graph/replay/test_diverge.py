"""Name the cause of wrong numbers.

Ten faults are each in a real run, which is compared with a right run or with transformers."""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ranvier
from ranvier.graph.commands import cli
from ranvier.graph.replay.diverge import diverge
from ranvier.graph.replay.tensor_places import hidden
from ranvier.graph.replay.values import TokenKey, Values, compare, measure
from ranvier.transport.format.header import Row

HERE = Path(__file__).parent
CUSTOM = HERE.parent / "custom"
PROMPTS = ((5, 17, 200, 33, 8, 99, 140, 3, 61, 12), (7, 7, 250))
Recorded = Callable[..., Path]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Provide `recorded(model, edge=…)`, which returns the folder of a recorded run of a small llama in four actors.

    Each run is made once."""
    made: dict[str, Path] = {}
    runs = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))

    def once(model: Path, edge: Mapping[str, Any] | None = None, **of_model: Any) -> Path:
        edges = [
            "embed.hidden -> lower.hidden", {"from": "lower.hidden", "to": "upper.hidden", **(edge or {})},
            "upper.hidden -> head.hidden", {"from": "head.token", "to": "embed.token", "feedback": True},
        ]  # fmt: skip
        key = json.dumps([str(model), edges, of_model])
        if key not in made:
            place = tmp_path_factory.mktemp("run")
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            (place / "graph.yaml").write_text(json.dumps({
                "ranvier": 1, "name": "t", "model": {"source": "unset", "dtype": "float32", **of_model}, "record": {},
                "actors": {"embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
                           "upper": {"kind": "blocks", "layers": f"3-{layers - 1}"}, "head": {"kind": "head"}},
                "edges": edges,
            }))  # fmt: skip
            graph = ranvier.load(place / "graph.yaml", overrides={"model.source": str(model)})
            made[key] = trio.run(_streams, graph, runs)
        return made[key]

    yield once
    shutil.rmtree(runs)


async def _streams(graph: ranvier.Graph, runs: Path) -> Path:
    async def one(run: ranvier.Run, prompt: Sequence[int]) -> None:
        async for _ in run.generate(prompt, max_tokens=4, stop_tokens=()):
            pass

    async with ranvier.launch(graph, runs=runs) as run:
        for prompt in PROMPTS:
            await one(run, prompt)
    return run.dir


def altered(model: Any, folder: Path, change: Callable[[Any], None], **config: Any) -> Path:
    """Save a checkpoint that differs from the right one by `change` and `config`, and return its folder."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    for name, value in config.items():
        setattr(other.config, name, value)
    other.save_pretrained(folder)
    return folder


def one_weight(model: Any) -> None:
    model.model.layers[4].mlp.down_proj.weight[11, 7] += 2.0


def left_out(model: Any) -> None:
    model.model.layers[4].self_attn.o_proj.weight.zero_()
    model.model.layers[4].mlp.down_proj.weight.zero_()


def transposed(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.copy_(weight.T.clone())


def lower_precision(model: Any) -> None:
    for name, weight in model.model.layers[2].named_parameters():
        if "proj" in name:
            weight.copy_(weight.bfloat16().float())


def nothing(_: Any) -> None:
    """Leave the model unchanged."""
    pass


FAULTS: Mapping[str, tuple[Callable[[Any], None], dict[str, Any], str, int, str]] = {
    "one weight altered": (one_weight, {}, "upper", 4, "hidden 5"),
    "a layer left out": (left_out, {}, "upper", 4, "layer 4 attended"),
    "a transposed tensor": (transposed, {}, "lower", 1, "layer 1 attended"),
    "a wrong rotary base": (nothing, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "lower", 0, ""),
    "a wrong norm epsilon": (nothing, {"rms_norm_eps": 1e-2}, "lower", 0, "layer 0 attended"),
    "lower precision in one layer": (lower_precision, {}, "lower", 2, "layer 2 attended"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_against_transformers(fault: str, tiny: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Name actor, layer and tensor of a fault in the checkpoint.

    The reference is transformers' own computation with the right checkpoint."""
    change, config, actor, layer, tensor = FAULTS[fault]
    right, model = tiny("llama")
    run = recorded(altered(model, tmp_path / "wrong", change, **config))
    found = diverge(run, None, None, right, _quiet)
    assert (found.actor, found.edge, found.layer) == (actor, None, layer), found.what
    assert found.first is not None and (not tensor or found.first.place.name == tensor)
    assert found.what.startswith(f"actor {actor}, layer {layer}: ")
    assert not found.notes


@pytest.mark.parametrize("fault", ["one weight altered", "a wrong rotary base"])
def test_against_another_run(fault: str, tiny: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Name the fault between two runs, whose attention tensors are compared, too."""
    change, config, actor, layer, tensor = FAULTS[fault]
    right, model = tiny("llama")
    found = diverge(recorded(right), recorded(altered(model, tmp_path / "wrong", change, **config)), None, None, _quiet)
    assert (found.actor, found.layer) == (actor, layer), found.what
    assert found.first is not None and found.first.place.name == (tensor or "layer 0 query")
    # The rotary embedding leaves the first position unchanged.
    assert found.first.token.position == (0 if tensor else 1)


def test_a_model_in_one_actor(tiny: Any, tmp_path: Path, runs: Path) -> None:
    """Name the faulty layer of a model in one actor."""
    right, model = tiny("llama")
    wrong = altered(model, tmp_path / "wrong", one_weight)
    (tmp_path / "graph.yaml").write_text(json.dumps({
        "ranvier": 1, "name": "t", "model": {"source": str(wrong), "dtype": "float32"}, "record": {},
        "actors": {"all": {"kind": "model"}}, "pipeline": ["all"],
    }))  # fmt: skip
    graph = ranvier.load(tmp_path / "graph.yaml", overrides={"model.source": str(wrong)})
    found = diverge(trio.run(_streams, graph, runs), None, None, right, _quiet)
    assert (found.actor, found.layer) == ("all", 4), found.what
    assert found.first is not None and found.first.place.name == "hidden 5"


def test_the_head_alone(tiny: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Blame the head if only the chosen token differs on the edges."""
    right, model = tiny("llama")

    def other_norm(other: Any) -> None:
        other.model.norm.weight.copy_(-other.model.norm.weight)

    run = recorded(altered(model, tmp_path / "wrong", other_norm))
    found = diverge(recorded(right), run, None, None, _quiet)
    assert (found.actor, found.layer, found.edge) == ("head", None, None), found.what
    assert found.first is not None and found.first.place.name == "logits"
    assert diverge(run, None, None, right, _quiet).actor == "head"


def test_nothing_differs(tiny: Any, recorded: Recorded) -> None:
    """Find no difference between a right run and transformers, or between a run and itself."""
    right, _ = tiny("llama")
    run = recorded(right)
    found = diverge(run, None, None, None, _quiet)
    assert found.first is None and found.what.startswith("no difference over 0.0001 in ")
    assert {"hidden 0", "hidden 3", "hidden 6", "logits"} <= {place.name for place in found.largest}
    assert found.tokens == sum(map(len, PROMPTS)) + 2 * 3
    assert diverge(run, run, 0.0, None, _quiet).first is None
    assert diverge(run, run, None, None, _quiet).threshold == 1e-5


def test_a_truncated_vocabulary(tiny: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Blame the head for a truncated vocabulary."""
    right, model = tiny("llama")

    def cut(other: Any) -> None:
        other.resize_token_embeddings(300)

    found = diverge(recorded(altered(model, tmp_path / "wrong", cut)), None, None, right, _quiet)
    assert (found.actor, found.layer, found.edge) == ("head", None, None), found.what
    assert found.first is not None and found.first.place.name == "logits"
    assert "300 values against 320" in found.what


def test_an_edge_that_rounds(tiny: Any, recorded: Recorded) -> None:
    """Blame an edge whose codec rounds."""
    right, _ = tiny("llama")
    found = diverge(recorded(right), recorded(right, {"codec": "int8"}), None, None, _quiet)
    assert (found.actor, found.edge) == (None, "lower.hidden -> upper.hidden"), found.what
    assert "(codec raw against int8)" in found.what


@pytest.mark.parametrize("fault", ["a stale row", "swapped rows", "lower precision"])
def test_in_an_actor_of_ones_own(fault: str, tmp_path: Path, runs: Path) -> None:
    """Name the faulty layer of a custom actor.

    Of three stacks with two layers, the middle one has a fault in its second layer."""
    shutil.copy(CUSTOM / "wrong.py", tmp_path / "wrong.py")
    right, wrong = (_stacks(tmp_path, runs, given) for given in ({}, {"fault": fault, "at": 1}))
    found = diverge(right, wrong, None, None, _quiet)
    assert found.actor == "middle", found.what
    assert found.first is not None and found.first.place.name.startswith("middle.layers.1"), found.what


def test_what_is_between_actors_of_ones_own(tmp_path: Path, runs: Path) -> None:
    """Blame an edge between custom actors whose codec rounds, and report inputs that differ."""
    shutil.copy(CUSTOM / "wrong.py", tmp_path / "wrong.py")
    right = _stacks(tmp_path, runs, {})
    found = diverge(right, _stacks(tmp_path, runs, {}, codec="float16"), None, None, _quiet)
    assert (found.actor, found.edge) == (None, "first.y -> middle.x"), found.what
    found = diverge(right, _stacks(tmp_path, runs, {}, seed=6), None, None, _quiet)
    assert (found.actor, found.edge) == (None, None)
    assert found.what.startswith("the inputs already differ: x, session 1, position 0")


def _stacks(folder: Path, runs: Path, fault: Mapping[str, Any], codec: str = "raw", seed: int = 5) -> Path:
    kind = {"kind": "./wrong.py:Stack"}
    path = folder / "graph.yaml"
    path.write_text(json.dumps({
        "ranvier": 1, "name": "t", "record": {},
        "actors": {
            "first": {**kind, "args": {"layers": 2, "seed": 1}},
            "middle": {**kind, "args": {"layers": 2, "seed": 2, **fault}},
            "last": {**kind, "args": {"layers": 2, "seed": 3}},
        },
        "edges": ["gateway.x -> first.x", {"from": "first.y", "to": "middle.x", "codec": codec}, "middle.y -> last.x",
                  "last.y -> gateway.y"],
    }))  # fmt: skip
    graph = ranvier.load(path, allow_code=True)

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            torch.manual_seed(seed)
            await run.call(x=torch.randn(7, 16))
        return run.dir

    return trio.run(main)


def test_the_command(tiny: Any, recorded: Recorded, tmp_path: Path) -> None:
    """Print the difference as text or JSON, with exit code 0 if there is none and 1 if there is one."""
    right, model = tiny("llama")
    good = recorded(right)
    bad = recorded(altered(model, tmp_path / "wrong", one_weight))
    command = CliRunner()
    same = command.invoke(cli.app, ["diverge", str(good)])
    assert same.exit_code == 0, same.output
    assert "against transformers; threshold 0.0001" in same.stdout
    differs = command.invoke(cli.app, ["diverge", str(good), str(bad), "--json"])
    assert differs.exit_code == 1
    told = json.loads(differs.stdout)
    assert (told["actor"], told["layer"], told["tensor"]) == ("upper", 4, "hidden 5")
    assert told["differ"] is True and told["size"] > told["threshold"] == 1e-5
    text = command.invoke(cli.app, ["diverge", str(good), str(bad)])
    assert "<- first" in text.stdout and "actor upper, layer 4: hidden 5 is the first that differs" in text.stdout


def test_what_was_not_recorded_is_told(streamed: Callable[..., Path], runs: Path) -> None:
    """Report a run without a recording, and a graph without a prompt."""
    command = CliRunner()
    plain = streamed(runs, [[1, 2, 3]], 2)
    none = command.invoke(cli.app, ["diverge", str(plain)])
    assert isinstance(none.exception, ranvier.RanvierError)
    assert "nothing was recorded; run it with --record all" in str(none.exception)
    without = command.invoke(cli.app, ["diverge", str(HERE.parent / "cases" / "nothing.yaml")])
    assert "give --prompt TEXT to run this graph with" in str(without.exception)


def test_what_was_computed_first_comes_first() -> None:
    """Report the difference that was computed first.

    A prompt is computed at once. So the shallower layer counts, even if a deeper one differs at an earlier position."""
    (shallow, _), (deep, _) = hidden(1), hidden(2)
    one, other = Values(prompt={1: 3}), Values(prompt={1: 3})
    rows = (Row(1, 1, 0, 4),)
    for layer, wrong in ((1, 2), (2, 0)):
        tensor = torch.ones(4, 2)
        one.put(hidden(layer), "a", {}, rows, tensor.clone())
        tensor[wrong] = 2
        other.put(hidden(layer), "a", {}, rows, tensor)
    found, _ = compare(one, other, 0.1)
    assert found is not None and (found.place, found.token) == (shallow, TokenKey(1, 2))
    del other.at[shallow][TokenKey(1, 2)]
    found, largest = compare(one, other, 0.1)
    assert found is not None and found.place == deep and largest == {shallow: 0.0, deep: 1.0}
    other.at[deep][TokenKey(1, 3)] = torch.ones(2) * 9  # a later position, which does not count
    assert compare(one, other, 0.1)[1] == largest


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=8), st.integers(0, 7))
def test_the_size_of_a_difference(numbers: list[float], at: int) -> None:
    """Measure 0 if all numbers are equal, NaN and infinity included, and more if one number differs."""
    one = torch.tensor(numbers)
    assert measure(one, one.clone()).size == 0
    other = one.clone()
    other[at % len(numbers)] = 1.0 if one[at % len(numbers)] != 1.0 else 2.0
    assert measure(one, other).size > 0
    assert measure(one, one[:-1]).size == math.inf


def _quiet(_what: str, _share: float) -> None:
    pass
