"""Collect the problems of a graph file, each with its position."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..file.errors import GraphError, Problem
from ..file.load import Document
from ..file.schema import GraphFile


class Findings:
    """Hold the file under check and the problems found so far. All parts of the check share one list."""

    def __init__(self, document: Document, file: GraphFile, problems: list[Problem]) -> None:
        self.document = document
        self.file = file
        self.problems = problems

    def _wrong(self, what: str, *path: str | int, key: bool = False) -> None:
        at = self.document.at_key(*path) if key else self.document.at(*path)
        self.problems.append(Problem(what, at))

    def stop_if_wrong(self) -> None:
        """Stop the check if there are problems, since later checks would only repeat them.

        Raises:
            GraphError: there are problems.
        """
        if self.problems:
            raise GraphError(self.document.file, self.problems)


def near(name: str, names: Iterable[str]) -> str:
    """Return a hint for a name that is not in `names`: the closest of them, or a list of all."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
