"""Give each target all inputs that the fuzzer found, and changes to them."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest


def _targets() -> ModuleType:
    """Import targets.py."""
    path = Path(__file__).with_name("targets.py")
    spec = importlib.util.spec_from_file_location("fuzz_targets", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


targets = _targets()
CHANGES = 1500


@pytest.mark.parametrize("name", targets.TARGETS)
def test_nothing_from_outside_breaks_a_target(name: str) -> None:
    """Raise nothing but the error that is meant for bad bytes.

    Among the inputs are claimed sizes, for which nothing may be allocated (case 35)."""
    target, chance = targets.TARGETS[name], random.Random(name)
    corpus = [path.read_bytes() for path in sorted((targets.CORPUS / name).iterdir())]
    assert len(corpus) >= 3
    for data in corpus:
        target(data)
        target(b"")
    for _ in range(CHANGES):
        target(_changed(bytearray(chance.choice(corpus)), chance))


def _changed(data: bytearray, chance: random.Random) -> bytes:
    """Set, leave out, double, or cut off a few bytes."""
    for _ in range(chance.randrange(1, 5)):
        if not data:
            break
        at = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case 3:
                data[at:at] = data[at : at + chance.randrange(1, 17)]
            case 4:
                del data[at:]
    return bytes(data)
