"""Name the ends of an edge: `actor.port`, as graph files write them."""

from __future__ import annotations

from typing import NamedTuple


class End(NamedTuple):
    """Name one end of an edge: a port of an actor, or of the gateway."""

    actor: str
    port: str

    def __str__(self) -> str:
        return f"{self.actor}.{self.port}"


def end(text: str) -> End:
    """Parse an end.

    Raises:
        ValueError: the text does not have the form `actor.port`.
    """
    actor, port = text.split(".")
    return End(actor, port)


def ends(name: str) -> tuple[End, End]:
    """Parse the name of an edge, `actor.port -> actor.port`.

    Raises:
        ValueError: the name has another form.
    """
    source, target = name.split(" -> ")
    return end(source), end(target)
