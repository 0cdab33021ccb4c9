"""Limit how often an actor may be restarted."""

from __future__ import annotations

from ranvier.actors.protocol.host_spec import Restart
from ranvier.actors.supervise.restarts import Restarts


def test_a_budget_over_a_sliding_window() -> None:
    """Allow 3 restarts within 10 s, each after twice the wait of the one before.

    A restart that is 10 s old no longer counts."""
    restarts = Restarts(Restart(max=3, window_s=10.0, backoff_s=0.5))
    assert [restarts.take(float(at_s)) for at_s in (0, 1, 2, 3)] == [0.5, 1.0, 2.0, None]
    assert restarts.take(9.9) is None
    assert restarts.take(10.0) == 2.0
    assert restarts.take(10.5) is None
    assert restarts.take(100.0) == 0.5


def test_never() -> None:
    """Allow no restart if `max` is 0."""
    assert Restarts(Restart(max=0)).take(0.0) is None
