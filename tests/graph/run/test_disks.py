"""Check full disks, removed folders, floods of refused messages, and how much of old runs is kept.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq
from typer.testing import CliRunner

import ranvier
from ranvier.actors.protocol.refusals import PER_S, Refusals
from ranvier.graph.commands import cli
from ranvier.graph.run import log, runs
from ranvier.graph.sessions import journal

PROMPT = [1, 17, 40, 9, 300, 12, 77]
Four = Callable[..., ranvier.Graph]
Exact = Callable[[Sequence[int], int], list[int]]

FULL = """
import json, os, resource, signal, sys, trio, ranvier
graph, folder, runs, settings = sys.argv[1:5]
graph = ranvier.load(graph, allow_code=True, overrides={"model.source": folder, **json.loads(settings)})
async def main():
    async with ranvier.launch(graph, runs=runs) as run:
        made = []
        async for token in run.generate([1, 17, 40, 9, 300, 12, 77], max_tokens=80, stop_tokens=()):
            made.append(token.id)
            if len(made) == 5:
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                for pid in (os.getpid(), *run.pids.values()):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))
                before = dict(run.pids)
                os.kill(before["blocks0.0.1"], signal.SIGKILL)
            if len(made) == 60:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        print(json.dumps([str(run.dir), made, len(run.recoveries), run.counters]))
trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"journal": "true", "record": "{edges: all}"}], ids=["plain", "journal, record"]
)
def test_a_disk_that_is_full_for_a_while_case_58(
    settings: dict[str, str], four: Four, tiny: Any, exact: Exact, runs: Path
) -> None:
    """Give exact tokens while the disk is full.

    No process may write a byte from the fifth token to the sixtieth, and a host is lost meanwhile. It is replaced, and
    what was lost is counted."""
    folder, _ = tiny("llama")
    graph = four()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(graph.path), str(folder), str(runs), json.dumps(settings)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, made, recoveries, counters = json.loads(done.stdout.splitlines()[-1])
    assert made == exact(PROMPT, 80)
    assert recoveries == 1
    lines = [json.loads(line) for line in (Path(where) / "logs" / "supervisor.jsonl").read_text().splitlines()]
    assert any(line["event"] == "lines were lost" and line["lines"] > 0 for line in lines)
    assert json.loads((Path(where) / "run.json").read_text())["outcome"] == "done"
    if settings:
        assert counters["gateway.0"]["requests_not_durable"] == 1


def test_a_run_folder_that_is_removed_case_58(four: Four, exact: Exact, runs: Path) -> None:
    """Continue to serve when somebody removes the run folder, and end the run normally."""
    expected = exact(PROMPT, 60)

    async def main() -> Path:
        async with ranvier.launch(four(), runs=runs) as run:
            made = []
            async for token in run.generate(PROMPT, max_tokens=60, stop_tokens=()):
                made.append(token.id)
                if len(made) == 5:
                    shutil.rmtree(run.dir)
            assert made == expected
            await trio.sleep(0.6)  # files are written to during this time
            return run.dir

    folder = trio.run(main)
    assert not (folder / "run.json").exists()


def test_the_first_error_is_the_one_that_is_told_case_58(four: Four, runs: Path) -> None:
    """Raise the run's own error, even if the disk is full until the run has ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folders = []

    async def main() -> None:
        async with ranvier.launch(four(), runs=runs) as run:
            folders.append(run.folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            raise ZeroDivisionError("its own")

    try:
        with pytest.raises(ZeroDivisionError, match="its own"):
            trio.run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [folder] = folders
    assert folder.lost["run.json"] > 0


# -- floods -------------------------------------------------------------------------------------------------------------


def test_refusals_are_told_of_ten_times_a_second_case_59() -> None:
    """Report at most ten refusals per second, and count the rest."""
    refusals = Refusals()
    told = [refusals.one_more(5.0 + index / 1e6) for index in range(1000)]
    assert told == [0] * PER_S + [None] * (1000 - PER_S)
    assert refusals.overdue(5.9) == 0
    assert refusals.one_more(6.0) == 1000 - PER_S
    assert refusals.overdue(7.0) == 0


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_flood_of_refused_messages_case_59(count: int, four: Four, exact: Exact, runs: Path) -> None:
    """Count all of a flood of invalid messages, keep the log small, and continue the streams.

    They come from a process of the same user."""
    expected = exact(PROMPT, 20)

    def flood(address: str) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as evil:
            evil.setsockopt(zmq.IDENTITY, b"evil.0.1")
            evil.setsockopt(zmq.SNDHWM, 1000)
            evil.connect(address)
            for _ in range(count):
                evil.send(b"\xff" * 20)
            evil.linger = 60_000

    async def main() -> Path:
        async with ranvier.launch(four(), runs=runs) as run:
            with trio.fail_after(110):
                async with trio.open_nursery() as nursery:
                    address = f"ipc://{run.folder.sockets}/blocks0.0"
                    nursery.start_soon(trio.to_thread.run_sync, flood, address)
                    made = [token.id async for token in run.generate(PROMPT, max_tokens=20, stop_tokens=())]
                    assert made == expected
                while run.counters.get("blocks0.0", {}).get("refused", 0) < count:
                    await trio.sleep(0.05)
                made = [token.id async for token in run.generate(PROMPT, max_tokens=20, stop_tokens=())]
            assert made == expected
            assert not run.recoveries
            return run.dir

    folder = trio.run(main)
    lines = (folder / "logs" / "supervisor.jsonl").read_text().splitlines()
    assert 10 <= sum('"refused"' in line for line in lines) < 2000
    assert any("left out" in line for line in lines)


# -- which runs are kept ----------------------------------------------------------------------------------------------


def test_logs_rotate_by_size_case_79(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate a log by its size."""
    monkeypatch.setattr(log, "MOST_BYTES", 1000)
    file = log.LogFile(tmp_path)
    for index in range(100):
        file.write(f"{index:030}\n")
    file.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"supervisor.jsonl", "supervisor.1.jsonl"}
    assert max(sizes.values()) <= 1000
    assert (tmp_path / "supervisor.jsonl").read_text().splitlines()[-1] == f"{99:030}"


