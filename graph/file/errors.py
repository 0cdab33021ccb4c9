"""The error of a graph file: every problem in it, each with its line and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranvier.transport.format.errors import RanvierError


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a graph file; both count from 1. Line 0 stands for the command line."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong and what to do about it, in one line: `wrong; do this`."""

    what: str
    at: Position


class RequestError(RanvierError, ValueError):
    """The request is wrong: nothing was started for it. The message says what to change."""


class GraphError(RanvierError):
    """A graph file that cannot be run. `problems` holds all that was found, in the order of the file."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems, key=lambda problem: (problem.at.line, problem.at.column))
        super().__init__("\n".join(f"{file}:{p.at.line}:{p.at.column}: {p.what}" for p in self.problems))
