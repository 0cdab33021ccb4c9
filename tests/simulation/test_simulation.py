"""Play some hundred schedules of whole graphs in virtual time. `make simulate` plays more."""

from __future__ import annotations

import importlib.util
import itertools
import re
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from ranvier.actors.host.scheduler import HostCore
from ranvier.actors.supervise import supervision


def _simulate() -> ModuleType:
    """Import simulate.py."""
    spec = importlib.util.spec_from_file_location("simulate", Path(__file__).with_name("simulate.py"))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


simulate = _simulate()


@pytest.mark.parametrize("first", [0, 50, *(pytest.param(first, marks=pytest.mark.slow) for first in (100, 150))])
def test_every_stream_ends_and_rightly(first: int) -> None:
    """End every stream, exactly or for a known reason.

    Each of these happens: loss, repetition, delay, damage, crashes during a replacement, hosts that hang, clients that
    leave. A stream that is not exact was ended by its client, by its deadline, or by an actor that it lost four times
    in a row. Or it ended with the run, once a restart budget was used up."""
    happened: Counter[str] = Counter()
    for seed in range(first, first + 50):
        happened += simulate.Simulation(seed).play()
    for what in ("lost", "repeated", "late", "damaged", "crashed", "replaced", "hung", "left", "exact"):
        assert happened[what] > 5, happened
    for what in ("left together", "expired", "paused", "disk full", "zygote died", "clocks jumped"):
        assert happened[what], happened
    assert happened["sessions_resumed"], "none went on where it was"


def test_a_schedule_is_the_same_each_time() -> None:
    """Play the same schedule for the same seed."""
    assert simulate.Simulation(11).play() == simulate.Simulation(11).play()


def found_within(seconds: float) -> str:
    """Return the error of the first schedule that finds a fault."""
    until_s = time.monotonic() + seconds
    for seed in itertools.count():
        assert time.monotonic() < until_s, f"not found in {seed} schedules"
        try:
            simulate.Simulation(seed).play()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError


def test_it_finds_the_batch_of_no_rows_case_53(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the fault of case 53 within ten seconds, once it is put back.

    A host that cut its batches by the number of open sessions made an empty batch when all clients had left."""
    monkeypatch.setattr(HostCore, "_rows_of_a_batch", lambda core: -(-len(core._epochs) // core._batches))
    assert re.search("empty|at least one row", found_within(10))


def test_it_finds_a_supervisor_that_judges_by_its_own_late_clock_case_54(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the fault of case 54, once it is put back.

    A tick that is late itself must not judge any host."""
    monkeypatch.setattr(supervision, "LATE", float("inf"))
    assert "a healthy host was lost by a pause" in found_within(10)
