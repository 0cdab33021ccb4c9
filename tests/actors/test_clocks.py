"""How far another clock is ahead: the estimate is never further off than it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.clocks import DRIFT, EVERY, FIRST, Clock

WAYS = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 10**9)), min_size=1, max_size=20)


@given(st.integers(-(10**15), 10**15), WAYS)
def test_the_offset_is_within_its_error(offset_ns: int, ways: list[tuple[int, int, int]]) -> None:
    """Whatever the ways there and back take, and the host between them."""
    clock = Clock()
    asked_ns = 5 * 10**12
    for there_ns, within_ns, back_ns in ways:
        heard_ns = asked_ns + there_ns + offset_ns
        clock.on_answer(asked_ns, heard_ns, heard_ns + within_ns, asked_ns + there_ns + within_ns + back_ns)
        asked_ns += 10**10
    assert abs(clock.offset_ns - offset_ns) <= clock.error_ns
    best_ns = min((there + back + 1) // 2 for there, _, back in ways)
    assert best_ns <= clock.error_ns <= best_ns + len(ways) * 10**10 * DRIFT + 1  # what is old is worth less
    if offset_ns == 0:
        assert clock.shift_ns == 0
    if abs(offset_ns) > 2 * clock.error_ns:
        assert clock.shift_ns == clock.offset_ns


def test_it_asks_often_at_first() -> None:
    clock = Clock()
    asked = [beat for beat in range(1, 3 * EVERY + 1) if clock.asks()]
    assert asked == [*range(1, FIRST + 1), EVERY, 2 * EVERY, 3 * EVERY]
