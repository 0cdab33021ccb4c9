"""The runs in a folder: what each was and came to, and which of them may go.

A folder of runs is bounded: the newest stay. A run that still goes on stays, and so does one whose journal has requests that
may be resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ranvier.transport.files import locked, read_text

from ..sessions import journal

LOCK = "lock"
RUNNING, KILLED, UNKNOWN = "running", "killed", "unknown"
MOST_BYTES = 16 << 20
_NAME = re.compile(r".+-\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class RunOfFolder:
    """One run. `outcome`: what `run.json` says, `running`, or `killed`: its process ended without a word. `began`: ISO 8601."""

    path: Path
    began: str
    outcome: str
    nbytes: int
    resumable: bool

    @property
    def may_go(self) -> bool:
        """Whether nobody has a use for it but its reader."""
        return self.outcome != RUNNING and not self.resumable


def hold(path: Path) -> int:
    """Lock a run's folder for as long as this process lives. Returns the descriptor to close at its end."""
    return locked(path / LOCK)


@contextlib.contextmanager
def using(*paths: Path | None) -> Iterator[None]:
    """Have the runs among these paths stay meanwhile, whoever prunes their folder."""
    with contextlib.ExitStack() as held:
        for path in paths:
            with contextlib.suppress(OSError):  # one that goes on
                if path is not None and _is_run(path):
                    is_new = not (path / LOCK).exists()
                    held.callback(os.close, hold(path))
                    if is_new:
                        held.callback((path / LOCK).unlink, missing_ok=True)
        yield


def _goes_on(path: Path) -> bool:
    try:
        os.close(locked(path / LOCK, os.O_RDWR))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def found(root: Path) -> list[RunOfFolder]:
    """Return the runs of a folder that one may look into, the newest first.

    Raises:
        OSError: the folder itself cannot be read.
    """
    runs = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if _is_run(path):
                runs.append(_of(path))
    return sorted(runs, key=lambda run: (run.began, run.path.name), reverse=True)


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's: nothing else is ever removed."""
    named = _NAME.fullmatch(path.name) is not None and not path.is_symlink() and path.is_dir()
    return named and (path / "plan.json").is_file() and (path / "logs").is_dir()


def _of(path: Path) -> RunOfFolder:
    told = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        told = json.loads(read_text(path / "run.json", MOST_BYTES))
    if not isinstance(told, dict):
        told = {}
    began = str(told.get("started") or "")
    outcome = RUNNING if _goes_on(path) else str(told.get("outcome") or (KILLED if began else UNKNOWN))
    nbytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # it goes on, and this was a socket
                nbytes += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return RunOfFolder(path, began, outcome, nbytes, journal.is_open(path))


def too_many(runs: list[RunOfFolder], newest: int, most_bytes: int, coming: int = 0) -> list[RunOfFolder]:
    """Return those that are over a bound: not among the `newest`, or beyond `most_bytes` of all that are newer. The newest of
    all stays. `coming`: runs that are to be made yet, the newest then."""
    over, nbytes = [], 0
    for index, run in enumerate(runs, coming):
        nbytes += run.nbytes
        if index and (index >= newest or nbytes > most_bytes) and run.may_go:
            over.append(run)
            nbytes -= run.nbytes
    return over


def prune(root: Path, newest: int, most_bytes: int, coming: int = 0) -> list[RunOfFolder]:
    """Remove the runs of a folder that are over a bound (see `too_many`). Returns those that were removed.

    Raises:
        OSError: the folder cannot be read.
    """
    gone = []
    for run in too_many(found(root), newest, most_bytes, coming):
        shutil.rmtree(run.path, ignore_errors=True)
        if not run.path.exists():
            gone.append(run)
    return gone
