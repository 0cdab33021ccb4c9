"""Find what is wrong with a request before any process of a run starts."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ranvier.graph.commands import cli

COMMAND = [sys.executable, "-m", "ranvier"]
Done = subprocess.CompletedProcess[str]


def ranvier(*arguments: str | bytes, folder: Path) -> Done:
    """Run the command to its end, in a folder."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, errors="replace", timeout=100, check=False, cwd=folder
    )


def here(*arguments: str, folder: Path) -> Done:
    """Do the same in this process: for commands that must end before any other process starts."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", ["ranvier", *arguments]),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    code = ended.value.code
    return subprocess.CompletedProcess([], code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    """Provide a folder with a graph, and a small llama with a tokenizer and a template in `model/`."""
    source, _ = tiny("before the start")
    (tmp_path / "model").mkdir()
    for file in source.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "graph.yaml").write_text(
        "ranvier: 1\nname: before\nmodel:\n  source: ./model\n  dtype: float32\nactors:\n  all: {kind: model}\npipeline: [all]\n"
    )
    return tmp_path


def refused(folder: Path, *arguments: str | bytes) -> str:
    """Run a prompt that must be refused, and return the message. No run folder may be made, so nothing was started."""
    words = [argument for argument in arguments if isinstance(argument, str)]
    command = ("run", "graph.yaml", "-n", "4")
    if len(words) < len(arguments):  # only a real command line has bytes
        done = ranvier(*command, *arguments, folder=folder)
    else:
        done = here(*command, *words, folder=folder)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert not (folder / "ranvier-runs").exists()
    return done.stderr.splitlines()[-1]


def test_no_chat_template_names_raw(folder: Path) -> None:
    """Say `--raw` where the model has no chat template, in `check` and before a run; run it raw."""
    (folder / "model" / "tokenizer_config.json").unlink()
    assert "; no chat template: run it with --raw" in here("check", "graph.yaml", folder=folder).stdout
    assert "no chat template; use a raw prompt (--raw, raw=True)" in refused(folder, "--prompt", "hi")
    assert ranvier("run", "graph.yaml", "-n", "2", "--prompt", "hi", "--raw", folder=folder).returncode == 0


@pytest.mark.parametrize(("file", "content", "words"), [
    ("tokenizer.json", "{", "tokenizer.json: "),
    ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template: line 1: "),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat template: expected text, got int"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_opened(file: str, content: str, words: str, folder: Path) -> None:
    """Find a damaged tokenizer or template in `check`, at the model's source, and before a run."""
    (folder / "model" / file).write_text(content)
    checked = here("check", "graph.yaml", folder=folder)
    assert checked.returncode == 2
    assert "graph.yaml:4:11: " in checked.stderr and words in checked.stderr
    [problem] = json.loads(here("check", "graph.yaml", "--json", folder=folder).stdout)["problems"]
    assert problem["line"] == 4 and words in problem["what"]
    assert words in refused(folder, "--prompt", "hi")


def test_a_model_without_a_tokenizer_takes_token_ids(folder: Path) -> None:
    """Say in `check` that prompts are token ids, and refuse a prompt of text."""
    (folder / "model" / "tokenizer.json").unlink()
    assert "; no tokenizer: prompts are token ids" in here("check", "graph.yaml", folder=folder).stdout
    assert "graph before has no tokenizer; give token ids" in refused(folder, "--prompt", "hi")


@pytest.mark.parametrize("more", [(), ("--raw",)], ids=["chat", "raw"])
def test_a_prompt_over_the_context(more: tuple[str, ...], folder: Path) -> None:
    """Count the tokens of a long prompt before the start."""
    words = "the prompt has 510 tokens and 4 are asked for, but the model's context is 512"
    assert words in refused(folder, "--prompt", "a" * 510, *more)


def test_a_prompt_that_is_no_text(folder: Path) -> None:
    """Refuse bytes that are no UTF-8, and say where they begin."""
    assert "prompt: expected text, got bytes that are no UTF-8 (the first at character 4)" in refused(
        folder, "--prompt", b"the \xff sun"
    )


