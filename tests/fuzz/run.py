"""Look for bytes that break a target, guided by coverage (atheris): `python tests/fuzz/run.py TARGET [libFuzzer's options]`.

What it finds new goes to a folder of the user's (`make fuzz`); what breaks a target is written to `crash-…` and ends it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["ranvier", "targets"]):
    import targets


def main() -> None:
    target = targets.TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
