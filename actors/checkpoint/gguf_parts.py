"""Read the headers of a GGUF model that is split into several files, `NAME-00001-of-00003.gguf`, as llama.cpp does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from .gguf_file import GGUFHeader, GGUFTensor, read_header


def read(path: Path) -> tuple[GGUFHeader, dict[str, tuple[Path, GGUFTensor]]]:
    """Return the header of the first file, and the tensors of all files, each with its file.

    Raises:
        CheckpointError: a file is missing or damaged, or does not belong to the others.
    """
    parts = {file: read_header(file) for file in _parts(path)}
    _check_parts(path, list(parts.values()))
    found = {name: (file, tensor) for file, part in parts.items() for name, tensor in part.tensors.items()}
    return next(iter(parts.values())), found


_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, in order: one, or those of a split one, whichever of them is given.

    Raises:
        CheckpointError: a file of a split model is missing.
    """
    named = _PART.search(path.name)
    if named is None:
        return [path]
    begin, count = path.name[: named.start()], int(named[2])
    files = [path.with_name(f"{begin}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing}: no such file; {path.name} is one of {count} files, which must lie side by side"
        )
    return files


def _check_parts(path: Path, parts: Sequence[GGUFHeader]) -> None:
    """Check that the files of a split model belong together.

    Raises:
        CheckpointError: a file is the part of another model, or has another number than its name says.
    """
    names = [name for part in parts for name in part.tensors]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise CheckpointError(f"{path}: tensor {twice} is in two of its {len(parts)} files")
    for number, part in enumerate(parts):
        told = [part.fields.get(f"split.{name}") for name in ("no", "count", "tensors.count")]
        expected = [number, len(parts), len(names)]
        wrong = next((pair for pair in zip(told, expected, strict=True) if pair[0] not in (None, pair[1])), None)
        if wrong is not None and len(parts) > 1:
            raise CheckpointError(
                f"{path}: file {number + 1} of {len(parts)} does not belong to the others: expected split.no, split.count and "
                f"split.tensors.count {expected}, got {told}"
            )
    if len(parts) == 1 and parts[0].fields.get("split.count") not in (None, 0, 1):
        raise CheckpointError(
            f"{path}: one of {parts[0].fields['split.count']} files of a split model; give it its name, "
            "which ends in -00001-of-0000N.gguf"
        )
