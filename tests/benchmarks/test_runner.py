"""Ask a question whose contestants end too early: they are reported with their signal, and the others are measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GOOD = "import sys\nfor _ in sys.stdin:\n    print(2.0, flush=True)\n"
BAD_AT_ONCE = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
BAD_LATER = "import sys\nfor _ in range(2):\n    sys.stdin.readline()\n    print(1.0, flush=True)\nsys.exit(7)\n"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test import the modules of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("contestants", "report", "run"):
        sys.modules.pop(name, None)


def test_a_contestant_that_ends_is_reported_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import contestants
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    codes = {"good": GOOD, "bad at once": BAD_AT_ONCE, "bad later": BAD_LATER}
    makers = {name: lambda code=code: contestants.Contestant(sys.executable, code) for name, code in codes.items()}
    figures = contestants.in_turn(makers, 3)
    assert figures == {"good": [2.0, 2.0, 2.0]}
    assert figures.ended == {"bad at once": "signal SIGILL", "bad later": "exit code 7"}
    goals = [report.Goal("good", ["bad later", "good"], 1.0), report.Goal("good", "bad at once", 1.0)]
    report.tell("asked", "Is it so?", report.Answer("tokens/s", figures, goals))
    told = capsys.readouterr().out
    assert "bad at once" in told
    assert "has ended: signal SIGILL" in told
    assert "not measured" in told
    assert report.machine()["processor"] in told
    written = json.loads(next(tmp_path.rglob("asked.json")).read_text())
    assert written["ended"] == figures.ended
    assert [ratio["median"] for ratio in written["ratios"]] == [1.0, None]


def test_the_next_question_is_asked_after_one_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import report
    import run

    (tmp_path / "wrong.py").write_text(
        '"""Ask nothing."""\ndef ask(rounds):\n    raise RuntimeError("no such thing")\n'
    )
    (tmp_path / "right.py").write_text(
        '"""Ask for two."""\nimport report\ndef ask(rounds):\n'
        '    return report.Answer("things", report.in_turn({"two": lambda: 2.0}, rounds), [])\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "QUESTIONS", ("wrong", "right"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--rounds", "1"])
    with pytest.raises(SystemExit, match="no answer: wrong"):
        run.main()
    assert json.loads(next(tmp_path.rglob("right.json")).read_text())["figures"] == {"two": [2.0]}
    assert "no such thing" in capsys.readouterr().err
