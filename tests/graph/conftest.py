"""Provide graphs that several tests run, and a run whose trace they read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

import ranvier

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

    def run_once(place: Path, prompts: Sequence[Sequence[int]], max_tokens: int, **settings: Any) -> Path:
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
            async for _ in run.generate(prompt, max_tokens=max_tokens, stop_tokens=()):
                pass

        async def main() -> Path:
            async with ranvier.launch(graph, runs=place) as run:
                async with trio.open_nursery() as nursery:
                    for prompt in prompts:
                        nursery.start_soon(one, run, prompt)
                return run.dir

        return trio.run(main)

    return run_once
