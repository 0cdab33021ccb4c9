"""Offer a run's trace to Python, as data frames of pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import sql, summary
from .sql_tables import TABLES
from .trace_lines import TraceError

if TYPE_CHECKING:
    import pandas


class Frames:
    """Hold the tables of a run's trace. `trace` makes it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._data = sql.database(summary.read(run_dir))

    @property
    def tables(self) -> list[str]:
        """Return the names of the tables. `ranvier trace RUN --sql` lists their columns."""
        return list(TABLES)

    def sql(self, question: str) -> pandas.DataFrame:
        """Return the answer to a question: SQL, the name of a table, or one of the questions with names.

        Raises:
            SqlError: it cannot be answered.
        """
        import pandas

        columns, rows = sql.ask(self._data, f"SELECT * FROM {question}" if question in TABLES else question)
        return pandas.DataFrame.from_records(rows, columns=columns)

    def __getattr__(self, name: str) -> Any:
        if name in TABLES:
            return self.sql(name)
        raise AttributeError(f"a trace has no table {name!r}; there are {', '.join(TABLES)}")


def trace(run: Any) -> Frames:
    """Read the trace of a run as tables: `ranvier.trace(run).messages` is a data frame of pandas.

    Args:
        run: a run, or its folder.

    Raises:
        TraceError: it holds no trace.
    """
    folder = getattr(run, "dir", run)
    try:
        return Frames(Path(folder))
    except TypeError:
        raise TraceError(f"trace: expected a run or its folder, got {run!r:.80}") from None
