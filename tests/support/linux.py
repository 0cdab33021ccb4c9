"""Know what a run without Linux's own calls and without kernels can be asked for (`RANVIER_PLAIN_POSIX=1 make test`)."""

from __future__ import annotations

import pytest

from ranvier.transport.system import LINUX

only_linux = pytest.mark.skipif(
    not LINUX, reason="needs what only Linux has: cores, orphans, or the state of a process"
)
FAST = {"model.weights": "stored", "model.products": "repeatable"} if LINUX else {}
"""Settings of SmolLM2 with which it starts and answers quickly, and exactly: those of the kernels, where they are used."""
STORED = ("--set", "model.weights=stored") if LINUX else ()
