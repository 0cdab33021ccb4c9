"""A run whose trace is read by several tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

import ranvier


@pytest.fixture(scope="session")
def streamed(tiny: Any) -> Callable[..., Path]:
    """`streamed(place, prompts, max_tokens, **settings)`: a run over four actors of a small llama, all prompts at once, that
    has ended: its folder, under `place`."""
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