@pytest.mark.parametrize(("arguments", "words"), [
    (("--template", "rag"), "the model has no chat template 'rag'"),
    (("--tools", "none.json"), "--tools none.json: "),
    (("--tools", "graph.yaml"), "--tools graph.yaml: "),
    (("--template-argument", "x"), "--template-argument x: expected KEY=VALUE, such as enable_thinking=false"),
    (("--logit-bias", "a=b"), "--logit-bias: expected a token's id and a number"),
    (("--logprobs", "2"), "--logprobs needs --json"),
    (("--logprobs", "50", "--json"), "logprobs: expected 0 to 20 likeliest tokens, got 50"),
    (("--logit-bias", "999=1"), "logit_bias: token 999 is not in the vocabulary of 320"),
    (("--min-tokens", "9"), "min_tokens: expected at most max_tokens of 4, got 9"),
    (("--top-p", "2"), "--top-p: expected from 0 to 1, got 2"),
    (("--presence-penalty", "nan"), "--presence-penalty: expected"),
])  # fmt: skip
def test_options_that_cannot_be(arguments: tuple[str, ...], words: str, folder: Path) -> None:
    """Refuse wrong options of a chat and of sampling, and name them."""
    assert words in refused(folder, "--prompt", "hi", *arguments)


@pytest.mark.slow
def test_options_of_a_chat_and_of_sampling(folder: Path) -> None:
    """Pass tools, arguments, penalties and the model's own sampling on to the request."""
    config = {"chat_template": "{{ messages[0].content }}{{ tools | length if tools }}{{ mood }}"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "model" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 2.5, "top_k": 40})
    )
    (folder / "tools.json").write_text(json.dumps([{"name": "f"}]))

    def said(*arguments: str) -> dict[str, Any]:
        done = ranvier("run", "graph.yaml", "-n", "8", "--prompt", "hi", "--json", *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    chat = ("--tools", "tools.json", "--template-argument", "mood=ok")
    greedy = said(*chat, "--sampling", "model", "--temperature", "0", "--logprobs", "2")
    assert greedy["prompt_tokens"] == len("hi1ok")
    logprobs = greedy["logprobs"]
    assert len(logprobs) == 8 and all(each["logprob"] == max(each["top"].values()) for each in logprobs)
    drawn = said(*chat, "--sampling", "model")["token_ids"]
    assert drawn == said(*chat, "--temperature", "2.5", "--top-k", "40")["token_ids"] != greedy["token_ids"]


@pytest.mark.parametrize(("inputs", "words"), [
    ({"y": (1, 4)}, "call: expected the inputs ['x'], got ['y']"),
    ({"x": (1, 5)}, "gateway.x -> double.x"),
    ({"x": (3, 4)}, "a call has one row: name a dimension of any size `tokens`"),
])  # fmt: skip
def test_inputs_that_do_not_fit(inputs: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    """Check names and shapes of a call's inputs before the start."""
    (tmp_path / "double.py").write_text(
        "from ranvier import Actor, TensorSpec\n\n\nclass Double(Actor):\n"
        "    inputs = {'x': TensorSpec('float32', ('rows', 4))}\n    outputs = {'y': TensorSpec('float32', ('rows', 4))}\n\n"
        "    def step(self, batch):\n        return {'y': batch['x'] * 2}\n"
    )
    (tmp_path / "graph.yaml").write_text(
        "ranvier: 1\nname: double\nactors:\n  double: {kind: './double.py:Double'}\n"
        "edges:\n  - gateway.x -> double.x\n  - double.y -> gateway.y\n"
    )
    checked = here("check", "graph.yaml", "--allow-code", folder=tmp_path).stdout
    assert "; gateway.x -> double.x: a call has one row, so rows is 1; name a dimension of any size tokens" in checked
    save_file({name: torch.ones(shape) for name, shape in inputs.items()}, tmp_path / "in.safetensors")
    done = here("run", "graph.yaml", "--input", "in.safetensors", "--allow-code", folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "ranvier-runs").exists()


def test_a_graph_that_returns_no_token(folder: Path) -> None:
    """Find that the token of a head goes back to no embedding: such a graph would stop after one token."""
    (folder / "graph.yaml").write_text(
        "ranvier: 1\nname: before\nmodel: {source: ./model, dtype: float32}\n"
        "actors:\n  a: {kind: first_stage, layers: 0-2}\n  b: {kind: last_stage, layers: 3-5}\nedges:\n  - a.hidden -> b.hidden\n"
    )
    done = here("check", "graph.yaml", folder=folder)
    assert done.returncode == 2
    assert (
        "actor b: its output 'token' goes nowhere, so no text can be generated; add {from: b.token, to: a.token, feedback: true}"
        in done.stderr
    )
