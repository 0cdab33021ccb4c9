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

from ranvier.actors.errors import counted
from ranvier.transport.files import locked, read_text

from ..file.errors import RequestError
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


def named(text: str, root: Path) -> Path:
    """Return the folder of a run that a user names.

    A name is a path; `latest`, `latest~1` for the one before it, and so on; the number that `ranvier runs` prints, so 1 is
    the newest; or the beginning of one run's name. All but paths are looked for in `root`.

    Raises:
        RequestError: there is no such run, or several.
    """
    path = Path(text)
    if "/" in text or _is_given(path):
        return path
    latest = re.fullmatch(r"latest(?:~(\d{1,9}))?", text)
    newest = [each for each, _ in sorted(_began(root), key=lambda run: (run[1], run[0].name), reverse=True)]
    there = f"{root} has {counted(len(newest), 'run')}; `ranvier runs` lists them"
    if latest is not None or text.isdecimal():
        number = int(latest.group(1) or 0) if latest is not None else int(text) - 1
        if not 0 <= number < len(newest):
            raise RequestError(f"{text}: there is no such run: {there}")
        return newest[number]
    fitting = [each for each in newest if each.name.startswith(text)]
    if len(fitting) > 1:
        raise RequestError(
            f"{text}: {len(fitting)} runs begin so, such as {fitting[0].name} and {fitting[1].name}; write more of the name"
        )
    if not fitting and os.path.exists(path):
        return path  # a folder of another kind; whoever reads it says what is missing
    if not fitting:
        raise RequestError(f"{text}: there is no such folder, and no run's name begins so: {there}")
    return fitting[0]


def _is_given(path: Path) -> bool:
    """Return whether a name without a folder is meant as a path: it is a run's folder, or a file."""
    try:
        return path.is_file() or _is_run(path)
    except OSError:  # it is too long for a path
        return False


def _began(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the runs of a folder, each with when it began."""
    with contextlib.suppress(OSError):  # there is no such folder: there are no runs
        for path in root.iterdir():
            with contextlib.suppress(OSError):  # another user's, or removed meanwhile
                if _is_run(path):
                    yield path, _known(path)[0]


def _is_run(path: Path) -> bool:
    """Return whether a folder is a run folder. Nothing else is ever removed."""
    named = _NAME.fullmatch(path.name) is not None and not path.is_symlink() and path.is_dir()
    return named and (path / "plan.json").is_file() and (path / "logs").is_dir()


def _known(path: Path) -> tuple[str, str]:
    """Return when a run began and how it ended, as its `run.json` says; "" for what it does not say."""
    known = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(read_text(path / "run.json", MOST_BYTES))
    if not isinstance(known, dict):
        known = {}
    return str(known.get("started") or ""), str(known.get("outcome") or "")


def _of(path: Path) -> RunOfFolder:
    began, ended = _known(path)
    outcome = RUNNING if _goes_on(path) else ended or (KILLED if began else UNKNOWN)
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
