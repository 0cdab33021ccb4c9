"""Let a process that only watches a run take nothing from it."""

from __future__ import annotations

import contextlib
import os


def run_last() -> None:
    """Run this process only on idle cores.

    Watching takes about 20 ms of a core per second. On a machine with two busy cores, it would take them from the run.
    """
    with contextlib.suppress(AttributeError, OSError):  # the system has no such scheduling policy, or forbids it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
