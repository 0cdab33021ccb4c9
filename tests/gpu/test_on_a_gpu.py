"""Run graphs on a real GPU: transformers' tokens, several actors on one GPU, a killed actor, and memory that comes back."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trio
from safetensors.torch import save_file
from waiting import wait_until

import ranvier
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component import devices
from ranvier.actors.component.actor import Context
from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.protocol.training_spec import LOGITS, Loss
from ranvier.actors.training.layers import NativeStage
from ranvier.actors.training.stage import TrainedStage
from ranvier.graph.training.trainer import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPT = [1, 17, 40, 9, 300, 12, 77]
TOKENS = 100
LEAST = 98
"""Greedy choices in a hundred that must be transformers', given the same tokens before."""
MOST_ERROR = 1.2
"""Most error against the float32 model, as a multiple of transformers' own."""
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
"""Sizes that the kernels of a GPU can compute with, for families that they know."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": {"sliding_window": 16}, "mistral": {"sliding_window": 16},
    "gpt2": {"vocab_size": 320, "n_embd": 48, "n_layer": 6, "n_head": 6, "n_positions": 512},
}  # fmt: skip
ACTORS = {
    "embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
    "upper": {"kind": "blocks", "layers": "3-5"}, "head": {"kind": "head"},
}  # fmt: skip


def graph_of(
    file: Callable[..., Path], model: Path, dtype: str, *, host: str | None, on_gpu: set[str]
) -> ranvier.Graph:
    """Return four actors, some of them on the GPU, and those in one process if `host` names it."""
    actors: dict[str, Any] = {name: dict(actor) for name, actor in ACTORS.items()}
    for name in on_gpu:
        actors[name] |= {"device": "cuda:0", **({"host": host} if host else {})}
    path = file(model={"source": "unset", "dtype": dtype}, actors=actors, pipeline=list(actors))
    return ranvier.load(path, overrides={"model.source": str(model)})


def answered(graph: ranvier.Graph, runs: Path, at: Callable[[ranvier.Run, int], None] = lambda *_: None) -> Any:
    """Return the tokens of a stream and its logits [tokens, V]."""

    async def main() -> Any:
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        with trio.fail_after(100):
            async with ranvier.launch(graph, runs=runs) as run:
                async for token in run.generate(PROMPT, max_tokens=TOKENS, stop_tokens=(), logits=True):
                    tokens.append(token.id)
                    logits.append(torch.frombuffer(bytearray(token.logits), dtype=torch.float32))
                    at(run, len(tokens))
        return tokens, torch.stack(logits)

    return trio.run(main)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_transformers(family: str, tiny: Any, graph_file: Callable[..., Path], runs: Path) -> None:
    """Choose transformers' tokens on the same GPU in bfloat16, with about its error against the float32 model."""
    sizes = {} if family == "gpt2" else SIZES
    folder, model = tiny(f"gpu-{family}", family, **{**sizes, **FAMILIES[family]})
    tokens, logits = answered(graph_of(graph_file, folder, "bfloat16", host="gpu", on_gpu=set(ACTORS)), runs)
    ids = torch.tensor([PROMPT + tokens])
    with torch.inference_mode():
        exact = model.double()(ids).logits[0, len(PROMPT) - 1 : -1]
        theirs = model.to("cuda:0", torch.bfloat16)(ids.to("cuda:0")).logits[0, len(PROMPT) - 1 : -1].cpu()
    model.to("cpu", torch.float32)
    same = sum(int(best) == token for best, token in zip(theirs.argmax(-1), tokens, strict=True))
    assert same >= LEAST
    ours, peer = ((each.double() - exact).pow(2).mean().sqrt() for each in (logits, theirs))
    assert ours <= MOST_ERROR * peer


