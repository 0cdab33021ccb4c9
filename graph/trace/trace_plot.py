"""Draw a trace on one page: how long messages took on each edge, when the actors computed, and the bytes sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .critical_path import ME, Causes, TracedStep
from .picture import PALETTE, picture
from .summary import Trace, done_key, sent_key

STEPS = 160
"""Steps in the middle of the run over which the pipeline is drawn. More could not be distinguished."""
SLICES = 100
"""Slices of time in which bytes are added up."""
MOST_EDGES = 12
"""Maximum number of edges in a plot."""


def draw(file: Path, trace: Trace) -> None:
    """Draw the page and write it to a file.

    Raises:
        RequestError: matplotlib is not installed, or cannot write this file.
    """
    steps = {actor: own for actor, own in Causes(trace).steps.items() if actor != ME and own}
    actors = sorted(steps, key=lambda actor: steps[actor][0].started_ns)  # in the order of their first steps
    with picture(file, (3.0, 1.2 + 0.35 * len(actors), 2.6)) as (latency, pipeline, traffic):
        _latency(latency, trace)
        _pipeline(pipeline, {actor: steps[actor] for actor in actors})
        _traffic(traffic, trace)


def _latency(axis: Any, trace: Trace) -> None:
    """Draw, for each edge, the cumulative distribution of the time from a ready message to the beginning of its step."""
    ready_ns = {sent_key(actor, record): record.ready_ns for actor, own in trace.sent.items() for record in own}
    times: dict[int, list[float]] = defaultdict(list)
    for actor, own in trace.done.items():
        for record in own:
            began = ready_ns.get(done_key(actor, record))
            if began is not None and record.batch:
                times[record.edge].append(max((record.started_ns - began) / 1e3, 0.1))
    for index, edge in enumerate(sorted(times)[:MOST_EDGES]):
        ordered = sorted(times[edge])
        shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
        axis.plot(ordered, shares, color=PALETTE[index % len(PALETTE)], lw=1.2, label=trace.edge(edge))
    axis.set(xscale="log", xlabel="microseconds from ready to the step", ylabel="share of messages", title="latency")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _pipeline(axis: Any, steps: Mapping[str, Sequence[TracedStep]]) -> None:
    actors = list(steps)
    every = sorted((step.started_ns, step.finished_ns, actor) for actor, own in steps.items() for step in own)
    first = max((len(every) - STEPS) // 2, 0)
    shown = every[first : first + STEPS]
    origin = shown[0][0] if shown else 0
    for number, actor in enumerate(actors):
        bars = [((began - origin) / 1e6, (ended - began) / 1e6) for began, ended, who in shown if who == actor]
        axis.broken_barh(
            bars, (number - 0.4, 0.8), color=PALETTE[number % len(PALETTE)], edgecolor="white", linewidth=0.4
        )
    axis.set_yticks(range(len(actors)), actors)
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds", title=f"{len(shown)} steps of {len(every)}")


def _traffic(axis: Any, trace: Trace) -> None:
    sent = [(record.sent_ns, record.edge, record.nbytes) for own in trace.sent.values() for record in own]
    begin, end = min(at for at, _, _ in sent), max(at for at, _, _ in sent)
    span = max(end - begin, 1)
    by_edge: dict[int, list[float]] = defaultdict(lambda: [0.0] * SLICES)
    for at, edge, nbytes in sent:
        by_edge[edge][min((at - begin) * SLICES // span, SLICES - 1)] += nbytes
    seconds = span / 1e9 / SLICES
    largest = sorted(by_edge, key=lambda edge: -sum(by_edge[edge]))[:MOST_EDGES]
    axis.stackplot(
        [index * seconds for index in range(SLICES)],
        [[value / seconds / 1024 for value in by_edge[edge]] for edge in largest],
        labels=[trace.edge(edge) for edge in largest], colors=[PALETTE[i % len(PALETTE)] for i in range(len(largest))],
    )  # fmt: skip
    axis.set(xlabel="seconds", ylabel="KiB/s", title="bytes sent")
    axis.legend(fontsize=7, loc="upper right")
