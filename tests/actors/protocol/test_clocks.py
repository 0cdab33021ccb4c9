"""How far another clock is ahead: the estimate is never further off than it says, at any time."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.protocol.clocks import DRIFT, EVERY, FIRST, MOST, Clock, Correction, is_another

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
    assert all(abs(known.offset_ns - offset_ns) <= known.error_ns for known in clock.estimates)
    error_ns = clock.estimates[-1].error_ns
    best_ns = min((there + back + 1) // 2 for there, _, back in ways)
    assert best_ns <= error_ns <= best_ns + len(ways) * 10**10 * DRIFT + 1  # what is old is worth less
    if offset_ns == 0:
        assert not is_another(clock.estimates)
    if abs(offset_ns) > 2 * error_ns:
        assert is_another(clock.estimates)


@given(
    st.integers(-(10**15), 10**15),
    st.floats(-DRIFT, DRIFT),
    st.integers(1, 10**6),
    st.lists(st.integers(10**9, 10**11), min_size=1, max_size=60),
)
def test_a_clock_that_drifts_is_known_at_every_time(
    offset_ns: int, drift: float, way_ns: int, pauses: list[int]
) -> None:
    """Asked now and then over minutes: what is said of any time between is right within the error of the estimates."""

    def shows(at_ns: int) -> int:
        return at_ns + offset_ns + int(drift * at_ns)

    clock, at_ns = Clock(), 0
    for pause_ns in pauses:
        at_ns += pause_ns
        heard_ns = shows(at_ns + way_ns)
        clock.on_answer(at_ns, heard_ns, heard_ns, at_ns + 2 * way_ns)
    estimates = clock.estimates
    correction = Correction(estimates)
    error_ns = max(known.error_ns for known in estimates) + 3  # what is rounded, here and there
    first_ns, last_ns = estimates[0].at_ns, estimates[-1].at_ns
    for time_ns in range(first_ns, last_ns + 1, max(1, (last_ns - first_ns) // 50)):
        assert abs(correction.ahead_ns(shows(time_ns)) - (shows(time_ns) - time_ns)) <= error_ns
    assert correction.ahead_ns(shows(first_ns) - 10**12) == estimates[0].offset_ns
    assert correction.ahead_ns(shows(last_ns) + 10**12) == estimates[-1].offset_ns


def test_a_long_run_keeps_so_many_estimates() -> None:
    """A day, a question every ten seconds: the first and the last are there, and the others are spread over the day."""
    clock, second = Clock(), 10**9
    for at_s in range(0, 86_400, 10):
        ahead_ns = at_s * 20_000  # 20 µs a second
        at_ns = at_s * second
        clock.on_answer(at_ns, at_ns + ahead_ns + 1000, at_ns + ahead_ns + 1000, at_ns + 2000)
    times = [known.at_ns // second for known in clock.estimates]
    assert len(times) <= MOST and times[0] == 0 and times[-1] > 86_400 - 20
    assert max(later - earlier for earlier, later in pairwise(times)) < 86_400 / MOST * 5
    correction = Correction(clock.estimates)
    for at_s in range(0, 86_390, 977):
        shown_ns = at_s * second + at_s * 20_000
        assert abs(shown_ns - correction.ahead_ns(shown_ns) - at_s * second) < 10_000


def test_it_asks_often_at_first() -> None:
    clock = Clock()
    asked = [beat for beat in range(1, 3 * EVERY + 1) if clock.asks()]
    assert asked == [*range(1, FIRST + 1), EVERY, 2 * EVERY, 3 * EVERY]
