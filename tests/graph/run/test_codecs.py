"""Check codecs on the edges of a running graph: the scores, the sizes, and what `show` and `trace` report."""

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
from ranvier.graph.plan import show
from ranvier.graph.trace import summary, table
from ranvier.transport.format.codec import parse
from ranvier.transport.format.tensors import encode, from_buffer


@pytest.mark.parametrize(
    ("codec", "bytes_a_token", "largest_error"),
    [
        pytest.param("raw+zstd", 192, 0.0, marks=pytest.mark.slow),
        pytest.param("bfloat16", 96, 0.004, marks=pytest.mark.slow),
        pytest.param("float16+lz4", 96, 0.0005, marks=pytest.mark.slow),
        ("int8+lz4", 52, 0.004),
        pytest.param("topk:0.5", 192, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_codec_on_every_edge_of_hidden_states(
    codec: str, bytes_a_token: int, largest_error: float, tiny: Any, runs: Path, graph_file: Callable[..., Path]
) -> None:
    """Give the log-probabilities of transformers, if its hidden states pass through the same codec.

    The plan and the trace have sizes, ratio and error."""
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
    exact, coded = scores_of(oracle, ids, None), scores_of(oracle, ids, codec)
    assert float((torch.tensor(scored) - coded).abs().max()) < 1e-3, (
        "rounding may fall on the other side here and there"
    )
    assert (float((coded - exact).abs().max()) > 1e-3) == (largest_error > 0)
    told = summary.summary(summary.read(folders[0]))
    [edge] = [edge for edge in told["edges"] if edge["edge"] == "lower.hidden -> upper.hidden"]
    written = codec.partition(":")[0]  # only the sender knows the share
    assert edge["codec"]["name"] == written
    assert edge["codec"]["bytes_before"] == len(ids) * 48 * 4
    assert edge["codec"]["ratio"] == pytest.approx(edge["codec"]["bytes_before"] / edge["bytes"])
    assert edge["codec"]["ratio"] > 192 / bytes_a_token * 0.95
    assert (edge["codec"]["largest_relative_error"] or 0.0) <= largest_error
    assert f"{written}: " in table.of_summary(told)
    assert f"192 -> {bytes_a_token} B" in show.text(ranvier.plan(graph))


def scores_of(oracle: Any, ids: list[int], codec: str | None) -> torch.Tensor:
    """Return the scores of each token except the first, by transformers.

    Hidden states go through `codec` where the graph is cut."""

    def through(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        assert codec is not None
        meta, buffer, _ = encode("hidden", output[0], parse(codec), look=False)
        return from_buffer(meta, buffer)[None]

    places = [oracle.model.embed_tokens, oracle.model.layers[2], oracle.model.layers[5]] if codec is not None else []
    hooks = [place.register_forward_hook(through) for place in places]
    try:
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids])).logits[0, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    scores: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return scores


@pytest.mark.parametrize("transport", ["ipc", "local", "tcp://127.0.0.1"])
@pytest.mark.parametrize(("codec", "tried", "off"), [("auto", "raw+lz4", 0.0), ("auto:int8", "int8", 0.01)])
def test_auto_measures_the_link_and_tries_what_it_may(
    codec: str, tried: str, off: float, transport: str, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Try each codec that the edge allows, once the speed of the link is known.

    Answers are exact unless a lossy codec was named."""
    path = graph_file(
        actors={"spread": {"kind": "./counting.py:Spread"}, "narrowed": {"kind": "./counting.py:Narrowed"}},
        edges=[
            "gateway.x -> spread.x", {"from": "spread.wide", "to": "narrowed.wide", "codec": codec},
            "narrowed.y -> gateway.y",
        ],
        transport=transport,
    )  # fmt: skip
    shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)
    graph = ranvier.load(path, allow_code=True)
    assert "262144 -> 262144 B" in show.text(ranvier.plan(graph))

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            for number in range(1, 150):
                answer = (await run.call(x=torch.tensor([float(number)])))["y"]
                assert abs(float(answer) - number) <= off * number
            return run.dir

    told = summary.summary(summary.read(trio.run(main)))
    [edge] = [edge for edge in told["edges"] if edge["edge"].startswith("spread")]
    assert tried in edge["codec"]["name"].split(", ")
    assert ("int8" in edge["codec"]["name"]) == (codec == "auto:int8")
    assert 0 < edge["codec"]["messages"] < edge["messages"], "the first tell how fast the link is, as they are"


@pytest.mark.parametrize(
    ("transport", "codec"),
    [("ipc", "raw"), ("local", "raw"), ("tcp://127.0.0.1", "raw"), ("tcp://127.0.0.1", "raw+lz4")],
)
def test_what_a_step_is_given_begins_where_torchs_own_memory_does(
    transport: str, codec: str, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Align the inputs of a step like torch's own memory.

    Otherwise the last bits of a result would differ from wire to wire, and from run to run."""
    path = graph_file(
        transport=transport,
        actors={"front": {"kind": "./counting.py:Spreader"}, "where": {"kind": "./counting.py:Begins"}},
        edges=[
            "gateway.x -> front.x",
            {"from": "front.x", "to": "where.x", "codec": codec},
            "where.begins -> gateway.begins",
        ],
    )
    shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)

    async def main() -> list[int]:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            begins = []
            for tokens in (1, 2, 5, 11, 100, 1001, 150_001):
                made = await run.call(x=torch.rand(tokens))
                begins += made["begins"].tolist()
            return begins

    assert trio.run(main) == [0] * 7
