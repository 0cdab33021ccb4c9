"""Read JSON files of checkpoints, within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ranvier.transport.files import read_bounded

from ..errors import CheckpointError

MAX_JSON_BYTES = 64 << 20


def _special_float(made: dict[str, Any]) -> Any:
    value = made.get("__float__")
    return float(value) if len(made) == 1 and isinstance(value, str) else made


def read_json(path: Path, *, special_floats: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB.

    With `special_floats`, `{"__float__": "Infinity"}` is a number: transformers writes numbers that JSON lacks in this way.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        made = json.loads(read_bounded(path, MAX_JSON_BYTES), object_hook=_special_float if special_floats else None)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(made, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(made).__name__}")
    return made
