"""Say on standard error what a run was like: on a terminal one line, and with --cost a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..run import run_folder
from ..trace import critical_path, summary, table
from ..trace.summary import Trace
from ..trace.trace_lines import TraceError
from .command_line import columns, say


class About:
    """Say what a run was like, beside its answer on standard output. Where standard error is no terminal, say nothing.

    Args:
        cost: print the table of what every message cost, wherever standard error goes.
        quiet: say nothing, also on a terminal.
    """

    def __init__(self, cost: bool, quiet: bool) -> None:
        self.quiet = quiet
        self._cost, self._speaks = cost, sys.stderr.isatty() and not quiet

    def begins(self, run_dir: Path) -> None:
        """Name the run's folder."""
        if self._speaks:
            say(f"run folder: {_shown(run_dir)}", error=True)

    def ends(self, parts: Sequence[str], run_dir: Path, *, traced: bool) -> None:
        """Say these parts in a line, which actor computed longest, and where to look. A damaged trace is only said."""
        if not (self._speaks or (self._cost and traced)):
            return
        try:
            trace = summary.read(run_dir) if traced else None
        except TraceError as error:
            say(f"ranvier: {error}", error=True)
            trace = None
        if self._speaks:
            name = "latest" if _shown(run_dir).parent == run_folder.DEFAULT_ROOT else _shown(run_dir)
            look = [f"`ranvier trace {name}`"] if trace is not None else []
            say(" · ".join([*parts, *_slowest(trace), *look]), error=True)
        if self._cost and trace is not None:
            say(f"\n{table.of_summary(summary.summary(trace), columns(sys.stderr))}", error=True)


def _shown(run_dir: Path) -> Path:
    """Return a run's folder as a user of this working directory would type it."""
    return run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir


def _slowest(trace: Trace | None) -> list[str]:
    """Return the actor that computed longest on the first session, in words."""
    if trace is None:
        return []
    causes = critical_path.Causes(trace)
    try:
        all_causes = critical_path.totals(causes.critical_path(causes.sessions[0]))
    except (IndexError, TraceError):  # the sample has no whole session
        return []
    return [
        f"slowest: {cause['where'].removesuffix('.0')} {cause['share']:.0%}"
        for cause in all_causes
        if cause["cause"] == "compute"
    ][:1]
