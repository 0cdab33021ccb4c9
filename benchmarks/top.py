"""Measure what an attached `ranvier top` costs a run: one and sixteen streams through four actors, with it and without.

There is one run for each number of streams. For "attached", `top` shows that run on a separate terminal once per
second, as by default. It is attached two seconds before the measurement begins, because the cost of starting Python
does not count. It shares the run's cores.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import report
from contestants import Contestant, ours
from report import Answer, Goal
from tracing import BOUND

ATTACHED_S = 2.0
NEW = {1: 192, 16: 96}


def attached(contestant: Contestant) -> float:
    """Return a figure of a contestant while `top` shows it."""
    [folder] = [path.parent.parent for path in contestant.folder.glob("*/sockets/supervisor")]
    ours_end, its_end = pty.openpty()
    top = subprocess.Popen(
        [str(Path(sys.executable).with_name("ranvier")), "top", str(folder)], stdout=its_end, stderr=its_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )  # fmt: skip
    os.close(its_end)
    seen: list[int] = []
    reader = threading.Thread(target=_drain, args=(ours_end, seen))
    reader.start()
    time.sleep(ATTACHED_S)
    before = sum(seen)
    figure = contestant.measure()
    assert sum(seen) > before and top.poll() is None, "top has shown nothing meanwhile"
    top.terminate()
    top.wait()
    reader.join()
    os.close(ours_end)
    return figure


def _drain(end: int, seen: list[int]) -> None:
    with suppress(OSError):  # the other end is closed
        while data := os.read(end, 1 << 16):
            seen.append(len(data))


def ask(rounds: int) -> Answer:
    made = {streams: ours(BOUND, streams, new=NEW[streams]) for streams in (1, 16)}
    try:
        measures = {
            f"top {how}, {streams} streams": partial(attached, contestant) if how == "attached" else contestant.measure
            for streams, contestant in made.items()
            for how in ("attached", "away")
        }
        figures = report.in_turn(measures, 2 * rounds)
    finally:
        for contestant in made.values():
            contestant.close()
    return Answer(
        "tokens/s", figures, [Goal(f"top attached, {s} streams", f"top away, {s} streams", 0.99) for s in made]
    )
