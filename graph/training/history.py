"""`history.jsonl`: a line a step and a validation, each once, however often the training was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..command_line import writable


class History:
    """Use it in a `with`. Nothing is touched before `begin`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: TextIO | None = None

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
        assert self._open is not None
        print(json.dumps(told), file=self._open, flush=True)
