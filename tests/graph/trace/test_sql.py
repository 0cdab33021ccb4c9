"""Ask the trace of a real run in SQL, and compare with what `trace --json` says of the same run."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranvier
from ranvier.graph.trace import sql, summary
from ranvier.graph.trace.sql_tables import RECIPES, TABLES

PROMPTS = [[1, 17, 40, 9, 300, 12, 77, 5, 6, 8, 11], [1, 2, 3], [1, 9, 8, 7]]
TOKENS = 12


@pytest.fixture(scope="module")
def finished(streamed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec = {"from": "lower.hidden", "to": "upper.hidden", "codec": "int8", "tap": "statistics", "credits": 1}
    return streamed(tmp_path_factory.mktemp("asked"), PROMPTS, TOKENS, edges=[codec])


@pytest.fixture(scope="module")
def frames(finished: Path) -> Any:
    return ranvier.trace(finished)


def command(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ranvier", "trace", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_messages_are_those_of_the_summary(finished: Path, frames: Any) -> None:
    """Count the messages and bytes of every edge, and find the median of each part of their way."""
    figures = summary.summary(summary.read(finished))
    messages = frames.messages
    assert set(messages.edge) == {edge["edge"] for edge in figures["edges"]}
    for edge in figures["edges"]:
        own = messages[(messages.edge == edge["edge"]) & messages.received_ms.notna()]
        assert (len(own), int(own.bytes.sum())) == (edge["messages"], edge["bytes"])
        assert set(own.wire) == {edge["wire"]}
        for part, found in edge["microseconds"].items():
            values = sorted(own[f"{part}_us"].dropna())
            rank = max(0, math.ceil(len(values) / 2) - 1)
            assert values[rank : rank + 1] == pytest.approx([found["p50"]] if values else [])
    coded = messages[messages.edge == "lower.hidden -> upper.hidden"]
    assert (coded.bytes < coded.bytes_before).all()
    assert set(coded.codec) == {"int8"}
    edges = frames.edges.set_index("edge")
    assert edges.messages.sum() == len(messages)
    assert edges.loc["lower.hidden -> upper.hidden", "credits"] == 1


def test_steps_sessions_and_the_rest(finished: Path, frames: Any) -> None:
    """Find each step's tokens, each session's answers, and waits, taps, control messages and commands."""
    figures = summary.summary(summary.read(finished))
    steps = frames.steps
    for actor in figures["actors"]:
        own = steps[steps.actor == actor["actor"]]
        assert len(own) == actor["steps"]
        assert own.compute_us.sum() / 1e3 / (own.finished_ms.max() - own.started_ms.min()) == pytest.approx(
            actor["busy"]
        )
    assert steps[steps.actor == "lower.0"].tokens.sum() == sum(map(len, PROMPTS)) + len(PROMPTS) * (TOKENS - 1)
    sessions = frames.sessions
    assert sorted(sessions.session) == [1, 2, 3]
    assert set(sessions.answers) == {TOKENS}
    assert set(sessions.epochs) == {1}
    assert (sessions.first_token_ms < sessions.ms).all()
    rows = frames.sql("SELECT session, position, tokens FROM rows WHERE edge = 'gateway.token -> embed.token'")
    assert sum(rows.tokens) == sum(map(len, PROMPTS))
    waits = {(wait["edge"], wait["waiting"], wait["for"]): wait for wait in figures["waits"]}
    for key, own in frames.waits.groupby(["edge", "source", "target"]):
        assert own.us.sum() / 1e3 == pytest.approx(waits[key]["total_ms"])
    assert len(frames.taps) == figures["taps"][0]["messages"] > 0
    assert frames.control.sent.sum() == sum(sum(each["messages"].values()) for each in figures["control"])
    assert len(frames.commands) == sum(each["number"] for each in figures["commands"])


def test_what_requests_read_is_no_answer(streamed: Callable[..., Path], tmp_path: Path) -> None:
    """Count tokens and answers alone where a request reads inside the model, and an edge to the client."""
    frames = ranvier.trace(
        streamed(tmp_path, PROMPTS[:1], 5, edges=["lower.hidden -> gateway.mid"], reads=["mid", "hidden 1-6"])
    )
    assert frames.sql("SELECT count(*) AS n FROM messages WHERE edge LIKE '%.reads -> %'").n[0] > 0
    assert list(frames.sessions.answers) == [5]
    assert frames.sql("SELECT max(tokens) AS most FROM steps").most[0] <= 8
    assert "gateway.0" not in set(frames.sql("prompts").actor)


def test_every_question_with_a_name(frames: Any) -> None:
    """Answer each of the ten questions."""
    assert len(RECIPES) == 10
    found = {name: frames.sql(name) for name in RECIPES}
    assert set(found["busy"].actor) == {"embed.0", "lower.0", "upper.0", "head.0", "gateway.0"}
    assert 0 < found["busy"].busy.max() <= 1
    assert found["bytes"].set_index("edge").loc["lower.hidden -> upper.hidden", "ratio"] > 2
    assert (found["gaps"].gap_ms > 0).all()
    assert 0 < len(found["gaps"]) <= 10
    assert set(found["prompts"].actor) == {"embed.0", "lower.0", "upper.0", "head.0"}
    assert found["recoveries"].empty
    assert found["not-finite"].empty


def test_the_command(finished: Path, tmp_path: Path) -> None:
    """Print tables, CSV and JSON, list what can be asked, and refuse what cannot."""
    run = str(finished)
    question = "SELECT edge, count(*) AS messages, avg(bytes) AS size FROM messages GROUP BY edge ORDER BY edge"
    as_json = json.loads(command(run, "--sql", question, "--json"))
    as_csv = list(csv.DictReader(io.StringIO(command(run, "--sql", question, "--csv"))))
    assert [(row["edge"], row["messages"], float(row["size"])) for row in as_csv] == [
        (row["edge"], str(row["messages"]), row["size"]) for row in as_json
    ]
    header, first, *_ = command(run, "--sql", question).splitlines()
    assert header.split() == ["edge", "messages", "size"]
    assert first.split()[-2] == str(as_json[0]["messages"])
    for bare in (command(run, "--sql"), command("--sql", run, code=2), command(run, "--sql", "--json")):
        assert bare
    listed = command(run, "--sql")
    assert all(f"  {column} " in listed for table in TABLES.values() for column in table.columns)
    assert all(f"  {name} " in listed for name in RECIPES)
    assert "no such column: other" in command(run, "--sql", "SELECT other", code=1)
    assert "not authorized" in command(run, "--sql", f"ATTACH '{tmp_path}/x.db' AS x", code=1)
    assert "readonly" in command(run, "--sql", "DELETE FROM messages", code=1)
    assert "--csv: ask a question" in command(run, "--csv", code=2)
    assert not list(tmp_path.iterdir())


def test_parquet(finished: Path, tmp_path: Path) -> None:
    """Write every table as a file that duckdb reads, with the same rows and types."""
    import duckdb

    command(str(finished), "--parquet", str(tmp_path / "made"))
    data = sql.database(summary.read(finished))
    for name, table in TABLES.items():
        read = duckdb.sql(f"SELECT * FROM '{tmp_path}/made/{name}.parquet'")
        assert read.columns == list(table.columns)
        assert len(read) == data.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
    [totals] = duckdb.sql(
        f"SELECT sum(total_us), count(received_ms) FROM '{tmp_path}/made/messages.parquet'"
    ).fetchall()
    assert totals == pytest.approx(data.execute("SELECT sum(total_us), count(received_ms) FROM messages").fetchone())
    assert not list((tmp_path / "made").glob("*.csv"))


def test_python(finished: Path, frames: Any) -> None:
    """Name the tables, take a run or its folder, and say what is wrong."""
    assert frames.tables == list(TABLES)
    assert len(ranvier.trace(str(finished)).steps) == len(frames.steps)
    with pytest.raises(AttributeError, match="a trace has no table 'lines'; there are messages, rows"):
        _ = frames.lines
    with pytest.raises(ranvier.RanvierError, match="no such table"):
        frames.sql("SELECT * FROM lines")
    with pytest.raises(ranvier.RanvierError, match="expected a run or its folder, got 5"):
        ranvier.trace(5)
    with pytest.raises(ranvier.RanvierError, match="no run folder"):
        ranvier.trace("nowhere")
