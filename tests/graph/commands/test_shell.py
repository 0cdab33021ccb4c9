"""Fit into a shell: closed pipes, full disks, colours, completion, a user's defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from linux import STORED
from terminal import Terminal

EXAMPLES = Path(__file__).parents[3] / "examples"
COMMAND = [sys.executable, "-m", "ranvier"]
RUN = [*COMMAND, "run", "smollm2", *STORED]


def ran(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=100, cwd=cwd, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_reader_that_has_seen_enough(runs: Path) -> None:
    """End in order when the reader of an answer closes the pipe: exit code 0, no words, a run that is done."""
    told = [*RUN, "--runs", str(runs), "--prompt", "Tell me a long story about the sea.", "-n", "2000"]
    with subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
    [run_dir] = runs.iterdir()
    assert json.loads((run_dir / "run.json").read_text())["outcome"] == "done"


@pytest.mark.parametrize(
    "arguments", [("schema",), ("actors",), ("actors", "--json"), ("--help",), ("show", "smollm2")]
)
def test_a_reader_that_is_gone(arguments: tuple[str, ...]) -> None:
    """Exit with 0 and without a word when nobody reads what a command prints."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk() -> None:
    """Say that the output cannot be written."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "actors"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"ranvier: the output cannot be written: No space left on device; free some space")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("colours", [True, False])
def test_colours(runs: Path, colours: bool) -> None:
    """Colour the bar of a terminal, but not where NO_COLOR is set (no-color.org)."""
    own = {} if colours else {"NO_COLOR": "1"}
    shown = Terminal([*RUN, "--runs", str(runs), "--prompt", "Hi", "-n", "3"], environment=own)
    assert shown.end() == 0
    assert "starting" in shown.seen and ("\x1b[3" in shown.raw) == colours
    shown.close()


@pytest.mark.slow
def test_a_narrow_terminal(runs: Path) -> None:
    """Name the run by its short name, and let no line of a table be wider than the terminal."""
    shown = Terminal([*RUN, "--prompt", "Hi", "-n", "3"], cwd=runs, columns=60)
    assert shown.end() == 0
    assert "run folder: ranvier-runs/smollm2-" in shown.seen and "`ranvier trace latest`" in shown.seen
    for how in (["--why", "1"], ["--idle"], []):
        explained = Terminal([*COMMAND, "trace", "latest", *how], cwd=runs, columns=60)
        assert explained.end() == 0
        assert max(map(len, explained.seen.splitlines())) <= 60 and "lower" in explained.seen
        explained.close()
    shown.close()


@pytest.mark.slow
def test_a_long_prompt(runs: Path, tmp_path: Path) -> None:
    """Show how much of a long prompt is computed."""
    (tmp_path / "prompt.txt").write_text("The sea is wide and deep. " * 200)
    told = [
        *RUN,
        "--runs",
        str(runs),
        "--prompt-file",
        str(tmp_path / "prompt.txt"),
        "-n",
        "2",
        "--set",
        "prefill_chunk=64",
    ]
    shown = Terminal(told, columns=80)
    assert shown.end(90) == 0
    assert "    prompt " in shown.seen
    shown.close()


def test_the_log_as_text(runs: Path) -> None:
    """Show the run's log with -v, also in a pipe."""
    done = subprocess.run(
        [*RUN, "--runs", str(runs), "--prompt", "Hi", "-n", "3", "-v"], capture_output=True, text=True, timeout=100,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "ready" in done.stderr and not done.stderr.startswith("{")


def test_the_version() -> None:
    assert ran("--version").stdout == "ranvier 0.1.0\n"
    assert ran("-h").stdout == ran("--help").stdout


def completed(words: str, cwd: Path) -> list[str]:
    """Return what bash would offer for the last word of a line."""
    count = str(len(words.split(" ")) - 1)
    told = ran(cwd=cwd, _RANVIER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert told.stderr == ""
    return told.stdout.split()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "four.yaml").write_text((EXAMPLES / "smollm2.yaml").read_text())
    (tmp_path / "broken.yaml").write_text("actors: [1, 2]\nedges: 7\n")
    for number, name in enumerate(("mine-20261127-100000-aaaa", "other-20261127-100001-bbbb")):
        folder = tmp_path / "ranvier-runs" / name
        (folder / "logs").mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
        (folder / "graph.yaml").write_text((EXAMPLES / "smollm2.yaml").read_text())
        (folder / "run.json").write_text(json.dumps({"started": f"2026-11-27T10:00:0{number}+00:00"}))
    return tmp_path


@pytest.mark.slow
def test_completion(place: Path) -> None:
    """Complete commands, graphs, runs, actors, edges and settings; offer nothing where a file is wrong."""
    for words, offered in (
        ("ranvier sch", ["schema"]), ("ranvier run smo", ["smollm2"]), ("ranvier show gra", ["graphs/"]),
        ("ranvier check graphs/", ["graphs/four.yaml"]), ("ranvier trace la", ["latest"]),
        ("ranvier trace m", ["mine-20261127-100000-aaaa"]), ("ranvier replay latest lo", ["lower"]),
        ("ranvier scale latest up", ["upper="]), ("ranvier run smollm2 --record up", ["upper"]),
        ("ranvier run graphs/four.yaml --record upper,lower.", ["upper,lower.hidden->upper.hidden"]),
        ("ranvier run graphs/four.yaml --set edges[embed", ["edges[embed.hidden->lower.hidden]."]),
        ("ranvier run broken.yaml --set actors.", []), ("ranvier replay mine actor", []), ("ranvier trace x", []),
    ):  # fmt: skip
        assert completed(words, place) == offered, words


def test_completion_for_shells(tmp_path: Path) -> None:
    """Print what a shell needs."""
    for shell in ("bash", "zsh", "fish"):
        assert (
            "_RANVIER_COMPLETE"
            in ran("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
        )


@pytest.mark.slow
def test_defaults_of_the_user(place: Path) -> None:
    """Take defaults from the user's file. The command line goes before them."""
    config = place / "config" / "ranvier" / "config.toml"
    config.parent.mkdir(parents=True)
    own = {"XDG_CONFIG_HOME": str(place / "config")}
    config.write_text("[runs]\njson = true\n[runs.prune]\nnewest = 1\n[check]\nset = ['model.dtype=float31']\n")
    assert len(json.loads(ran("runs", cwd=place, **own).stdout)) == 2
    assert "got 'float31'" in ran("check", "graphs/four.yaml", cwd=place, **own).stderr
    given = ran("check", "graphs/four.yaml", "--set", "model.dtype=float32", cwd=place, **own)
    assert given.returncode == 0, given.stderr
    assert ran("runs", "prune", "--newest", "2", cwd=place, **own).returncode == 0
    assert len(json.loads(ran("runs", "prune", cwd=place, **own).stdout)) == 1
    for text, words in (
        ("[rn]\n", "there is no command 'rn'; did you mean 'run'?"),
        ("[run]\nmax-tokns = 1\n", "ranvier run has no option --max-tokns; did you mean 'max-tokens'?"),
        ("run = 1\n", "run: expected a table with options, got 1"), ("[run\n", "config.toml: "),
        ("[check]\nset = 'a=1'\n", "check: set: expected a list, got 'a=1'"),
        ("[run]\nmax-tokens = {a = 1}\n", "run: max-tokens: expected one value"),
    ):  # fmt: skip
        config.write_text(text)
        wrong = ran("runs", cwd=place, **own)
        assert wrong.returncode == 2 and words in wrong.stderr, wrong.stderr
    assert ran("--version", cwd=place, **own).returncode == 0 and ran("run", "--help", cwd=place, **own).returncode == 0
    config.write_text("[run]\nmax-tokens = 'x'\n")
    assert "Invalid value for '--max-tokens'" in ran("run", "smollm2", **own).stderr
    assert ran("runs", cwd=place, XDG_CONFIG_HOME="relative", HOME=str(place)).returncode == 0
    assert ran("runs", cwd=place, XDG_CONFIG_HOME="relative", HOME="").returncode == 0
