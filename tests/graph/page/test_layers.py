"""Lay graphs out in layers."""

from __future__ import annotations

import random

from ranvier.graph.page.layers import Arrow, layers


def test_a_loop_of_tokens() -> None:
    """Put each actor below those before it. The token that comes back, and the answer, lift nobody."""
    names = ["gateway", "head", "embed", "lower"]
    arrows = [
        Arrow("gateway", "embed", False), Arrow("embed", "lower", False), Arrow("lower", "head", False),
        Arrow("head", "embed", True), Arrow("head", "gateway", False),
    ]  # fmt: skip
    assert layers(names, arrows, "gateway") == [["gateway"], ["embed"], ["lower"], ["head"]]


def test_branches_do_not_cross() -> None:
    """Sort two branches so that their edges do not cross, and survive a loop that nobody declared."""
    names = ["gateway", "a", "b", "b2", "a2", "end"]
    arrows = [
        Arrow("gateway", "a", False), Arrow("gateway", "b", False), Arrow("a", "a2", False), Arrow("b", "b2", False),
        Arrow("a2", "end", False), Arrow("b2", "end", False),
    ]  # fmt: skip
    found = layers(names, arrows, "gateway")
    assert found in ([["gateway"], ["a", "b"], ["a2", "b2"], ["end"]], [["gateway"], ["b", "a"], ["b2", "a2"], ["end"]])
    looped = layers(["gateway", "x", "y"], [Arrow("x", "y", False), Arrow("y", "x", False)], "gateway")
    assert sorted(name for layer in looped for name in layer) == ["gateway", "x", "y"]


def test_any_graph() -> None:
    """Place every actor once, and never above one that it takes messages from."""
    chance = random.Random(1)
    for _ in range(50):
        names = [f"n{number}" for number in range(chance.randint(1, 40))]
        arrows = [
            Arrow(names[min(pair)], names[max(pair)], False)
            for pair in (sorted(chance.sample(range(len(names)), 2)) for _ in range(len(names) - 1))
        ]
        found = layers(["gateway", *names], [*arrows, Arrow("gateway", names[0], False)], "gateway")
        place = {name: depth for depth, layer in enumerate(found) for name in layer}
        assert sorted(place) == sorted(["gateway", *names])
        assert all(place[arrow.source] < place[arrow.target] for arrow in arrows)
