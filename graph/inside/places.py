"""Find the places that a graph offers, and check what a request wants to read and change there, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ranvier.actors.component.inside import HIDDEN, LOGITS, READS, Edit, Place, Read

from ..check.checked import Graph
from ..check.findings import near
from ..file.errors import RequestError
from .ops import Op, Wish, positions

MOST_READ_BYTES = 1 << 30
"""The most that one request may read. A position of a place takes four bytes per number."""
MOST_EDIT_BYTES = 16 << 20
"""The most that the vectors of one request's edits may take. Each actor gets them."""
_HIDDEN = re.compile(r"hidden\s+(\d+)(?:\s*-\s*(\d+))?")


def offered(graph: Graph) -> dict[Place, int]:
    """Return the places that a graph offers, and the numbers per position of each."""
    if graph.checkpoint is None or not graph.generates or graph.checkpoint.config.encoder is not None:
        return {}
    config = graph.checkpoint.config
    if config.uncut:
        return {}
    found = {}
    for actor in graph.actors.values():
        if READS not in actor.kind.to_gateway:
            continue
        if actor.kind.begins:
            found[Place(HIDDEN, 0)] = config.hidden
        if actor.kind.holds_blocks:
            first, last = (0, config.layers - 1) if actor.kind.whole or actor.layers is None else actor.layers
            found |= {Place(HIDDEN, layer + 1): config.hidden for layer in range(first, last + 1)}
        if actor.kind.ends:
            found[Place(LOGITS)] = config.vocab
    return found


def named(names: str, places: Iterable[Place]) -> Iterator[Place]:
    """Yield the places that a name stands for: `hidden 3`, `hidden 1-30`, `logits`.

    Raises:
        RequestError: there is no such place.
    """
    known = {place.name: place for place in places}
    if not isinstance(names, str):
        raise RequestError(f"place: expected a name such as 'hidden 12', got {names!r:.80}")
    found = _HIDDEN.fullmatch(names.strip())
    wanted = [names.strip()]
    if found:
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first > len(known):
            raise RequestError(f"place {names!r:.80}: expected layers from the first to the last one")
        wanted = [Place(HIDDEN, layer).name for layer in range(first, last + 1)]
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
            if place.tensor == LOGITS:
                raise RequestError(f"{op.operation}: logits are changed by Sampling(logit_bias=…), not by edits")
            if op.width not in (0, places[place]):
                raise RequestError(f"{op.operation} {place.name}: expected {places[place]} numbers, got {op.width}")
            spans = positions(op.at, prompt, most)
            if op.rows > 1:
                _make_sure_of_rows(op, spans, most)
            made.append(Edit(place, spans, op.operation, op.values, op.rows, op.number, op.least, op.most))
    size = sum(len(edit.values) for edit in made)
    if size > MOST_EDIT_BYTES:
        raise RequestError(f"edits: expected at most {MOST_EDIT_BYTES:,} bytes of vectors, got {size:,}")
    return tuple(made)


def _make_sure_of_rows(op: Op, spans: Iterable[tuple[int, int | None]], most: int) -> None:
    count = sum((most if end is None else end) - start for start, end in spans)
    if any(end is None for _, end in spans) or count != op.rows:
        raise RequestError(f"{op.operation} {op.place}: expected one vector, or {count} for these positions, got {op.rows}")


def reads_of(graph: Graph, wishes: Sequence[str | Wish], prompt: int, most: int) -> tuple[Read, ...]:
    """Return what is read, as actors get it.

    Raises:
        RequestError: there is no such place, it is named twice, or it is too much.
    """
    if isinstance(wishes, str):
        raise RequestError(f"reads: expected a list of places, got {wishes!r:.80}")
    if not wishes:
        return ()
    places = offered(graph)
    made: dict[Place, Read] = {}
    for each in wishes:
        wish = each if isinstance(each, Wish) else Wish(each)
        for place in named(wish.places, places):
            if place in made:
                raise RequestError(f"reads: {place.name} is named twice; name it once, with all positions")
            made[place] = Read(place, _ascending(positions(wish.at, prompt, most)), places[place])
    size = sum(4 * read.width * read.count(most) for read in made.values())
    if size > MOST_READ_BYTES:
        raise RequestError(
            f"reads: expected at most {MOST_READ_BYTES:,} bytes, got {size:,} for {most} positions; read fewer places, or some "
            "positions only: ops.read(place, at=…)"
        )
    return tuple(made.values())


def _ascending(spans: tuple[tuple[int, int | None], ...]) -> tuple[tuple[int, int | None], ...]:
    return spans if len(spans) == 1 else tuple(sorted(set(spans)))


def check_names(graph: Graph, ops: Sequence[Op], wishes: Sequence[str | Wish]) -> None:
    """Check what can be known before a prompt's length is.

    Raises:
        RequestError: see `edits_of` and `reads_of`.
    """
    most = graph.checkpoint.config.context if graph.checkpoint is not None else 1
    edits_of(graph, [replace(op, at="all", rows=min(op.rows, 1)) if isinstance(op, Op) else op for op in ops], 1, most)
    reads_of(graph, [replace(each, at="last") if isinstance(each, Wish) else Wish(each, "last") for each in wishes], 1, most)