@pytest.mark.parametrize(
    ("host", "on_gpu"), [(None, {"lower", "upper"}), ("gpu", {"lower", "head"}), (None, {"upper"})]
)
def test_float32_is_the_processors(
    host: str | None, on_gpu: set[str], tiny: Any, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Give the tokens of the processor however actors are placed, and nearly its logits."""
    folder, _ = tiny("llama")
    tokens, logits = answered(graph_of(graph_file, folder, "float32", host=host, on_gpu=on_gpu), runs)
    expected, exact = answered(graph_of(graph_file, folder, "float32", host=None, on_gpu=set()), runs)
    assert tokens == expected and math.isclose(float((logits - exact).abs().max()), 0, abs_tol=1e-3)


TWO = {
    "first": {"kind": "first_stage", "layers": "0-2"}, "last": {"kind": "last_stage", "layers": "3-5"},
}  # fmt: skip
ONE = {"all": {"kind": "model"}}


@pytest.mark.parametrize(
    ("actors", "more", "most"),
    [
        (TWO, {}, 0.01), (TWO, {"trace": False}, 0.01), (ONE, {"trace": False}, 0.01), (ONE, {"weights": "int8"}, 0.02),
        (ONE, {"weights": "int4"}, 0.25),
    ],
)  # fmt: skip
def test_streams_beside_each_other(
    actors: dict[str, Any], more: dict[str, Any], most: float, tiny: Any, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Give each of forty streams the float32 model's tokens, or nearly as likely ones, also where steps run ahead of the GPU."""
    folder, model = tiny("gpu-streams", "llama", **SIZES)
    placed = {name: {**keys, "device": "cuda:0", "host": "gpu"} for name, keys in actors.items()}
    path = graph_file(
        model={"source": "unset", "dtype": "bfloat16", "weights": more.get("weights", "dtype")}, actors=placed,
        pipeline=list(placed), trace=more.get("trace", True),
    )  # fmt: skip
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    found: dict[int, list[int]] = {}

    async def main() -> None:
        async def one(number: int) -> None:
            stream = run.generate([*PROMPT, 3 + number], max_tokens=30, stop_tokens=())
            found[number] = [token.id async for token in stream]

        with trio.fail_after(100):
            async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(one, number)

    trio.run(main)
    behind = []
    with torch.inference_mode():
        for number, tokens in found.items():
            exact = model(torch.tensor([[*PROMPT, 3 + number, *tokens]])).logits[0, len(PROMPT) : -1]
            chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            behind.append((exact.amax(1) - chosen) / (exact.amax(1) - exact.amin(1)))
    assert float(torch.cat(behind).mean()) < most, "0.5 for tokens by chance"


def test_gradients_are_transformers(tiny: Any) -> None:
    """Compute the loss and the gradients of a whole model on the GPU, in float32."""
    folder, model = tiny("gpu-gradients", "llama", num_hidden_layers=3)
    context = Context("all.0", {}, lambda _: None, open_checkpoint(folder), "float32", device="cuda:0")
    ids = torch.randint(3, 320, (2, 13), generator=torch.Generator().manual_seed(2))
    term = Loss(LOGITS, "cross_entropy", "targets")
    stage = TrainedStage("all.0", NativeStage(BUILT_IN["model"], context, 12), [term], [], [])
    token, targets = (part.flatten().cuda() for part in (ids[:, :-1], ids[:, 1:]))
    _, [value] = stage.forward(0, {"token": token}, {"targets": targets}, 1.0)
    stage.backward(0, {})
    gradients = stage.exported(stage.gradients())
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert value.loss == pytest.approx(loss.item(), rel=1e-4)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name].cpu(), weight.grad, rtol=5e-3, atol=1e-4)


def test_training(tmp_path: Path, runs: Path) -> None:
    """Train the two halves of the digits example on the GPU, to the processor's losses."""
    shutil.copytree(Path(__file__).parents[2] / "examples" / "digits", tmp_path / "digits")
    pixels = torch.rand(500, 64, generator=torch.Generator().manual_seed(1))
    save_file(
        {"pixels": pixels, "label": (pixels[:, :32].sum(1) > 16).long()}, tmp_path / "digits" / "digits.safetensors"
    )
    example = tmp_path / "digits" / "digits.yaml"

    async def losses(out: str, device: str) -> list[float]:
        names = ranvier.load(example, allow_code=True).actors
        changes = {f"actors.{name}.device": device for name in names} | {"training.steps": "40"}
        graph = ranvier.load(example, allow_code=True, overrides=changes)
        with trio.fail_after(100):
            made = await train(graph, tmp_path / out, allow_code=True, runs=runs)
        return [told["loss"] for told in made.history if "validation" not in told]

    found, expected = (trio.run(losses, device.replace(":", ""), device) for device in ("cuda:0", "cpu"))
    assert len(found) == 40 and found == pytest.approx(expected, rel=1e-3)


def test_a_killed_actor_and_its_memory(tiny: Any, graph_file: Callable[..., Path], runs: Path) -> None:
    """Go on with the same text after kill -9, and leave no memory on the GPU behind."""
    folder, _ = tiny("llama")
    graph = graph_of(graph_file, folder, "float32", host="gpu", on_gpu={"lower", "upper"})
    before = devices.gpu("cuda:0").free_bytes
    expected, _ = answered(graph, runs)

    def kill(run: ranvier.Run, count: int) -> None:
        if count == 10:
            os.kill(next(pid for name, pid in run.pids.items() if name.startswith("lower.")), signal.SIGKILL)

    tokens, _ = answered(graph, runs, kill)
    assert tokens == expected
    assert wait_until(lambda: devices.gpu("cuda:0").free_bytes > before - (64 << 20), 20)


def test_a_gpu_that_is_not_there(tiny: Any, graph_file: Callable[..., Path]) -> None:
    """Name the GPUs that are there."""
    folder, _ = tiny("llama")
    path = graph_file(
        model={"source": "unset"}, actors={"all": {"kind": "model", "device": "cuda:98"}}, pipeline=["all"]
    )
    with pytest.raises(ranvier.GraphError, match=r"device cuda:98: there is no such GPU; this machine has cuda:0 \("):
        ranvier.load(path, overrides={"model.source": str(folder)})
