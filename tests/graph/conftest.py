"""Provide graphs that several tests run, and a run whose trace they read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from linux import FAST
from served import SMOLLM2, Server

import ranvier
from ranvier.graph.serve.server import Options

CUSTOM = Path(__file__).parent / "custom"
MANY = {"max": 100, "window_s": 60, "backoff_s": 0}


@pytest.fixture
def four(
    tiny: Any, split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path]
) -> Callable[..., ranvier.Graph]:
    """Provide a function that returns a graph of a small llama as embed, blocks0, blocks1 and head."""
    folder, _ = tiny("llama")

    def make(restart: Any = MANY, actors: dict[str, Any] | None = None, **settings: Any) -> ranvier.Graph:
        content = split(4, 6)
        for name, more in (actors or {}).items():
            content["actors"][name].update(more)
        path = graph_file(model={"source": "./set", "dtype": "float32"}, restart=restart, **content, **settings)
        return ranvier.load(path, overrides={"model.source": str(folder)})

    return make


@pytest.fixture
def own(graph_file: Callable[..., Path], tmp_path: Path) -> Callable[..., ranvier.Graph]:
    """Provide a function that returns a graph of two actors, of which the second fails as its arguments say."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def make(restart: Any = MANY, kind: str = "Faulty", supervision: Any = None, **args: Any) -> ranvier.Graph:
        path = graph_file(
            actors={"good": {"kind": "./faulty.py:Faulty"}, "bad": {"kind": f"./faulty.py:{kind}", "args": args}},
            edges=["gateway.x -> good.x", "good.y -> bad.x", "bad.y -> gateway.y"],
            restart=restart, supervision=supervision or {},
        )  # fmt: skip
        return ranvier.load(path, allow_code=True)

    return make


@pytest.fixture(scope="session")
def streamed(tiny: Any) -> Callable[..., Path]:
    """Provide `streamed(place, prompts, max_tokens, **settings)`, which returns the folder of a finished run.

    A small llama in four actors answers all prompts at once. The folder is under `place`."""
    model, _ = tiny("plain")

    def run_once(
        place: Path, prompts: Sequence[Sequence[int]], max_tokens: int, reads: Sequence[str] = (), **settings: Any
    ) -> Path:  # fmt: skip
        graph_path = place / "graph.yaml"
        graph_path.write_text(
            json.dumps({
                "ranvier": 1, "name": "traced", "model": {"source": "unset", "dtype": "float32"}, "prefill_chunk": 8,
                "actors": {"embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
                           "upper": {"kind": "blocks", "layers": "3-5"}, "head": {"kind": "head"}},
                "pipeline": ["embed", "lower", "upper", "head"], **settings,
            })
        )  # fmt: skip
        graph = ranvier.load(graph_path, overrides={"model.source": str(model)})

        async def one(run: ranvier.Run, prompt: Sequence[int]) -> None:
            async for _ in run.generate(prompt, max_tokens=max_tokens, stop_tokens=(), reads=reads):
                pass

        async def main() -> Path:
            async with ranvier.launch(graph, runs=place) as run:
                async with trio.open_nursery() as nursery:
                    for prompt in prompts:
                        nursery.start_soon(one, run, prompt)
                return run.dir

        return trio.run(main)

    return run_once


Start = Callable[..., Server]


@pytest.fixture
def start(runs: Path) -> Iterator[Start]:
    """Provide `start(options, **changes)`, which starts a server; `changes` are those of the graph, as for `--set`."""
    started: list[Server] = []

    def begin(options: Options | None = None, **changes: str) -> Server:
        own = {name.replace("__", "."): value for name, value in changes.items()}
        started.append(Server(runs, options or Options(port=0), {**FAST, **own}))
        return started[-1]

    yield begin
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Provide a server that the tests of a file share: of its `GRAPH`, or SmolLM2, with its `CHANGES` and `OPTIONS`."""
    folder = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    module = request.module
    changes, file = getattr(module, "CHANGES", FAST), getattr(module, "GRAPH", SMOLLM2)
    made = Server(folder, getattr(module, "OPTIONS", Options(port=0)), changes, file)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def continued(oracle: Any, smollm2: Path) -> Callable[[str | list[dict[str, str]], int], tuple[list[int], str]]:
    """Provide `continued(prompt, count)`: what transformers generates greedily after a text or a chat, as ids and as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)

    def generate(prompt: str | list[dict[str, str]], count: int) -> tuple[list[int], str]:
        import torch

        if isinstance(prompt, str):
            ids = torch.tensor([tokenizer(prompt).input_ids])
        else:
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        with torch.inference_mode():
            made = oracle.generate(ids, max_new_tokens=count, do_sample=False, repetition_penalty=1.0)
        new = made[0, ids.shape[1] :].tolist()
        return new, tokenizer.decode(new, skip_special_tokens=True)

    return generate
