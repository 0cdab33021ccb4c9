"""Write `history.jsonl`: one line per step and validation, each once, however often the training was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..run.paths import writable


class History:
    """Write the history of a training. Use it in a `with`; it changes no file before `begin`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: TextIO | None = None
        self._missed = ""

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()

    def begin(self, stands: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file with the steps in `stands`. Later steps in the file are removed: they will be repeated.

        Raises:
            RequestError: something other than a file is there, or its folder does not exist.
        """
        if self._open is not None:
            self._open.close()
        writable(self._file)
        part = self._file.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in stands), encoding="utf-8")
        part.replace(self._file)
        self._open = self._file.open("a", encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a step. On a full disk the training continues, and the missing lines are written with later ones."""
        assert self._open is not None
        self._missed += json.dumps(entry) + "\n"
        data = self._missed.encode()
        try:
            done = os.write(self._open.fileno(), data)
        except OSError:
            return
        self._missed = data[done:].decode()
