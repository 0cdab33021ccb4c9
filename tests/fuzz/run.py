"""Find bytes that break a target, guided by coverage (atheris).

Run it with `python tests/fuzz/run.py TARGET [libFuzzer options]`. New inputs go to the first folder among the options,
which `make fuzz` sets. Bytes that break the target are written to `crash-…` and end the run."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["ranvier", "targets"]):
    import targets


def main() -> None:
    """Fuzz the target that the command line names."""
    target = targets.TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
