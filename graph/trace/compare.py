"""List what changed between two runs, per edge and part and per actor, the largest total time first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .summary import PARTS

LEAST_SHARE = 0.1
"""Smallest reported change of a median, as a share of the larger one."""
LEAST_US = 5.0
"""Smallest reported change of a median, in microseconds. A change must reach both limits."""


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two summaries (`summary.summary`).

    A change's `total_ms` is the change of the median times the number of messages, or steps, of the second run.
    """
    changes = sorted(_changes(before, after), key=lambda change: -abs(change["total_ms"]))
    return {
        "before": before["run_dir"],
        "after": after["run_dir"],
        "changes": changes,
        "only_before": sorted(_names(before) - _names(after)),
        "only_after": sorted(_names(after) - _names(before)),
    }


def _names(figures: Mapping[str, Any]) -> set[str]:
    return {edge["edge"] for edge in figures["edges"]} | {actor["actor"] for actor in figures["actors"]}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    old_edges = {edge["edge"]: edge for edge in before["edges"]}
    for edge in after["edges"]:
        old = old_edges.get(edge["edge"])
        if old is None:
            continue
        for part in PARTS:
            if part != "compute":  # compared per actor, below
                yield from _change(
                    edge["edge"], part, old["microseconds"][part], edge["microseconds"][part], edge["messages"]
                )
    old_actors = {actor["actor"]: actor for actor in before["actors"]}
    for actor in after["actors"]:
        old = old_actors.get(actor["actor"])
        if old is None:
            continue
        times = _change(
            actor["actor"], "compute", old["compute_microseconds"], actor["compute_microseconds"], actor["steps"]
        )
        for change in times:
            yield {**change, "tokens_a_step": [old["tokens_a_step"]["p50"], actor["tokens_a_step"]["p50"]]}


def _change(
    where: str, part: str, old: Mapping[str, float | None], new: Mapping[str, float | None], times: int
) -> Iterator[dict[str, Any]]:
    one, other = old["p50"], new["p50"]
    if one is None or other is None:
        return
    by = other - one
    if abs(by) >= LEAST_US and abs(by) >= LEAST_SHARE * max(one, other):
        yield {
            "where": where, "part": part, "p50_us": [one, other], "p95_us": [old["p95"], new["p95"]], "times": times,
            "total_ms": by * times / 1e3,
        }  # fmt: skip