def a_run(root: Path, number: int, outcome: str | None = "done", kilobytes: int = 1) -> Path:
    """Write a run folder of this number, and return it."""
    path = root / f"test-20260101-{number:06}-abcd"
    (path / "logs").mkdir(parents=True)
    (path / "plan.json").write_text("{}")
    (path / "logs" / "x").write_bytes(os.urandom(kilobytes << 10))
    told = {"started": f"2026-01-01T00:{number:02}:00+00:00", **({"outcome": outcome} if outcome else {})}
    (path / "run.json").write_text(json.dumps(told))
    return path


def test_old_runs_go_and_those_that_matter_stay_case_79(tmp_path: Path) -> None:
    """Remove old runs by number and by size.

    A run that is running, a run that can be resumed, and what is no run are kept."""
    made = [a_run(tmp_path, number) for number in range(10)]
    held = runs.hold(made[0])
    (made[1] / journal.FILE).write_text(
        json.dumps({"kind": "run", "hash": "", "model": ""})
        + "\n"
        + json.dumps({"kind": "request", "id": "a", "info": {}})
        + "\n"
    )
    (tmp_path / "precious").mkdir()
    (tmp_path / "test-20260101-999999-abcd").mkdir()
    elsewhere = a_run(tmp_path / "else", 50)
    (tmp_path / "test-20250101-000000-abcd").symlink_to(elsewhere)
    gone = runs.prune(tmp_path, 4, 1 << 40)
    os.close(held)
    assert [run.path for run in gone] == [made[number] for number in (5, 4, 3, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(made[number].name for number in (0, 1, 6, 7, 8, 9)), "precious", "test-20260101-999999-abcd", "else",
        "test-20250101-000000-abcd",
    }  # fmt: skip
    assert elsewhere.is_dir()
    big = a_run(tmp_path, 20, kilobytes=500)
    gone = runs.prune(tmp_path, 100, 400_000)
    assert big.is_dir(), "the newest stays"
    assert {run.path for run in gone} == {made[number] for number in (0, 6, 7, 8, 9)}


def test_runs_are_listed_case_79(tmp_path: Path) -> None:
    """List runs as JSON or text, and remove old ones."""
    a_run(tmp_path, 1)
    a_run(tmp_path, 2, None)
    done = CliRunner().invoke(cli.app, ["runs", "--runs", str(tmp_path), "--json"])
    listed = json.loads(done.output)
    assert [(run["name"][-11:-5], run["outcome"]) for run in listed] == [("000002", "killed"), ("000001", "done")]
    words = CliRunner().invoke(cli.app, ["runs", "--runs", str(tmp_path)]).output
    assert "test-20260101-000001-abcd  2026-01-01T00:01:00  done" in words
    assert CliRunner().invoke(cli.app, ["runs", "prune", "--runs", str(tmp_path), "--newest", "1"]).exit_code == 0
    assert len(runs.found(tmp_path)) == 1


def test_only_runs_of_the_folder_that_is_named_are_removed_case_79(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remove runs from the folder that is named before `prune`, and none from the default folder."""
    monkeypatch.chdir(tmp_path)
    here, there = tmp_path / "ranvier-runs", tmp_path / "there"
    for number in range(3):
        a_run(here, number)
        a_run(there, number)
    done = CliRunner().invoke(cli.app, ["runs", "--runs", str(there), "--json", "prune", "--newest", "1"])
    assert len(json.loads(done.output)) == 2
    assert (len(runs.found(here)), len(runs.found(there))) == (3, 1)


def test_a_run_in_use_is_not_removed_case_79(tmp_path: Path) -> None:
    """Keep a run that is in use, or whose journal is no regular file."""
    old, new = a_run(tmp_path, 1), a_run(tmp_path, 2)
    os.mkfifo(old / journal.FILE)
    assert runs.prune(tmp_path, 1, 1 << 40) == []
    (old / journal.FILE).unlink()
    with runs.using(old, None, tmp_path / "no run"):
        assert runs.prune(tmp_path, 1, 1 << 40) == []
    assert [run.path for run in runs.prune(tmp_path, 1, 1 << 40)] == [old]
    assert not (new / runs.LOCK).exists()


def test_a_run_keeps_its_folder_of_runs_bounded_case_79(
    four: Four, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Remove old runs when a run begins, by the graph's setting, and report it once."""
    for number in range(5):
        a_run(runs, number)

    async def main() -> None:
        async with ranvier.launch(four(runs={"newest": 3}), runs=runs):
            pass

    trio.run(main)
    assert "removed 3 older runs" in capfd.readouterr().err
    trio.run(main)
    assert "older run" not in capfd.readouterr().err
    assert len([path for path in runs.iterdir() if path.is_dir()]) == 3
