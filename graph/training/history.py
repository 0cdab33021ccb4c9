"""`history.jsonl`: a line a step and a validation, each once, however often the training was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..run.paths import writable


class History:
    """Use it in a `with`. Nothing is touched before `begin`."""

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
        """From here on what follows these is told: what was written of later steps comes again, and is taken out."""
        if self._open is not None:
            self._open.close()
        writable(self._file)
        part = self._file.with_suffix(".part")
        part.write_text("".join(json.dumps(told) + "\n" for told in stands), encoding="utf-8")
        part.replace(self._file)
        self._open = self._file.open("a", encoding="utf-8")

    def add(self, told: Mapping[str, Any]) -> None:
        """Tell of a step. On a full disk the training goes on, and what was missed is written with what comes later."""
        assert self._open is not None
        self._missed += json.dumps(told) + "\n"
        data = self._missed.encode()
        try:
            done = os.write(self._open.fileno(), data)
        except OSError:
            return
        self._missed = data[done:].decode()
