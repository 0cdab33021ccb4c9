"""Some hundred schedules of whole graphs in virtual time; `make simulate` plays more."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest


def _simulate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate", Path(__file__).with_name("simulate.py"))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


simulate = _simulate()


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_stream_ends_and_rightly(first: int) -> None:
    """Loss, repetition, delay, damage, crashes while others are replaced, hosts that hang, clients that leave: each happened, and
    each stream is exact, or was ended by its client, by the error of an actor that it lost four times in a row, or with the
    run, once a budget was used up."""
    happened: Counter[str] = Counter()
    for seed in range(first, first + 50):
        happened += simulate.Simulation(seed).play()
    for what in ("lost", "repeated", "late", "damaged", "crashed", "replaced", "hung", "left", "exact"):
        assert happened[what] > 5, happened
    assert happened["sessions_resumed"], "none went on where it was"


def test_a_schedule_is_the_same_each_time() -> None:
    assert simulate.Simulation(11).play() == simulate.Simulation(11).play()
