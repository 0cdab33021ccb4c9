"""Explain why a host waits. The control thread answers, because the step thread may be stuck.

The step thread changes the inspected data meanwhile. There is no lock: a look that the step thread disturbs is
repeated.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ranvier.transport.links.exchange import Exchange

from ..trace.crossing import Crossing

if TYPE_CHECKING:
    from .join import Overdue

TRIES = 20
STACK_LINES = 12
MOST_JOINS = 16
STUCK_S = 0.25
"""A step that runs longer than this, in seconds, reports its stack. A shorter one is normal work."""


def describe(crossing: Crossing, exchange: Exchange, joins: Callable[[int], Iterable[Overdue]]) -> dict[str, Any]:
    """Return what the host does and waits for, as plain data: names, counts and durations in seconds.

    `joins` returns the steps that have waited for some of their inputs since before a given time (ns).
    """
    now_ns = time.monotonic_ns()
    since_ns, ended_ns = crossing.stepping_since_ns, crossing.stepped_ns
    stepping_s = (now_ns - since_ns) / 1e9 if since_ns else 0.0
    return {
        "stepping_s": stepping_s,
        "idle_s": (now_ns - ended_ns) / 1e9 if ended_ns and not since_ns else 0.0,
        "steps": crossing.steps,
        "queued": crossing.queued,
        "credit": _undisturbed(lambda: credit(exchange, now_ns)),
        "unread": _undisturbed(lambda: unread(exchange)),
        "joins": _undisturbed(lambda: _joins(joins(now_ns), now_ns)),
        "stack": _stack() if stepping_s > STUCK_S else [],
    }


def _undisturbed(look: Callable[[], list[Any]]) -> list[Any]:
    """Return the result of `look`, repeated if the step thread disturbs it; an empty list after `TRIES` times.

    The control thread must survive the question, so a disturbed look raises nothing.
    """
    for _ in range(TRIES):
        try:
            return look()
        except (RuntimeError, IndexError):  # a collection changed during its iteration, or became empty
            time.sleep(0)
    return []


def credit(exchange: Exchange, now_ns: int) -> list[list[Any]]:
    """List the edges without credit: edge, receiver, messages that wait, seconds since the first of them was ready."""
    return [
        [
            link.spec.name,
            link.spec.target.label,
            len(link.waiting),
            (now_ns - link.waiting[0][0].ready_ns) / 1e9,
        ]
        for link in list(exchange.sending.values())
        if link.waiting
    ]


def unread(exchange: Exchange) -> list[list[Any]]:
    """List the edges with unacknowledged messages: edge, receiver, number of messages, their bytes."""
    return [
        [
            link.spec.name,
            link.spec.target.label,
            len(link.window.kept),
            sum(sent.nbytes for sent in link.window.kept),
        ]
        for link in list(exchange.sending.values())
        if link.window.kept
    ]


def _joins(overdue: Iterable[Overdue], now_ns: int) -> list[list[Any]]:
    """List the incomplete steps: session, position, ports present, ports missing, seconds since the first part arrived.

    The oldest step comes first. At most `MOST_JOINS` are listed.
    """
    return [
        [each.row.session, each.row.position, list(each.present), list(each.missing), (now_ns - each.since_ns) / 1e9]
        for each in sorted(overdue, key=lambda each: each.since_ns)[:MOST_JOINS]
    ]


def _stack() -> list[str]:
    """Return the innermost `STACK_LINES` lines of the step thread's stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return []
    lines = "".join(traceback.format_stack(frame)).splitlines()
    return lines[-STACK_LINES:]
