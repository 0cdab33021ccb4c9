"""Ask a run's trace in SQL: its records as tables of a database in memory (sqlite).

Times are in milliseconds since the first record, durations in microseconds.
"""

from __future__ import annotations

import csv
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ranvier.actors.component.inside import READS
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.codec import CODECS
from ranvier.transport.format.errors import RanvierError
from ranvier.transport.format.host_id import host_id

from . import summary
from .sql_tables import RECIPES, TABLES
from .summary import PARTS, Trace
from .trace_lines import DoneLine, SentLine

Values = tuple[Any, ...]
_READ = f" -> {GATEWAY}.{READS}"


class SqlError(RanvierError):
    """Report a question that sqlite cannot answer."""


_DENIED = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH)


def database(trace: Trace) -> sqlite3.Connection:
    """Return the records of a trace as a database in memory, with the tables of `TABLES`."""
    made = sqlite3.connect(":memory:")
    for name, table in TABLES.items():
        made.execute(
            f"CREATE TABLE {name} ({', '.join(f'{column} {kind}' for column, (kind, _) in table.columns.items())})"
        )
    filling = _Filling(trace)
    for name, rows in filling.tables().items():
        holes = ", ".join("?" * len(TABLES[name].columns))
        made.executemany(f"INSERT INTO {name} VALUES ({holes})", rows)
    made.execute("CREATE INDEX of_message ON rows (message)")
    made.execute(_SESSIONS.format(gateway=GATEWAY))
    made.commit()
    made.execute("PRAGMA query_only = ON")
    made.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in _DENIED else sqlite3.SQLITE_OK)
    return made


_SESSIONS = """
INSERT INTO sessions
SELECT session, count(DISTINCT epoch), min(began), max(answered), max(answered) - min(began), min(answered) - min(began),
       count(answered), (count(answered) - 1) * 1000.0 / nullif(max(answered) - min(answered), 0)
FROM (SELECT rows.session, rows.epoch, ready_ms AS began,
             CASE WHEN target LIKE '{gateway}.%' AND messages.edge NOT LIKE '%.reads -> %'
                   AND (messages.edge LIKE '%.sampled -> %'
                        OR NOT EXISTS (SELECT 1 FROM edges WHERE edge LIKE '%.sampled -> %'))
                  THEN received_ms END AS answered
      FROM rows JOIN messages ON id = message)
GROUP BY session
"""


