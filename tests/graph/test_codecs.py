"""Codecs on the edges of a running graph: what the text costs, what `show` and `trace` say of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph import show, trace


@pytest.mark.parametrize(
    ("codec", "least_ratio", "error"),
    [
        pytest.param("raw+zstd", 1.0, 0.0, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1.99, 0.02, marks=pytest.mark.slow),
        ("int8+lz4", 3.0, 0.1),
    ],
)
def test_a_codec_on_every_edge_of_hidden_states(
    codec: str, least_ratio: float, error: float, tiny: Any, runs: Path, graph_file: Callable[..., Path]
) -> None:
    """Log-probabilities as far from transformers' as the codec lets them be: not at all for one without loss."""
    folder, oracle = tiny("plain")
    names = ["embed", "lower", "upper", "head"]
    edges: list[Any] = [
        {"from": f"{a}.hidden", "to": f"{b}.hidden", "codec": codec} for a, b in itertools.pairwise(names)
    ]
    path = graph_file(
        model={"source": "unset", "dtype": "float32"},
        actors={"embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
                "upper": {"kind": "blocks", "layers": "3-5"}, "head": {"kind": "head"}},
        edges=[*edges, {"from": "head.token", "to": "embed.token", "feedback": True}],
    )  # fmt: skip
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    ids = list(range(3, 100))
    scored: list[float] = []
    folders: list[Path] = []

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            scored.extend(await run.score(ids))
            folders.append(run.dir)

    trio.run(main)
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    off = float((torch.tensor(scored) - expected).abs().mean())
    assert off < 1e-4 if not error else 1e-5 < off < 50 * error
    told = trace.summary(trace.read(folders[0]))
    [edge] = [edge for edge in told["edges"] if edge["edge"] == "lower.hidden -> upper.hidden"]
    assert edge["codec"]["name"] == codec
    assert edge["codec"]["bytes_before"] == len(ids) * 48 * 4
    assert edge["codec"]["ratio"] == pytest.approx(edge["codec"]["bytes_before"] / edge["bytes"])
    assert edge["codec"]["ratio"] > least_ratio
    assert (edge["codec"]["largest_relative_error"] or 0.0) <= error
    assert f"{codec}: " in trace.table(told)
    drawn = show.text(ranvier.plan(graph))
    assert {"raw+zstd": "192 -> 192 B", "bfloat16": "192 -> 96 B", "int8+lz4": "192 -> 52 B"}[codec] in drawn


@pytest.mark.parametrize(("codec", "tried", "off"), [("auto", "raw+lz4", 0.0), ("auto:int8", "int8", 0.01)])
def test_auto_measures_the_link_and_tries_what_it_may(
    codec: str, tried: str, off: float, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Once the speed is known, each codec that the edge allows is tried; answers are exact unless a lossy form was named."""
    path = graph_file(
        actors={"spread": {"kind": "./counting.py:Spread"}, "narrowed": {"kind": "./counting.py:Narrowed"}},
        edges=[
            "gateway.x -> spread.x", {"from": "spread.wide", "to": "narrowed.wide", "codec": codec},
            "narrowed.y -> gateway.y",
        ],
    )  # fmt: skip
    shutil.copy(Path(__file__).parent / "counting.py", path.parent)
    graph = ranvier.load(path, allow_code=True)
    assert "262144 -> 262144 B" in show.text(ranvier.plan(graph))

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            for number in range(1, 30):
                answer = (await run.call(x=torch.tensor([float(number)])))["y"]
                assert abs(float(answer) - number) <= off * number
            return run.dir

    told = trace.summary(trace.read(trio.run(main)))
    [edge] = [edge for edge in told["edges"] if edge["edge"].startswith("spread")]
    assert tried in edge["codec"]["name"].split(", ")
    assert ("int8" in edge["codec"]["name"]) == (codec == "auto:int8")
    assert 0 < edge["codec"]["messages"] < edge["messages"], "the first tell how fast the link is, as they are"
