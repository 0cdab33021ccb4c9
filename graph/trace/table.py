"""Format figures from traces as text for people. Other modules compute the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ranvier.actors.errors import counted

from .compare import LEAST_SHARE, LEAST_US
from .critical_path import CAUSES
from .summary import PARTS

_WIDE = 170
"""Columns of the table of edges, beside the names."""
_MEDIAN = 7
MOST_CHANGES = 20
MOST_CAUSES = 6
"""Maximum number of causes per actor in the table of idle times."""
_UNUSED = {"unused": "messages that went into no step", "not_taken": "messages sent but never received"}
_COUNTED = {
    "rows_late": "rows that came after their step", "rows_refused": "rows of sessions that were over",
    "second_copies": "second copies sent", "copies_left_out": "second copies not sent for lack of credit",
    "refused": "messages refused", "damaged": "messages damaged", "sent_again": "messages sent again",
}  # fmt: skip


def of_summary(figures: Mapping[str, Any], columns: int = 0) -> str:
    """Format a summary: p50 / p95 / p99 in microseconds, of edges and of actors, and what was unusual.

    In a terminal that is too narrow for that, with so many `columns`, only the medians of the edges' parts. 0: any width.
    """
    width = max((len(edge["edge"]) for edge in figures["edges"]), default=0)
    of = "every message" if figures["sample"] == 1 else f"the messages of {figures['sample']:.2%} of all sessions"
    if 0 < columns < width + _WIDE:
        return "\n".join([f"what {of} cost, in microseconds (p50)", "", *_narrow(figures, columns), *_notes(figures)])
    return "\n".join([
        f"what {of} cost, in microseconds (p50 / p95 / p99)",
        "",
        *_edges(figures["edges"], width),
        *_codecs(figures["edges"], width),
        "",
        *_actors(figures["actors"], width),
        *_notes(figures),
    ])  # fmt: skip


def _notes(figures: Mapping[str, Any]) -> list[str]:
    """Return lines about what was unusual."""
    return [
        *_unused(figures["edges"]),
        *_taps(figures["taps"]),
        *_clocks(figures["clocks"]),
        *_waits(figures["waits"]),
        *_counters(figures["counters"]),
        *(
            f"records of {actor} that are missing: {count}; the ring buffer or the disk was full"
            for actor, count in figures["records_dropped"].items()
        ),
    ]


def _edges(edges: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    yield "  ".join(["edge".ljust(width), "over ", "messages", "bytes each", *(part.center(22) for part in PARTS)])
    for edge in edges:
        each = edge["bytes"] // max(1, edge["messages"])
        cells = [edge["wire"].ljust(5), str(edge["messages"]).rjust(8), str(each).rjust(10)]
        cells += [_cell(edge["microseconds"][part]).rjust(22) for part in PARTS]
        yield "  ".join([edge["edge"].ljust(width), *cells])


def fitted(text: str, columns: int) -> str:
    """Return a text whose lines fit into a terminal; 0 columns: any."""
    return "\n".join(f"{line[: columns - 1]}…" if 0 < columns < len(line) else line for line in text.split("\n"))


def _narrow(figures: Mapping[str, Any], columns: int) -> Iterator[str]:
    """Yield a line for each edge and actor, with medians only, cut to the width of the terminal."""
    names = max(12, columns - (_MEDIAN + 1) * len(PARTS))
    yield "edge".ljust(names) + "".join(f" {part[:_MEDIAN]:>{_MEDIAN}}" for part in PARTS)
    for edge in figures["edges"]:
        medians = (edge["microseconds"][part]["p50"] for part in PARTS)
        yield _cut(_ends(edge["edge"]), names) + "".join(f" {_median(median):>{_MEDIAN}}" for median in medians)
    yield ""
    yield "actor".ljust(names) + "".join(f" {word:>{_MEDIAN}}" for word in ("steps", "busy", "compute"))
    for actor in figures["actors"]:
        cells = (str(actor["steps"]), f"{actor['busy']:.0%}", _median(actor["compute_microseconds"]["p50"]))
        yield _cut(actor["actor"], names) + "".join(f" {cell:>{_MEDIAN}}" for cell in cells)


def _ends(edge: str) -> str:
    """Return the actors of an edge, without their ports."""
    return ">".join(end.strip().partition(".")[0] for end in edge.split("->"))


def _cut(name: str, width: int) -> str:
    return name.ljust(width) if len(name) <= width else f"{name[: width - 1]}…"


def _median(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value < 1e6 else f"{value / 1e6:.1f}s"


def _codecs(edges: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    for edge in edges:
        if "codec" in edge:
            made, error = edge["codec"], edge["codec"]["largest_relative_error"]
            lost = "no loss" if error is None else f"largest relative error {error:.2g}"
            yield (
                f"{edge['edge'].ljust(width)}  {made['name']}: {made['ratio']:.2f} times smaller, "
                f"{_cell(made['microseconds'])} µs, {lost}"
            )


def _actors(actors: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    yield "  ".join(
        ["actor".ljust(width), "   steps", "      busy", "compute".center(22), "tokens per step".center(22)]
    )
    for actor in actors:
        yield "  ".join([
            actor["actor"].ljust(width), str(actor["steps"]).rjust(8), f"{actor['busy']:.0%}".rjust(10),
            _cell(actor["compute_microseconds"]).rjust(22), _cell(actor["tokens_a_step"]).rjust(22),
        ])  # fmt: skip


def _unused(edges: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for edge in edges:
        odd = [f"{words}: {edge[key]}" for key, words in _UNUSED.items() if edge[key]]
        if odd:
            yield f"{edge['edge']}: {', '.join(odd)}"


def _taps(taps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tap in taps:
        norms = " / ".join(f"{value:.3g}" for value in tap["norm"].values())
        yield f"{tap['edge']}: norm {norms}, largest {tap['largest']:.3g}, over {counted(tap['messages'], 'message')}"
    bad = [tap for tap in taps if tap["first_not_finite"] is not None]
    if bad:
        first = min(bad, key=lambda tap: int(tap["first_not_finite_ns"]))
        session, _, position, _ = first["first_not_finite"]
        yield (
            f"{first['edge']} was the first of {counted(len(bad), 'edge')} to carry NaN or infinity: session {session}, "
            f"position {position}"
        )


def _clocks(clocks: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for host, clock in clocks.items():
        drifted = ""
        if abs(clock["drift_ns"]) > clock["error_ns"]:
            drifted = f", after it drifted by {clock['drift_ns'] / 1e6:.3f} ms"
        yield (
            f"the clock of {host} is {clock['offset_ns'] / 1e6:.3f} ms ahead, give or take {clock['error_ns'] / 1e6:.3f} ms"
            f"{drifted}: its times are corrected by that; wire times between it and other hosts have the same error"
        )


def _waits(waits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for wait in waits:
        never = f", {wait['never_sent']} of them never sent" if wait["never_sent"] else ""
        yield (
            f"{wait['waiting']} waited {wait['total_ms']:.1f} ms for credit of {wait['for']} ({wait['edge']}): "
            f"{counted(wait['messages'], 'message')}{never}, the longest {wait['longest_ms']:.1f} ms"
        )


def _counters(counters: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for actor, own in counters.items():
        odd = [f"{words}: {own[name]}" for name, words in _COUNTED.items() if own.get(name)]
        if odd:
            yield f"{actor}: {', '.join(odd)}"


def _cell(values: Mapping[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values.values())


def of_changes(figures: Mapping[str, Any], most: int = MOST_CHANGES) -> str:
    """Format a comparison for people, with at most `most` changes."""
    lines = [f"from {figures['before']} to {figures['after']}", ""]
    width = max((len(change["where"]) for change in figures["changes"][:most]), default=0)
    for change in figures["changes"][:most]:
        one, other = change["p50_us"]
        times = f"{other / one:.1f} times" if one else "new"
        batch = ""
        if "tokens_a_step" in change and change["tokens_a_step"][0] != change["tokens_a_step"][1]:
            batch = f", {change['tokens_a_step'][0]:.0f} -> {change['tokens_a_step'][1]:.0f} tokens per step"
        lines.append(
            f"{change['where']:{width}}  {change['part']:9} {one:9.0f} -> {other:9.0f} µs ({times}), "
            f"{change['total_ms']:+.1f} ms over {change['times']}{batch}"
        )
    if not figures["changes"]:
        lines.append(f"no median changed by at least {LEAST_SHARE:.0%} and {LEAST_US:.0f} µs")
    lines += [f"{name}: only in the first run" for name in figures["only_before"]]
    lines += [f"{name}: only in the second run" for name in figures["only_after"]]
    return "\n".join(lines)


def of_path(figures: Mapping[str, Any]) -> str:
    """Format a critical path for people."""
    session, ms = figures["session"], figures["ms"]
    head = f"session {session}: {ms:.1f} ms from its first message to its last answer, by what it waited for"
    if "position" in figures:
        at = figures["position"]
        head = f"session {session}, position {at}: {ms:.1f} ms after the token before it, by what it waited for"
    return "\n".join([head, "", *_causes(figures["causes"])])


def of_idle(figures: Mapping[str, Any], most: int = MOST_CAUSES) -> str:
    """Format idle times for people, with at most `most` causes per actor."""
    lines = []
    for actor in figures["actors"]:
        share = actor["idle_ms"] / actor["ms"] if actor["ms"] else 0.0
        lines += [
            f"{actor['actor']} had nothing to do for {actor['idle_ms']:.1f} of {actor['ms']:.1f} ms ({share:.0%})",
            "",
        ]
        lines += [*_causes(actor["causes"][:most]), ""]
    return "\n".join(lines).rstrip()


def _causes(causes: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max((len(each["where"]) for each in causes), default=0)
    return [
        f"  {each['ms']:9.2f} ms {each['share']:6.1%}  {each['cause']:9} {each['where']:{width}}  "
        f"{counted(each['times'], 'time')}, longest {each['longest_ms']:.2f} ms: {CAUSES[each['cause']]}"
        for each in causes
    ]
