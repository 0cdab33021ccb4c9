"""Find the places that a graph offers, and check what a request wants to read and change there, before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ranvier.actors.checkpoint import ModelConfig
from ranvier.actors.component.inside import HIDDEN, IN_LAYER, LOGITS, PATTERN, READS, Edit, Place, Read

from ..check.checked import Graph
from ..check.findings import near
from ..file.errors import RequestError
from .ops import Op, Wish, positions

MOST_READ_BYTES = 1 << 30
"""The most that one request may read. A position of a place takes four bytes per number."""
MOST_EDIT_BYTES = 8 << 20
"""The most that the edits of one request may take. Each actor gets them in one command, of at most 16 MiB."""
SPAN_BYTES = 16
"""Bounds what a piece of positions takes there."""
_LAYERS = re.compile(
    r"(?P<before>hidden|layer) (?P<first>\d{1,6})(?: ?- ?(?P<last>\d{1,6}))?(?P<after> \w+)?", re.ASCII
)


def offered(graph: Graph, most: int = 1) -> dict[Place, tuple[int, ...]]:
    """Return the places that a graph offers, and the shape of one position of each, for requests of `most` positions."""
    if graph.checkpoint is None or not graph.generates or not graph.checkpoint.config.offers_places:
        return {}
    config = graph.checkpoint.config
    found: dict[Place, tuple[int, ...]] = {}
    for actor in graph.actors.values():
        if READS not in actor.kind.to_gateway:
            continue
        if actor.kind.begins:
            found[Place(HIDDEN, 0)] = (config.hidden,)
        if actor.kind.holds_blocks:
            first, last = (0, config.layers - 1) if actor.kind.whole or actor.layers is None else actor.layers
            for layer in range(first, last + 1):
                if config.runs(blocks=True):
                    found |= {Place(name, layer): shape for name, shape in _in_layer(config, most).items()}
                found[Place(HIDDEN, layer + 1)] = (config.hidden,)
        if actor.kind.ends:
            found[Place(LOGITS)] = (config.vocab,)
    return found | _edges(graph)


def _edges(graph: Graph) -> dict[Place, tuple[int, ...]]:
    """Return the edges to the client that requests read, as places."""
    found = {}
    for edge in graph.edges:
        sizes = tuple(size for size in edge.spec.shape[1:] if isinstance(size, int))
        if graph.read_by_client(edge) and edge.spec.shape == ("tokens", *sizes):
            found[Place(edge.into)] = sizes
    return found


def _in_layer(config: ModelConfig, most: int) -> dict[str, tuple[int, ...]]:
    queries, keys = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
    shapes = {"query": queries, "key": keys, "value": keys, PATTERN: (config.heads, most), "heads": queries}
    return {name: shapes.get(name, (config.hidden,)) for name in IN_LAYER}


def named(names: str, places: Iterable[Place]) -> Iterator[Place]:
    """Yield the places that a name stands for: `hidden 3`, `hidden 1-30`, `layer 2-5 query`, `logits`.

    Raises:
        RequestError: there is no such place.
    """
    if not isinstance(names, str):
        raise RequestError(f"place: expected a name such as 'hidden 12', got {names!r:.80}")
    known = {place.name: place for place in places}
    wanted = [" ".join(names.split())]
    if found := _LAYERS.fullmatch(wanted[0]):
        first, last = int(found["first"]), int(found["last"] or found["first"])
        if last < first or last - first > len(known):
            raise RequestError(f"place {names!r:.80}: expected layers from the first to the last one")
        wanted = [f"{found['before']} {layer}{found['after'] or ''}" for layer in range(first, last + 1)]
    for name in wanted:
        if name not in known:
            what = near(name, known) if known else "this graph offers none"
            raise RequestError(f"place {name!r:.80}: no actor of this graph offers it; {what}")
        yield known[name]


def edits_of(graph: Graph, ops: Sequence[Op], prompt: int, most: int) -> tuple[Edit, ...]:
    """Return changes as actors get them. `prompt` and `most` are numbers of positions (see `ops.positions`).

    Raises:
        RequestError: there is no such place, the width is wrong, or they are too large.
    """
    if not ops:
        return ()
    places, made = offered(graph), []
    for op in ops:
        if not isinstance(op, Op):
            raise RequestError(f"edits: expected what the functions of ranvier.ops return, got {op!r:.80}")
        for place in named(op.place, places):
            spans = positions(op.at, prompt, most)
            columns = _columns(op, place, places[place])
            if op.rows > 1:
                _make_sure_of_rows(op, spans, most)
            made.append(Edit(place, spans, op.operation, op.values, op.rows, op.number, op.least, op.most, columns))
    size = sum(len(edit.values) + SPAN_BYTES * len(edit.spans) for edit in made)
    if size > MOST_EDIT_BYTES:
        raise RequestError(f"edits: expected at most {MOST_EDIT_BYTES:,} bytes of vectors and positions, got {size:,}")
    return tuple(made)


def _columns(op: Op, place: Place, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return which numbers of a position an edit changes; () means all of them.

    Raises:
        RequestError: the place cannot be changed so, or the width is wrong.
    """
    if place.layer is None and place.tensor != LOGITS:
        raise RequestError(f"{op.operation} {place.name}: an edge to the client can be read, not changed")
    if place.tensor == LOGITS:
        raise RequestError(f"{op.operation}: logits are changed by Sampling(logit_bias=…), not by edits")
    if place.tensor == PATTERN and op.width:
        raise RequestError(f"{op.operation} {place.name}: a pattern can be set to zero or scaled")
    if op.heads and len(shape) < 2:
        raise RequestError(f"{op.operation} {place.name}: it has no heads; leave heads out")
    wrong = next((head for head in op.heads if not 0 <= head < shape[0]), None)
    if wrong is not None:
        raise RequestError(f"{op.operation} {place.name}: expected heads from 0 to {shape[0] - 1}, got {wrong}")
    width = math.prod(shape[1:] if op.heads else shape)
    if op.width not in (0, width):
        raise RequestError(f"{op.operation} {place.name}: expected {width} numbers, got {op.width}")
    if place.tensor == PATTERN:  # its width grows with the positions, so its heads are named (see `model/inside.py`)
        return ((shape[0], 0), *((head, head + 1) for head in op.heads)) if op.heads else ()
    return tuple((head * width, (head + 1) * width) for head in op.heads)


