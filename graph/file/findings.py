"""Problems as they are found, each with its place in the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .errors import GraphError, Problem
from .load import Document
from .schema import GraphFile


class Findings:
    """The file under check and what was found wrong with it so far. Parts of the check share one list."""

    def __init__(self, document: Document, file: GraphFile, problems: list[Problem]) -> None:
        self.document = document
        self.file = file
        self.problems = problems

    def _wrong(self, what: str, *path: str | int, key: bool = False) -> None:
        at = self.document.at_key(*path) if key else self.document.at(*path)
        self.problems.append(Problem(what, at))

    def stop_if_wrong(self) -> None:
        """Later checks would only repeat what was found.

        Raises:
            GraphError: if anything was.
        """
        if self.problems:
            raise GraphError(self.document.file, self.problems)


def near(name: str, names: Iterable[str]) -> str:
    """A hint for a name that is none of these: the one that was meant, or all there are."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
