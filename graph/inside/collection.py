"""Write the activations of a data set into safetensors files, with bounded memory, and go on after an interruption.

Each file `activations-00000.safetensors` has whole prompts: a tensor [rows, …] for each place (`hidden_12` for `hidden 12`),
and with one row for each position: `prompt` (the number of the prompt) and `position`, both int64, and `label`, if there are
labels. `ranvier train` reads such a folder as `data: {tensors: ./folder}`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranvier.actors.component.inside import PATTERN, within

from ..file.errors import RequestError
from .ops import Where, positions

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
ROWS_PER_FILE = 65_536
"""A file is written when it has so many rows; the last prompt may make it longer."""
FILES = "activations-[0-9]*.safetensors"


@dataclass(frozen=True, slots=True)
class Collected:
    """Describe what was written: the folder, its files in order, and how many prompts and rows they have."""

    folder: Path
    files: tuple[Path, ...]
    prompts: int
    rows: int


class Shards:
    """Write rows of prompts, in the order of the prompts.

    Args:
        folder: where the files go. What is there is continued, if it has the same places and dtype.
        places: the names of the places.
        dtype: what the values are rounded to.
        rows_per_file: see `ROWS_PER_FILE`.
        labels: whether each row has a label.
        how: stands for the positions and options with which the prompts run.

    Raises:
        RequestError: the folder holds something else, `dtype` is unknown, or a place has another width for each prompt.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self, folder: Path, places: Sequence[str], dtype: str, rows_per_file: int, *, labels: bool, how: str
    ) -> None:  # fmt: skip
        import torch

        if dtype not in DTYPES:
            raise RequestError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r:.80}")
        wrong = next((place for place in places if place.endswith(PATTERN)), None)
        if wrong is not None:
            raise RequestError(f"collect: {wrong} has as many numbers as its prompt has positions; use read")
        self._folder = folder
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._most = rows_per_file
        self._what = {"places": list(places), "dtype": dtype, "labels": labels, "how": how}
        self._prompts = hashlib.sha256()
        self._known: dict[int, str] = {}
        """Holds a digest of the prompts that the files begin with, by their number."""
        self._held: list[dict[str, torch.Tensor]] = []
        self._held_rows = 0
        self.files: list[Path] = []
        self.prompts = self.rows = 0
        """Count what the files have so far."""
        self._taken = 0
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob(FILES)):
            self._continue(file)
        self._taken = self.prompts

    def _continue(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as held:
                about = json.loads((held.metadata() or {}).get("ranvier", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise RequestError(f"{file}: cannot be continued: {error}") from None
        first, last = about.pop("first", None), about.pop("last", None)
        rows, digest = about.pop("rows", None), about.pop("prompts", None)
        if about != self._what or first != self.prompts:
            raise RequestError(
                f"{file}: expected prompts from {self.prompts} on with {self._what}, got {first} with {about}"
            )
        self._known[last + 1] = digest
        self.files.append(file)
        self.prompts, self.rows = last + 1, self.rows + rows

    def skip(self, number: int, prompt: Any) -> None:
        """Pass over a prompt that is in a file, and make sure that it is this one.

        Raises:
            RequestError: the files have other prompts.
        """
        self._prompts.update(repr(prompt).encode())
        known = self._known.get(number + 1)
        if known is not None and known != self._prompts.hexdigest():
            raise RequestError(f"{self._folder}: holds other prompts up to number {number}; use another folder")

    def add(self, prompt: Any, values: Mapping[str, torch.Tensor], positions: torch.Tensor, label: int | None) -> None:
        """Add the rows of the next prompt."""
        import torch

        self._prompts.update(repr(prompt).encode())
        count = len(positions)
        made = {place.replace(" ", "_"): tensor.to(self._dtype) for place, tensor in values.items()}
        made |= {"prompt": torch.full((count,), self._taken), "position": positions}
        if label is not None:
            made["label"] = torch.full((count,), label)
        self._held.append(made)
        self._taken += 1
        self._held_rows += count
        if self._held_rows >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are held into a file, whole or not at all."""
        import torch
        from safetensors.torch import save_file

        if not self._held:
            return
        together = {name: torch.cat([one[name] for one in self._held]) for name in self._held[0]}
        about = {
            **self._what, "first": self.prompts, "last": self._taken - 1, "rows": self._held_rows,
            "prompts": self._prompts.hexdigest(),
        }  # fmt: skip
        file = self._folder / f"activations-{len(self.files):05}.safetensors"
        part = file.with_suffix(".part")
        save_file(together, part, {"ranvier": json.dumps(about)})
        os.replace(part, file)
        self.files.append(file)
        self.prompts, self.rows = self._taken, self.rows + self._held_rows
        self._held, self._held_rows = [], 0

    def done(self) -> Collected:
        """Write what is left, and describe all of it."""
        self.flush()
        return Collected(self._folder, tuple(self.files), self.prompts, self.rows)


def positions_of(at: Where, prompt: int) -> torch.Tensor:
    """Return the positions of a prompt that are read, int64, in the order in which values come."""
    import torch

    spans = within(positions(at, prompt, prompt + 1), 0, prompt)
    return torch.tensor([place for start, end in spans for place in range(start, end)], dtype=torch.int64)


def how_of(at: Where, options: Mapping[str, Any]) -> str:
    """Return a digest of positions and options, with the vectors of edits."""
    made = hashlib.sha256(
        repr((at if isinstance(at, str | int) else list(at), sorted(options.items(), key=str))).encode()
    )
    for edit in options.get("edits", ()):
        made.update(getattr(edit, "values", b""))
    return made.hexdigest()[:16]


def label_of(labels: Sequence[Any] | None, prompt: int) -> int | None:
    """Return the label of a prompt; None if there are no labels.

    Raises:
        RequestError: there is none for this prompt, or it is no whole number.
    """
    if labels is None:
        return None
    if prompt >= len(labels) or not isinstance(labels[prompt], int):
        got = f"{labels[prompt]!r:.80}" if prompt < len(labels) else "none"
        raise RequestError(f"labels: expected a whole number for prompt {prompt}, got {got}")
    return int(labels[prompt])
