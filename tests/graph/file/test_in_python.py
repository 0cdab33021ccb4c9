"""Write graphs in Python, and vary graphs by dotted keys: with the same checks, and the same answers, as from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import ranvier

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
ROW = ["embed", "lower", "upper", "head"]
PARTS = {
    "embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
    "upper": {"kind": "blocks", "layers": "3-5"}, "head": {"kind": "head"},
}  # fmt: skip


def of_tiny(folder: Path, **keys: Any) -> ranvier.Graph:
    return ranvier.Graph(model={"source": folder, "dtype": "float32"}, actors=PARTS, pipeline=ROW, **keys)


def test_a_graph_in_python_is_that_of_its_file(tiny: Any, graph_file: Callable[..., Path]) -> None:
    """Plan the same processes and edges as from a file. A path, and a tuple, stand for themselves."""
    folder, _ = tiny("llama")
    made = of_tiny(folder, name="test")
    path = graph_file(model={"source": "./set", "dtype": "float32"}, actors=PARTS, pipeline=ROW)
    read = ranvier.load(path, overrides={"model.source": str(folder)})
    assert made.actors == read.actors and made.edges == read.edges
    assert ranvier.plan(made).hash == ranvier.plan(read).hash
    as_data = ranvier.load(
        {"model": {"source": str(folder), "dtype": "float32"}, "actors": PARTS, "pipeline": tuple(ROW)}
    )
    assert as_data.edges == read.edges and as_data.path is None


def test_a_graph_in_python_answers_and_resumes(
    tiny: Any, exact: Callable[[Sequence[int], int], list[int]], runs: Path
) -> None:
    """Answer as transformers does, and load the graph again from the run's folder."""
    from ranvier.graph.commands.resume_command import graph_of

    folder, _ = tiny("llama")
    graph = of_tiny(folder).variant({"edges[lower.hidden->upper.hidden].credits": 3, "journal": True})
    with ranvier.start(graph, runs=runs) as run:
        found = [token.id for token in run.generate([5, 6, 7], max_tokens=12, stop_tokens=())]
        place = run.dir
    assert found == exact([5, 6, 7], 12)
    again = graph_of(place, allow_code=False)
    assert again.edges == graph.edges and again.folder == Path.cwd()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"actors": {"a": {"kind": "embeding"}}}, "graph: actors.a.kind: actor a: kind 'embeding' does not exist; did you mean"),
        ({"actors": {"a": {"kind": "blocks", "layer": 3}}}, "graph: actors.a.layer: unknown key 'layer'; did you mean 'layers'?"),
        ({"actors": {"a": {"kind": object()}}}, "graph: data: holds a value of type object; give text, numbers, lists and dicts"),
        ({"actors": {}, "edges": ["a"]}, "graph: edges.0: edge 'a' has no arrow; write actor.port -> actor.port"),
        ({"actors": {}, "pipelin": []}, "graph: pipelin: unknown key 'pipelin'; did you mean 'pipeline'?"),
    ],
)  # fmt: skip
def test_errors_name_the_key(keys: Any, words: str) -> None:
    """Say which key is wrong, where a file's error says line and column."""
    with pytest.raises(ranvier.GraphError, match=re.escape(words)):
        ranvier.Graph(**keys)


def test_data_that_holds_itself() -> None:
    """Refuse data without an end."""
    args: dict[str, Any] = {}
    args["self"] = args
    with pytest.raises(ranvier.GraphError, match="is nested over 20 levels deep"):
        ranvier.load({"actors": {"a": {"kind": "embedding", "args": args}}})


def test_edges_by_number_and_by_their_ends() -> None:
    """Change an edge that is written as text or as a mapping, and one that a pipeline makes."""
    graph = ranvier.load(
        EXAMPLES / "smollm2.yaml",
        overrides={"edges.0.credits": "3", "edges[lower.hidden -> upper.hidden].codec": "int8", "edges.1.credits": 5},
    )
    assert [(edge.credits_messages, edge.codec) for edge in graph.edges[:2]] == [(3, "raw"), (5, "int8")]
    short = ranvier.load(EXAMPLES / "smollm2-one.yaml")
    assert not short.file.edges
    model = {"source": short.file.model.source} if short.file.model is not None else {}
    parts = {**PARTS, "lower": {"kind": "blocks", "layers": "0-14"}, "upper": {"kind": "blocks", "layers": "15-29"}}
    row = ranvier.Graph(model=model, actors=parts, pipeline=ROW)
    varied = row.variant({"edges[upper.hidden->head.hidden].credits": 2, "actors.lower.threads": 1})
    assert {edge.name: edge.credits_messages for edge in varied.edges}["upper.hidden -> head.hidden"] == 2
    assert sorted(edge.name for edge in varied.edges) == sorted(edge.name for edge in row.edges)
    assert varied.actors["lower"].section.threads == 1 and row.actors["lower"].section.threads is None


