"""What a host says when it is asked why it waits: told by its control thread, about its step thread, which may be stuck.

The step thread changes what is looked at meanwhile. Nothing is locked for it: who looks begins again if it was disturbed.
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
"""Whose step has taken so long tells where it is; less is a step like any other, and no waiting."""


def tell(crossing: Crossing, exchange: Exchange, joins: Callable[[int], Iterable[Overdue]]) -> dict[str, Any]:
    """Seconds and names, as plain data. `joins` gives the steps that have waited since before a time, for some of their
    inputs."""
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
    """What it sees; nothing, where it was disturbed each time: the control thread must outlive the question."""
    for _ in range(TRIES):
        try:
            return look()
        except (RuntimeError, IndexError):  # a collection changed while it was gone through, or has become empty
            time.sleep(0)
    return []


def credit(exchange: Exchange, now_ns: int) -> list[list[Any]]:
    """Edge, receiver, messages that wait for its credit, seconds since the first of them was ready."""
    return [
        [
            link.spec.name,
            link.spec.target.rpartition(".")[0],
            len(link.waiting),
            (now_ns - link.waiting[0].ready_ns) / 1e9,
        ]
        for link in list(exchange.sending.values())
        if link.waiting
    ]


def unread(exchange: Exchange) -> list[list[Any]]:
    """Edge, receiver, messages and bytes that were sent and of which the receiver has not said that they came."""
    return [
        [
            link.spec.name,
            link.spec.target.rpartition(".")[0],
            len(link.window.kept),
            sum(sent.nbytes for sent in link.window.kept),
        ]
        for link in list(exchange.sending.values())
        if link.window.kept
    ]


def _joins(overdue: Iterable[Overdue], now_ns: int) -> list[list[Any]]:
    """Session, position, the ports that have come, those that have not, seconds since the first came. The oldest first."""
    return [
        [each.row.session, each.row.position, list(each.present), list(each.missing), (now_ns - each.since_ns) / 1e9]
        for each in sorted(overdue, key=lambda each: each.since_ns)[:MOST_JOINS]
    ]


def _stack() -> list[str]:
    """Where the step thread is: the innermost lines."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return []
    lines = "".join(traceback.format_stack(frame)).splitlines()
    return lines[-STACK_LINES:]