def _make_sure_of_rows(op: Op, spans: Iterable[tuple[int, int | None]], most: int) -> None:
    count = sum((most if end is None else end) - start for start, end in spans)
    if any(end is None for _, end in spans) or count != op.rows:
        raise RequestError(
            f"{op.operation} {op.place}: expected one vector, or {count} for these positions, got {op.rows}"
        )


def reads_of(graph: Graph, wishes: Sequence[str | Wish], prompt: int, most: int) -> tuple[Read, ...]:
    """Return what is read, as actors get it.

    Raises:
        RequestError: there is no such place, it is named twice, or it is too much.
    """
    if isinstance(wishes, str):
        raise RequestError(f"reads: expected a list of places, got {wishes!r:.80}")
    if not wishes:
        return ()
    places = offered(graph, most)
    made: dict[Place, Read] = {}
    for each in wishes:
        wish = each if isinstance(each, Wish) else Wish(each)
        for place in named(wish.places, places):
            if place in made:
                raise RequestError(f"reads: {place.name} is named twice; name it once, with all positions")
            made[place] = Read(place, positions(wish.at, prompt, most), places[place])
    size = sum(4 * read.width * read.count(most) for read in made.values())
    if size > MOST_READ_BYTES:
        raise RequestError(
            f"reads: expected at most {MOST_READ_BYTES:,} bytes, got {size:,} for {most} positions; read fewer places, or some "
            "positions only: ops.read(place, at=…)"
        )
    return tuple(made.values())


def check_names(graph: Graph, ops: Sequence[Op], wishes: Sequence[str | Wish]) -> None:
    """Check what can be known before a prompt's length is.

    Raises:
        RequestError: see `edits_of` and `reads_of`.
    """
    edits_of(graph, [replace(op, at="all", rows=min(op.rows, 1)) if isinstance(op, Op) else op for op in ops], 1, 1)
    wishes = [replace(each, at="last") if isinstance(each, Wish) else Wish(each, "last") for each in wishes]
    reads_of(graph, wishes, 1, 1)
