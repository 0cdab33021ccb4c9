"""Define the errors of graph files and of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranvier.transport.format.errors import RanvierError


@dataclass(frozen=True, slots=True)
class Position:
    """Represent a position in a graph: its line and column, which count from 1, or `where` it is if it is not in a file.

    Line 0 stands for the command line.
    """

    line: int
    column: int
    where: str = ""

    def __str__(self) -> str:
        return f" {self.where}" if self.where else f"{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Describe one problem in one line: what is wrong, and what to do about it (`wrong; do this`)."""

    what: str
    at: Position


class RequestError(RanvierError, ValueError):
    """Report a wrong request. Nothing was started for it, and the message says what to change."""


class TooLong(RequestError):
    """Report a prompt that does not fit into the model's context or a KV cache, together with the tokens asked for."""


class GraphError(RanvierError):
    """Report a graph file that cannot run. `problems` holds every problem found, in the order of the file."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems, key=lambda problem: (problem.at.line, problem.at.column))
        super().__init__("\n".join(f"{file}:{p.at}: {p.what}" for p in self.problems))
