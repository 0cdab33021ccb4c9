"""Let keys take turns, and bound what waits."""

from __future__ import annotations

from ranvier.graph.bridge.turns import Turns


def test_keys_take_turns() -> None:
    """Serve a key with one request before the second of a key with many."""
    turns: Turns[str] = Turns(10)
    for name in ("a1", "a2", "a3"):
        assert turns.put("a", name)
    assert turns.put("b", "b1") and turns.put("c", "c1")
    assert turns.next() == "a1"
    assert [turns.take() for _ in range(5)] == ["a1", "b1", "c1", "a2", "a3"]
    assert turns.next() is None and len(turns) == 0


def test_the_queue_is_bounded_and_no_key_takes_all_of_it() -> None:
    """Refuse what is beyond the bound, and more than half of it for one key while others wait."""
    turns: Turns[int] = Turns(4)
    assert turns.put("b", 0)
    assert [turns.put("a", number) for number in range(3)] == [True, True, False]
    assert turns.put("c", 1) and not turns.put("d", 2)


def test_a_request_that_is_dropped_leaves_the_others() -> None:
    """Drop one request of a key, and the key itself with its last one."""
    turns: Turns[int] = Turns(4)
    turns.put("a", 1)
    turns.put("a", 2)
    assert turns.drop("a", 1) and not turns.drop("a", 1) and not turns.drop("b", 1)
    assert turns.take() == 2
    assert turns.next() is None