def ask(data: sqlite3.Connection, question: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the columns and rows of an answer. `question` is SQL, or a name of `RECIPES`.

    Raises:
        SqlError: sqlite cannot answer it.
    """
    try:
        found = data.execute(RECIPES[question][1] if question in RECIPES else question)
        return [column[0] for column in found.description or ()], found.fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise SqlError(f"--sql: {error}; without a question it lists the tables") from None


class _Filling:
    """Turn the records of a trace into the rows of `TABLES`."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        sent = [line.ready_ns for lines in trace.sent.values() for line in lines[:1]]
        done = [line.sent_ns for lines in trace.done.values() for line in lines[:1]]
        self._start_ns = min(sent + done, default=0)
        self._rows: list[Values] = []
        self._number = 0

    def tables(self) -> Mapping[str, Iterable[Values]]:
        """Return the rows of all tables but `sessions`."""
        messages = list(self._messages())
        return {
            "messages": messages,
            "rows": self._rows,
            "steps": self._steps(),
            "edges": self._edges(messages),
            "waits": self._waits(),
            "taps": self._taps(),
            "control": self._control(),
            "commands": self._commands(),
        }

    def _ms(self, time_ns: int) -> float:
        return (time_ns - self._start_ns) / 1e6

    def _messages(self) -> Iterator[Values]:
        trace, taken = self._trace, set()
        receivers = (actor for actor, lines in trace.done.items() for _ in lines)
        for receiver, (sender, done, parts) in zip(receivers, summary.messages(trace), strict=True):
            if sender is not None:
                taken.add(id(sender))
            yield self._message(sender, done, parts, host_id(done.source).label, receiver)
        for actor, lines in trace.sent.items():
            for line in lines:
                if id(line) not in taken:
                    yield self._message(line, None, {}, actor, host_id(line.target).label)

    def _message(
        self, sender: SentLine | None, done: DoneLine | None, parts: Mapping[str, int], source: str, target: str
    ) -> Values:
        line = done if done is not None else sender
        assert line is not None
        trace, ms, edge, number = self._trace, self._ms, self._trace.edge(line.edge), self._number
        self._number += 1
        numbers = edge.endswith(_READ)  # there, a row's tokens are a count of numbers
        rows = [(*row[:3], 0) for row in line.rows] if numbers else line.rows
        self._rows += [(number, edge, *row) for row in rows]
        spent = [parts[part] / 1e3 if part in parts else None for part in PARTS]
        before, codec = line.nbytes, None
        if sender is not None:
            before, codec = (sender.coding or (before,))[0], CODECS[sender.codec]
        ends: Values = (None,) * 4
        if done is not None:
            ends = ms(done.received_ns), ms(done.started_ns), ms(done.finished_ns), done.batch
        return (
            number,
            edge,
            source,
            target,
            trace.wire(line.edge),
            line.sequence,
            line.rows[0][0],
            len(line.rows),
            sum([row[3] for row in rows]),
            line.nbytes,
            before,
            codec,
            ms(sender.ready_ns if sender is not None else line.sent_ns),
            ms(line.sent_ns),
            *ends,
            *spent,
            sum([each for each in spent if each is not None]),
        )

    def _steps(self) -> Iterator[Values]:
        for actor in self._trace.done:
            steps: dict[tuple[int, int], list[DoneLine]] = defaultdict(list)
            for line in self._trace.in_steps(actor):
                steps[line.started_ns, line.finished_ns].append(line)
            before_ns: int | None = None
            for (started_ns, finished_ns), lines in sorted(steps.items()):
                idle_us = (started_ns - before_ns) / 1e3 if before_ns is not None else None
                known = (row for line in lines if not self._trace.edge(line.edge).endswith(_READ) for row in line.rows)
                rows = {row[:3]: row[3] for row in known}
                yield (
                    actor,
                    self._ms(started_ns),
                    self._ms(finished_ns),
                    (finished_ns - started_ns) / 1e3,
                    idle_us,
                    len(lines),
                    len(rows),
                    sum(rows.values()),
                )
                before_ns = finished_ns

    def _edges(self, messages: Sequence[Values]) -> Iterator[Values]:
        count, nbytes = Counter[str](), Counter[str]()
        size = list(TABLES["messages"].columns).index("bytes")
        for message in messages:
            count[message[1]] += 1
            nbytes[message[1]] += message[size]
        for number, edge in enumerate(self._trace.plan["edges"]):
            name = edge["name"]
            yield (
                number,
                name,
                edge.get("wire", "-"),
                int(edge.get("feedback", False)),
                edge.get("credits_messages", 0),
                count[name],
                nbytes[name],
            )

    def _waits(self) -> Iterator[Values]:
        trace, ms = self._trace, self._ms
        for actor, lines in trace.sent.items():
            for line in lines:
                if line.credit_ns > line.ready_ns:
                    spent_us = (line.credit_ns - line.ready_ns) / 1e3
                    yield trace.edge(line.edge), actor, host_id(line.target).label, ms(line.ready_ns), spent_us, 1
        for actor, unsent in trace.unsent.items():
            for lost in unsent:
                spent_us = (lost.given_up_ns - lost.ready_ns) / 1e3
                yield trace.edge(lost.edge), actor, host_id(lost.target).label, ms(lost.ready_ns), spent_us, 0

    def _taps(self) -> Iterator[Values]:
        for actor, lines in self._trace.taps.items():
            for line in lines:
                seen = line.norm, line.mean, line.largest, line.not_finite
                yield self._trace.edge(line.edge), actor, self._ms(line.at_ns), *seen, line.rows[0][0], line.rows[0][2]

    def _control(self) -> Iterator[Values]:
        for actor, lines in self._trace.control.items():
            for line in lines:
                peer = host_id(line.peer).label
                yield self._trace.edge(line.edge), actor, peer, line.verb, self._ms(line.at_ns), int(line.sent)

    def _commands(self) -> Iterator[Values]:
        for actor, lines in self._trace.commands.items():
            for line in lines:
                yield (
                    actor,
                    line.verb,
                    line.session,
                    line.epoch,
                    self._ms(line.sent_ns),
                    (line.received_ns - line.sent_ns) / 1e3,
                    (line.started_ns - line.received_ns) / 1e3,
                    (line.finished_ns - line.started_ns) / 1e3,
                )


def listing() -> str:
    """Return the tables with their columns and units, and the questions with names."""
    lines = []
    for name, table in TABLES.items():
        lines.append(f"{name}: each row is {table.about}")
        lines += [f"  {column:<18} {about}" for column, (_, about) in table.columns.items()]
    lines += ["", "questions with names, for --sql NAME:"]
    return "\n".join([*lines, *(f"  {name:<18} {about}" for name, (about, _) in RECIPES.items())])


def table(columns: Sequence[str], rows: Sequence[Values]) -> str:
    """Return an answer as text in columns; numbers stand to the right."""
    shown = [[_text(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[index]) for row in shown)]) for index, name in enumerate(columns)]
    right = [all(isinstance(row[index], int | float | None) for row in rows) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), *map(line, shown)])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def write_csv(columns: Sequence[str], rows: Iterable[Values], to: TextIO) -> None:
    """Write an answer as CSV, with a line of names."""
    writer = csv.writer(to, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def write_parquet(data: sqlite3.Connection, folder: Path) -> list[Path]:
    """Write each table as `NAME.parquet` into a folder, and return the files. Needs duckdb (`pip install 'ranvier[sql]'`).

    Raises:
        SqlError: duckdb is not installed.
        OSError: a file cannot be written.
    """
    try:
        import duckdb
    except ImportError:
        raise SqlError("--parquet needs duckdb: pip install 'ranvier[sql]'") from None
    types = {"TEXT": "VARCHAR", "INTEGER": "BIGINT", "REAL": "DOUBLE"}
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, described in TABLES.items():
        as_csv, to = folder / f"{name}.csv", folder / f"{name}.parquet"
        with as_csv.open("w", newline="") as file:
            write_csv(*ask(data, f"SELECT * FROM {name}"), file)
        columns = {column: types[kind] for column, (kind, _) in described.columns.items()}
        with duckdb.connect() as other:
            read = other.read_csv(str(as_csv), header=True, columns=columns)
            read.write_parquet(str(to), compression="zstd")
        as_csv.unlink()
        made.append(to)
    return made
