"""Schedules as data: what they are, that they are executed whole, that what cannot be executed is refused."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ranvier.actors.protocol.schedule import (
    NAMES,
    Action,
    Schedule,
    ScheduleError,
    Stages,
    bubble,
    check,
    make,
    parse,
    play,
)
from ranvier.graph.training.bubbles import Bubbles

FOUR = Stages(("a", "b", "c", "d"), (("a", "b"), ("b", "c"), ("c", "d")), {})
TWO_CORES = Stages(FOUR.names, FOUR.edges, {"a": "0", "b": "1", "c": "0", "d": "1"})
DIAMOND = Stages(
    ("a", "b", "c", "d", "e"), (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "e"), ("d", "e")), {}
)


def test_bubbles_are_those_of_the_papers() -> None:
    """Of p stages and m micro-batches, a backward being twice a forward: (p - 1) / (m + p - 1) of GPipe and 1F1B; of zero bubble
    (H1) p - 1 forwards are waited for."""
    for count in (4, 8, 32):
        for name in ("gpipe", "1f1b", "eager"):
            schedule = make(name, FOUR, count)
            assert bubble(play(schedule, FOUR), FOUR) == pytest.approx(3 / (count + 3))
        schedule = make("zero-bubble", FOUR, count)
        assert bubble(play(schedule, FOUR), FOUR) == pytest.approx(3 / (3 * count + 3))


def test_how_much_is_kept() -> None:
    """1F1B and zero bubble keep no more micro-batches than there are stages, eager twice as many; GPipe keeps all."""

    def most(schedule: Schedule, stage: str) -> int:
        kept = found = 0
        for action in schedule.stages[stage]:
            kept += (action.kind == "F") - (action.kind in "BW")
            found = max(found, kept)
        return found

    assert [most(make("1f1b", FOUR, 16), stage) for stage in FOUR.names] == [4, 3, 2, 1]
    assert [most(make("eager", FOUR, 16), stage) for stage in FOUR.names] == [7, 5, 3, 1]
    assert max(most(make("zero-bubble", FOUR, 16), stage) for stage in FOUR.names) == 4
    assert most(make("gpipe", FOUR, 16), "a") == 16


def test_time_is_computed_waited_or_on_messages() -> None:
    """Of two stages with two micro-batches, each action 10 of 100 µs and 5 more for its messages: what is left was waited for. What
    validation waited does not count."""
    stages = Stages(("a", "b"), (("a", "b"),), {})
    counted = {"F": 2, "B": 2, "U": 1, "F_us": 20, "B_us": 20, "U_us": 10, "rounds_us": 100}
    waits = {"input waited_us": 20, "norm waited_us": 10, "input waited_us in validation": 1000}
    found = Bubbles(make("1f1b", stages, 2), stages, {"a.0": {**counted, **waits}, "b.0": {**counted, **waits}})
    assert found.costs == {(name, kind): cost for name in "ab" for kind, cost in (("F", 15), ("B", 15), ("U", 10))}
    assert found.measured == pytest.approx(0.3)
    assert found.messages == pytest.approx(0.2)
    # a: F0 F1 . B0 . B1 U, of 15 each and 10: each stage waits 30 of 100, at its beginning, between, or at its end
    assert found.computed == pytest.approx(0.3)


@pytest.mark.parametrize("stages", [FOUR, DIAMOND, TWO_CORES], ids=["row", "diamond", "two cores"])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_can_be_executed_printed_and_read(name: str, stages: Stages) -> None:
    if name == "interleaved" and stages is not TWO_CORES:
        with pytest.raises(ScheduleError, match="at least two on each"):
            make(name, stages, 4)
        return
    for count in (2, 4, 6, 32):
        schedule = make(name, stages, count)
        check(schedule, stages)
        assert parse(str(schedule), stages) == schedule
        played = play(schedule, stages)
        for stage in stages.names:  # in its own order, and after what it needs
            own = [each for each in played if each.stage == stage]
            assert [each.action for each in own] == list(schedule.stages[stage])
            assert all(one.ended <= other.began for one, other in pairwise(own))
        ended = {(each.stage, each.action): each.ended for each in played}
        for source, target in stages.edges:
            for each in played:
                if each.stage == target and each.action.kind == "F":
                    assert ended[source, each.action] <= each.began
                if each.stage == source and each.action.kind in ("B", "I"):
                    assert ended[target, each.action] <= each.began


def test_asynchronous_updates_as_gradients_come() -> None:
    schedule = make("async", FOUR, 8, accumulate=2)
    assert str(schedule).splitlines()[3] == "d: F0 B0 F1 B1 U F2 B2 F3 B3 U F4 B4 F5 B5 U F6 B6 F7 B7 U"
    assert [sum(action.kind == "U" for action in actions) for actions in schedule.stages.values()] == [4] * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: F0 B0 U", "none for b, c, d"),
        ("a: F0 B0 U\na: F0", "line 2: a has a line already"),
        ("x: F0", "line 1: expected one of a, b, c, d, got 'x'"),
        ("a: F0 G0 U", "line 1: expected an action such as F0"),
        ("a: F0 F1 B1 B0 U\nb: F0 F1 B0 B1 U\nc: F0 F1 B0 B1 U\nd: F0 B0 F1 B1 U", None),
        ("a: F0 B0 F1 B1 U\nb: F1 F0 B0 B1 U\nc: F0 F1 B0 B1 U\nd: F0 B0 F1 B1 U", "a deadlock: a waits at B0; b waits at F1"),
        ("a: F0 F1 B0 B1 U\nb: F0 B0 F1 B1 U\nc: F0 B0 F1 B1 U\nd: F0 B0 F0 B1 U", "d: F0 comes twice"),
        ("a: F0 F1 B0 B1 U\nb: F0 B0 F1 B1 U\nc: B0 F0 F1 B1 U\nd: F0 B0 F1 B1 U", "c: B0 comes before F0"),
        ("a: F0 F1 B0 B1 U\nb: F0 B0 F1 U B1\nc: F0 B0 F1 B1 U\nd: F0 B0 F1 B1 U", "b: no U follows B1"),
        ("a: F0 F1 B0 B1 U\nb: F0 B0 F1 U\nc: F0 B0 F1 B1 U\nd: F0 B0 F1 B1 U", "b: B1, or I1 and W1, is missing"),
        ("a: F0 I0 U\nb: F0 I0 W0 U\nc: F0 B0 U\nd: F0 B0 U", "a: B0, or I0 and W0, is missing"),
        ("a: F0 W0 I0 U\nb: F0 I0 W0 U\nc: F0 B0 U\nd: F0 B0 U", "a: W0 comes before I0"),
        ("a: F0 B0 I0 W0 U\nb: F0 I0 W0 U\nc: F0 B0 U\nd: F0 B0 U", "a: micro-batch 0 has a backward both whole and split"),
    ],
)  # fmt: skip
def test_what_cannot_be_executed(text: str, expected: str | None) -> None:
    def look() -> None:
        check(parse(text, FOUR), FOUR)

    if expected is None:
        look()
        return
    with pytest.raises(ScheduleError, match=expected):
        look()


def test_random_orders_either_play_whole_or_are_refused() -> None:
    """Orders of one's own, at random: the check refuses exactly those that cannot come to their end."""
    chance = random.Random(3)
    refused = 0
    for _ in range(300):
        lines = {}
        for stage in FOUR.names:
            order: list[Action] = []
            left = [[Action("F", number), Action("B", number)] for number in range(3)]
            while left:
                which = chance.choice(left)
                order.append(which.pop(0))
                left = [each for each in left if each]
            lines[stage] = (*order, Action("U"))
        schedule = Schedule(3, lines)
        waits = _waits_for_ever(schedule)
        if waits:
            with pytest.raises(ScheduleError, match="deadlock"):
                check(schedule, FOUR)
            refused += 1
        else:
            assert len(play(schedule, FOUR)) == 4 * 7
    assert 50 < refused < 300


def _waits_for_ever(schedule: Schedule) -> bool:
    """Whether what each action needs goes round in a circle: the graph of needs has no order."""
    needs: dict[tuple[str, Action], set[tuple[str, Action]]] = {}
    for index, stage in enumerate(FOUR.names):
        line = schedule.stages[stage]
        for at, action in enumerate(line):
            own = needs.setdefault((stage, action), set())
            if at:
                own.add((stage, line[at - 1]))
            if action.kind == "F" and index:
                own.add((FOUR.names[index - 1], action))
            if action.kind == "B" and index < 3:
                own.add((FOUR.names[index + 1], action))
    done: set[tuple[str, Action]] = set()
    while ready := {key for key, own in needs.items() if key not in done and own <= done}:
        done |= ready
    return len(done) < len(needs)