def test_a_listed_edge_keeps_what_it_does_not_say() -> None:
    """Keep the credits of prompts, and that the last edge of a pipeline is feedback, when another setting is changed."""
    graph = ranvier.load(
        "smollm2",
        overrides={
            "edges[gateway.token->embed.token].credit_bytes": 1 << 20,
            "edges[head.token->embed.token].credits": 3,
        },
    )
    edges = {edge.name: edge for edge in graph.edges}
    assert edges["gateway.token -> embed.token"].credits_messages == 256
    assert edges["gateway.token -> embed.token"].credits_bytes == 1 << 20
    assert edges["head.token -> embed.token"].feedback and edges["head.token -> embed.token"].credits_messages == 3


def test_paths_of_a_named_graph_begin_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """Find ./folder in the working directory, not in Ranvier's own folder."""
    folder, _ = tiny("llama")
    (tmp_path / "mine").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    graph = ranvier.load(
        "smollm2", overrides={"model.source": "./mine", "actors.lower.layers": "0-2", "actors.upper.layers": "3-5"}
    )
    assert graph.folder == Path() and graph.checkpoint is not None and graph.checkpoint.config.layers == 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.dtype": object()}, "setting model.dtype: holds a value of type object"),
        ({"name": "\ud800"}, "setting name: holds text that is not Unicode"),
        ({"model.dtype": "[a"}, "setting model.dtype=[a: is not YAML"),
        ({"name": "x: y: z"}, "setting name=x: y: z: is not YAML"),
        ({"actors.lower.args" + ".a" * 3000: "1"}, "is no key of a graph file"),
        ({"model..dtype": "float32"}, "is no key of a graph file"),
        ({"edges." + "9" * 900 + ".credits": "1"}, "is no entry: the list has"),
        ({"actors.lower.args": {"b": b"x"}}, "holds a value of type bytes"),
    ],
)
def test_odd_settings(overrides: dict[str, Any], words: str) -> None:
    """Report settings that no graph file can have, whatever they are."""
    with pytest.raises(ranvier.GraphError, match=re.escape(words)):
        ranvier.load(EXAMPLES / "smollm2.yaml", overrides=overrides)


def test_odd_data() -> None:
    """Report data and paths that are none."""
    endless: list[Any] = []
    endless.append(endless)
    for source, words in (
        ({"actors": endless}, "nested over"),
        ("a\0b", "cannot be read"),
        ({"actors": {"a": b"x"}}, "type bytes"),
    ):
        with pytest.raises(ranvier.GraphError, match=words):
            ranvier.load(source)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("edges.9.credits", "3", "setting edges.9.credits=3: '9' is no entry: the list has 4 entries, numbered from 0"),
        ("edges.first.credits", "3", "'first' is no entry"),
        ("edges[lower].codec", "raw", "'[lower]' is no edge; write edges[actor.port->actor.port]"),
        ("edges[x.a->y.b].codec", "raw", "setting edges[x.a->y.b].codec=raw: actor 'x' does not exist"),
        (
            "edges.0.codec",
            "int7",
            "setting edges.0.codec=int7: edge embed.hidden -> lower.hidden: codec 'int7' does not exist",
        ),
        ("edges", "1", "setting edges=1: edges: Input should be a valid list"),
        ("actors[lower].threads", "1", "'[lower]' is no key here; give a dotted key of the file"),
        ("model.dtype.x", "1", "'dtype' holds no keys; give a dotted key of the file"),
    ],
)
def test_wrong_settings(key: str, value: str, words: str) -> None:
    """Name the setting as it was typed, and what is wrong with it."""
    with pytest.raises(ranvier.GraphError, match=re.escape(words)):
        ranvier.load(EXAMPLES / "smollm2.yaml", overrides={key: value})


def test_the_run_folder_keeps_what_was_read(streamed: Callable[..., Path], tmp_path: Path) -> None:
    """Write the text that was checked into the run folder, as the file may change in the meantime."""
    place = streamed(tmp_path, [[5, 6]], 2)
    assert (place / "graph.yaml").read_bytes() == (tmp_path / "graph.yaml").read_bytes()
    assert json.loads((place / "run.json").read_text())["folder"] == str(tmp_path)
