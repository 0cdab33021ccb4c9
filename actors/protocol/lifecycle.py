"""Track the life of a host in a state machine without I/O, which remembers how it reached its state.

starting → loading → ready → running → draining → stopped        and from anywhere before stopped: failed
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """List the states of a host."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    """Weights are loaded and the inbox is bound; links are not open yet."""
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


_NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.LOADING, State.STOPPED, State.FAILED}),
    State.LOADING: frozenset({State.READY, State.STOPPED, State.FAILED}),
    State.READY: frozenset({State.RUNNING, State.STOPPED, State.FAILED}),
    State.RUNNING: frozenset({State.DRAINING, State.STOPPED, State.FAILED}),
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


class IllegalTransition(Exception):
    """Report a forbidden change of state. The message lists all states before it."""


class Lifecycle:
    """Hold the state of one host, in the host itself or in its supervisor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.story: list[tuple[State, str]] = [(State.STARTING, "")]

    @property
    def state(self) -> State:
        return self.story[-1][0]

    @property
    def over(self) -> bool:
        return not _NEXT[self.state]

    def to(self, state: State, why: str = "") -> None:
        """Change to `state`.

        Raises:
            IllegalTransition: the state cannot follow the present one.
        """
        if state not in _NEXT[self.state]:
            story = " -> ".join(s.value + (f" ({reason})" if reason else "") for s, reason in self.story)
            raise IllegalTransition(f"{self.name}: {story} -> {state.value}: may only be {_names(self.state)} next")
        self.story.append((state, why))


def _names(state: State) -> str:
    return ", ".join(sorted(follower.value for follower in _NEXT[state])) or "nothing"
