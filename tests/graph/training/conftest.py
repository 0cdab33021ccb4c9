"""Provide graphs that are trained in real processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

import ranvier
from ranvier.graph.training.trainer import Trained, train

HERE = Path(__file__).parent
Train = Callable[..., Trained]


@pytest.fixture
def graph(tmp_path: Path) -> Callable[..., ranvier.Graph]:
    """Provide a function that writes and checks a graph with a training section."""
    shutil.copy(HERE / "parts.py", tmp_path / "parts.py")

    def make(
        actors: Mapping[str, Any], edges: Sequence[Any], training: Mapping[str, Any], **settings: Any
    ) -> ranvier.Graph:
        content = {
            "ranvier": 1, "name": "learns", "actors": dict(actors), "edges": list(edges), "training": dict(training), **settings
        }  # fmt: skip
        path = tmp_path / "graph.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        source = settings.get("model", {}).get("source")
        return ranvier.load(path, allow_code=True, overrides={"model.source": source} if source else None)

    return make


@pytest.fixture
def trained(runs: Path, tmp_path: Path) -> Train:
    """Provide a function that trains a graph to its end in real processes."""

    def run(graph: ranvier.Graph, out: str = "out", seconds: float = 120, **options: Any) -> Trained:
        async def main() -> Trained:
            with trio.fail_after(seconds):
                return await train(graph, tmp_path / out, allow_code=True, runs=runs, **options)

        return trio.run(main)

    return run
