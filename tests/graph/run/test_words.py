"""Ask real processes for what clients ask: log-probabilities, penalties, ends, and errors that say what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ranvier
from ranvier.actors.component.session import MOST_LOGPROBS

PROMPT = [5, 9, 17, 33]


def write_tokenizer(folder: Path) -> Tokenizer:
    """Give a checkpoint a tokenizer with one token per byte, and a template that joins the messages."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", "<|im_end|>", *letters]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(tokens[:4])
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length if tools }}{{ mood }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    return made


@pytest.fixture(scope="module")
def model(tiny: Any) -> tuple[Path, Any]:
    """Provide a small llama with a tokenizer."""
    folder, made = tiny("words")
    write_tokenizer(folder)
    return folder, made


def graph_of(folder: Path, source: Path, dtype: str = "float32") -> ranvier.Graph:
    path = folder / "graph.yaml"
    actors = {
        "first": {"kind": "first_stage", "layers": "0-2"}, "middle": {"kind": "blocks", "layers": "3"}, "last": {"kind": "last_stage", "layers": "4-5"},
    }  # fmt: skip
    path.write_text(json.dumps({
        "ranvier": 1, "name": "words", "model": {"source": "set below", "dtype": dtype}, "actors": actors, "pipeline": list(actors),
    }))  # fmt: skip
    return ranvier.load(path, overrides={"model.source": str(source)})


@pytest.fixture(scope="module")
def run(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ranvier.BlockingRun]:
    """Provide the small llama in three processes."""
    folder = tmp_path_factory.mktemp("words")
    with ranvier.start(graph_of(folder, model[0]), runs=folder) as started:
        yield started


def logits_of(oracle: Any, ids: list[int], count: int) -> torch.Tensor:
    """Return transformers' logits for the last `count` tokens of a text."""
    with torch.inference_mode():
        made: torch.Tensor = oracle(torch.tensor([ids])).logits[0, -count - 1 : -1]
    return made


def test_log_probabilities_are_those_of_transformers(run: ranvier.BlockingRun, model: tuple[Path, Any]) -> None:
    """Return the log-probability of each token and of the likeliest ones, also for a token that was not the likeliest."""
    sampling = ranvier.Sampling(temperature=1.5, seed=3, frequency_penalty=0.5)
    tokens = list(run.generate(PROMPT, max_tokens=8, logprobs=5, stop_tokens=(), sampling=sampling))
    ids = [token.id for token in tokens]
    expected = logits_of(model[1], PROMPT + ids, 8).log_softmax(-1)
    assert any(int(expected[i].argmax()) != token.id for i, token in enumerate(tokens))
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, likeliest = row.topk(5)
        assert list(token.top_logprobs) == likeliest.tolist()
        assert list(token.top_logprobs.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_how_many_log_probabilities(run: ranvier.BlockingRun) -> None:
    """Return none unless asked, only the token's for 0, up to twenty likeliest, and the logits beside them if asked."""
    [token] = run.generate(PROMPT, max_tokens=1)
    assert token.logprob is None and token.top_logprobs == {}
    [token] = run.generate(PROMPT, max_tokens=1, logprobs=0)
    assert token.logprob is not None and token.top_logprobs == {}
    [token] = run.generate(PROMPT, max_tokens=1, logprobs=MOST_LOGPROBS, logits=True)
    logits = torch.tensor(token.logits.tolist()) if token.logits is not None else torch.empty(0)
    assert len(token.top_logprobs) == 20
    assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-5)
    with pytest.raises(ranvier.RequestError, match="logprobs: expected 0 to 20 likeliest tokens, got 21"):
        run.generate(PROMPT, max_tokens=1, logprobs=21)


def test_log_probabilities_outlive_a_lost_actor(run: ranvier.BlockingRun, model: tuple[Path, Any]) -> None:
    """Continue with log-probabilities and penalties after the actor that computes them was killed."""
    import os
    import signal

    sampling = ranvier.Sampling(presence_penalty=1.0, frequency_penalty=0.7, min_tokens=30)
    options: dict[str, Any] = {"max_tokens": 40, "logprobs": 2, "sampling": sampling}
    expected = [(token.id, token.logprob) for token in run.generate(PROMPT, **options)]
    generation = run.generate(PROMPT, **options)
    made = [next(generation) for _ in range(10)]
    [pid] = [pid for identity, pid in run.pids.items() if identity.startswith("last.")]
    os.kill(pid, signal.SIGKILL)
    made += list(generation)
    assert [token.id for token in made] == [number for number, _ in expected]
    assert [token.logprob for token in made] == pytest.approx([logprob for _, logprob in expected], abs=1e-4)


def test_penalties_are_those_of_the_api(run: ranvier.BlockingRun, model: tuple[Path, Any]) -> None:
    """Subtract OpenAI's penalties and add biases, counted over the answer only, and choose the likeliest token then."""
    sampling = ranvier.Sampling(presence_penalty=0.6, frequency_penalty=0.9, logit_bias={7: 4.0, 8: -100})
    ids = [token.id for token in run.generate(PROMPT, max_tokens=20, stop_tokens=(), sampling=sampling)]
    logits = logits_of(model[1], PROMPT + ids, 20)
    for position, token in enumerate(ids):
        adjusted = logits[position].clone()
        adjusted[7] += 4.0
        adjusted[8] -= 100
        for number in set(ids[:position]):
            adjusted[number] -= 0.6 + 0.9 * ids[:position].count(number)
        assert int(adjusted.argmax()) == token
    plain = [token.id for token in run.generate(PROMPT, max_tokens=20, stop_tokens=())]
    assert ids != plain


def test_no_end_before_the_minimum(run: ranvier.BlockingRun) -> None:
    """Exclude stop tokens, and ignore stop strings, until the answer is long enough."""
    free = [token.id for token in run.generate(PROMPT, max_tokens=12, stop_tokens=())]
    ended = list(run.generate(PROMPT, max_tokens=12, stop_tokens=(free[2],)))
    assert [token.id for token in ended] == free[: free.index(free[2]) + 1]
    longer = list(run.generate(PROMPT, max_tokens=12, stop_tokens=(free[2],), sampling=ranvier.Sampling(min_tokens=6)))
    assert len(longer) >= 6
    assert all(token.id != free[2] for token in longer[:5])
    with pytest.raises(ranvier.RequestError, match="min_tokens: expected at most max_tokens of 3, got 6"):
        run.generate(PROMPT, max_tokens=3, sampling=ranvier.Sampling(min_tokens=6))


@pytest.mark.parametrize("sampling", [
    ranvier.Sampling(temperature=1e-42, top_p=0.9, min_p=0.05), ranvier.Sampling(temperature=1e-6), ranvier.Sampling(temperature=1.0, top_p=0.0),
])  # fmt: skip
def test_tiny_temperatures_are_greedy(sampling: ranvier.Sampling, run: ranvier.BlockingRun) -> None:
    """Choose the likeliest token where a division by the temperature would overflow, and for top_p = 0."""
    greedy = [token.id for token in run.generate(PROMPT, max_tokens=8, stop_tokens=())]
    assert [token.id for token in run.generate(PROMPT, max_tokens=8, stop_tokens=(), sampling=sampling)] == greedy


def test_tools_and_arguments_reach_the_template(run: ranvier.BlockingRun) -> None:
    """Give the chat template its tools and further variables, and refuse what is no list of objects."""
    plain, rich = run.tokens("hi"), run.tokens("hi", tools=[{"name": "f"}], template_arguments={"mood": "!"})
    codec = run.codec
    assert (codec.decode(plain), codec.decode(rich)) == ("hi", "hi1!")
    made = run.generate("hi", max_tokens=1, tools=[{"name": "f"}], template_arguments={"mood": "!"})
    list(made)
    assert made.result.prompt_tokens == len(rich)
    for wrong, words in (
        ({"tools": "f"}, "tools: expected a list"), ({"documents": [1]}, "documents: expected a list of objects"),
        ({"template": 3}, "template: expected the name"), ({"template_arguments": [1]}, "template_arguments: expected values by name"),
    ):  # fmt: skip
        with pytest.raises(ranvier.RequestError, match=words):
            run.generate("hi", **wrong)


def test_a_stop_string_may_be_a_special_token(
    run: ranvier.BlockingRun, model: tuple[Path, Any], runs: Path, tmp_path: Path
) -> None:
    """End a stream at a stop string that holds a special token, though special tokens are not shown."""
    free = [token.id for token in run.generate(PROMPT, max_tokens=12, stop_tokens=())]
    spot = next(i for i in range(3, 12) if free[i] not in free[:i] and free[i] >= 4 and free[i - 1] >= 4)
    folder = copied(model[0], tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    names = {number: text for text, number in data["model"]["vocab"].items()}
    if free[spot] in names:
        data["added_tokens"].append({
            "id": free[spot], "content": names[free[spot]], "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        })  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(data))
        with ranvier.start(graph_of(tmp_path, folder), runs=runs) as other:
            before = other.codec.decode([free[spot - 1]])
            for stop in (names[free[spot]], before + names[free[spot]]):
                made = other.generate(PROMPT, max_tokens=12, stop_tokens=(), stop=[stop])
                assert [token.id for token in made] == free[: spot + 1]
                assert made.result.finish_reason == "stop"
                assert names[free[spot]] not in made.result.text


def copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(("layer", "culprit"), [(0, "first.0"), (3, "middle.0"), (5, "last.0")])
def test_nan_names_the_first_actor_that_made_it(
    layer: int, culprit: str, model: tuple[Path, Any], tmp_path: Path, runs: Path
) -> None:
    """End a stream with an error that names the actor whose output had NaN first, and no token 0 for ever."""
    folder = copied(model[0], tmp_path)
    state = load_file(folder / "model.safetensors")
    state[f"model.layers.{layer}.mlp.down_proj.weight"] *= 1e38
    state[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1e38
    save_file(state, folder / "model.safetensors")
    with ranvier.start(graph_of(tmp_path, folder), runs=runs) as broken:
        with pytest.raises(
            ranvier.ActorFailed, match="expected finite numbers, got .*; the numbers of the model"
        ) as raised:
            list(broken.generate(PROMPT, max_tokens=4))
        assert raised.value.actor == culprit
        with pytest.raises(ranvier.ActorFailed, match="expected finite numbers") as raised:
            broken.score(PROMPT)
        assert raised.value.actor == culprit


def test_nan_in_one_stream_leaves_the_others_alone(model: tuple[Path, Any], tmp_path: Path, runs: Path) -> None:
    """End only the stream whose tokens lead to NaN, though the others share its steps."""
    folder = copied(model[0], tmp_path)
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][300] = math.nan
    state["lm_head.weight"] = load_file(model[0] / "model.safetensors")["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors")
    with ranvier.start(graph_of(tmp_path, folder), runs=runs) as run:
        never = ranvier.Sampling(logit_bias={300: -1000})
        good = [run.generate([*PROMPT, number], max_tokens=8, stop_tokens=(), sampling=never) for number in range(4, 8)]
        bad = run.generate([300, 5], max_tokens=8)
        with pytest.raises(ranvier.ActorFailed, match="first.0.*hidden: expected finite numbers, got nan"):
            list(bad)
        assert all(len(list(each)) == 8 for each in good)


def test_sampling_as_the_model_says(model: tuple[Path, Any], tmp_path: Path, runs: Path) -> None:
    """Sample with the values of `generation_config.json` where the request says "model"."""
    folder = copied(model[0], tmp_path)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 3.0, "top_k": 30, "eos_token_id": 2})
    )
    with ranvier.start(graph_of(tmp_path, folder), runs=runs) as run:
        said = [token.id for token in run.generate(PROMPT, max_tokens=12, sampling="model", stop_tokens=())]
        written = ranvier.Sampling(temperature=3.0, top_k=30)
        assert said == [token.id for token in run.generate(PROMPT, max_tokens=12, sampling=written, stop_tokens=())]
        assert said != [token.id for token in run.generate(PROMPT, max_tokens=12, stop_tokens=())]
