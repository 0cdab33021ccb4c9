"""List the runs in a folder with their outcomes, and remove old runs.

A folder of runs is bounded: the newest runs are kept. Live runs are kept too, and so are runs whose journal has
requests that can be resumed.
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
    """Describe one run.

    `outcome` is `running` for a live run, else the outcome in `run.json`. Without one, it is `killed` if the run had
    begun, else `unknown`. `began` is an ISO 8601 time.
    """

    path: Path
    began: str
    outcome: str
    nbytes: int
    resumable: bool

    @property
    def may_go(self) -> bool:
        """Return whether the run may be removed: it is not live, and has no requests to resume."""
        return self.outcome != RUNNING and not self.resumable


def hold(path: Path) -> int:
    """Lock a run's folder for as long as this process lives. Return the descriptor that unlocks it when closed."""
    return locked(path / LOCK)


@contextlib.contextmanager
def using(*paths: Path | None) -> Iterator[None]:
    """Protect the runs among these paths from being removed while in the context."""
    with contextlib.ExitStack() as held:
        for path in paths:
            with contextlib.suppress(OSError):  # a live run is locked already
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
    """Return the readable runs of a folder, the newest first.

    Raises:
        OSError: the folder itself cannot be read.
    """
    runs = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # the run is another user's, or was removed meanwhile
            if _is_run(path):
                runs.append(_of(path))
    return sorted(runs, key=lambda run: (run.began, run.path.name), reverse=True)


def _is_run(path: Path) -> bool:
    """Return whether a folder is a run folder. Nothing else is ever removed."""
    named = _NAME.fullmatch(path.name) is not None and not path.is_symlink() and path.is_dir()
    return named and (path / "plan.json").is_file() and (path / "logs").is_dir()


def _of(path: Path) -> RunOfFolder:
    known = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(read_text(path / "run.json", MOST_BYTES))
    if not isinstance(known, dict):
        known = {}
    began = str(known.get("started") or "")
    outcome = RUNNING if _goes_on(path) else str(known.get("outcome") or (KILLED if began else UNKNOWN))
    nbytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # a live run removed it meanwhile, such as a socket
                nbytes += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return RunOfFolder(path, began, outcome, nbytes, journal.is_open(path))


def too_many(runs: list[RunOfFolder], newest: int, most_bytes: int, coming: int = 0) -> list[RunOfFolder]:
    """Return the runs that exceed a bound and may be removed.

    A run exceeds a bound if it is not among the `newest` ones. It also exceeds a bound if it and the newer kept runs
    have more than `most_bytes`. The newest run is always kept.

    Args:
        runs: the newest first.
        coming: how many runs are about to be created; they count as the newest.
    """
    over, nbytes = [], 0
    for index, run in enumerate(runs, coming):
        nbytes += run.nbytes
        if index and (index >= newest or nbytes > most_bytes) and run.may_go:
            over.append(run)
            nbytes -= run.nbytes
    return over


def prune(root: Path, newest: int, most_bytes: int, coming: int = 0) -> list[RunOfFolder]:
    """Remove the runs of a folder that exceed a bound (see `too_many`). Return the removed runs.

    Raises:
        OSError: the folder cannot be read.
    """
    gone = []
    for run in too_many(found(root), newest, most_bytes, coming):
        shutil.rmtree(run.path, ignore_errors=True)
        if not run.path.exists():
            gone.append(run)
    return gone
