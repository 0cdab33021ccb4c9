"""Use the commands as a person does: on a real terminal, in pipes, with short names for runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from linux import STORED
from terminal import Terminal
from waiting import wait_until

from ranvier.actors.component.session import Sampling
from ranvier.graph.commands.talk import Talk
from ranvier.graph.file.errors import RequestError
from ranvier.graph.run.runs import named

COMMAND = [sys.executable, "-m", "ranvier"]
SMOLLM2 = str(Path(__file__).parents[3] / "examples" / "smollm2.yaml")
FAST = STORED


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Provide `terminal(*arguments, **options)`, which runs a command of ours on a terminal."""
    opened: list[Terminal] = []

    def begin(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal([*COMMAND, *arguments], **options))
        return opened[-1]

    yield begin
    for each in opened:
        each.close()


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    given = options if "input" in options else {"stdin": subprocess.DEVNULL, **options}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, **given)


def test_the_answer_alone(runs: Path) -> None:
    """Write the answer and nothing else, whether the prompt is an option, a file or a pipe."""
    given = ("run", SMOLLM2, "-n", "8", "--runs", str(runs), *FAST)
    option = run(*given, "--prompt", "Name three colours.")
    assert option.returncode == 0 and option.stderr == ""
    assert len(option.stdout.strip()) > 5 and option.stdout.endswith("\n")
    assert run(*given, input="Name three colours.\n").stdout == option.stdout
    assert run(*given, input="").returncode == 2
    system = run(*given, "--prompt", "Name three colours.", "--system", "Answer in French.")
    assert system.returncode == 0 and system.stdout != option.stdout


def test_a_line_on_a_terminal(runs: Path, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """Say on a terminal where the run is, how fast it was and which actor took most; with -q nothing."""
    given = ("run", SMOLLM2, "--prompt", "Name three colours.", "-n", "8", "--runs", str(runs), *FAST)
    shown = terminal(*given, "--cost", columns=60)
    assert shown.end() == 0
    assert "run folder: " in shown.seen and "tok/s · first after" in shown.seen
    assert "slowest: " in shown.seen and f"`ranvier trace {runs}/" in shown.seen.replace("\n", "")
    table = shown.seen[shown.seen.index("what every message cost") :].splitlines()[1:]
    assert any(line.startswith("lower>upper") for line in table) and max(map(len, table)) <= 60
    with (tmp_path / "answer.txt").open("wb") as file:
        quiet = terminal(*given, "-q", stdout=file.fileno())
        assert quiet.end() == 0
    assert quiet.seen == ""
    assert len((tmp_path / "answer.txt").read_text().strip()) > 5


def test_a_talk(runs: Path, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """Talk with a warm run: messages build on each other, commands work, Ctrl-C stops an answer, Ctrl-D ends."""
    state = {"XDG_STATE_HOME": str(tmp_path)}
    shown = terminal("run", SMOLLM2, "-n", "12", "--runs", str(runs), *FAST, environment=state, columns=200)
    at = shown.until("> ", 90)
    shown.type("My name is Ada.\n")
    at = shown.until("\n> ", after=shown.until("My name is Ada.\n", after=at))
    shown.type("/trace\n")
    at = shown.until("session 1: ", after=at)
    at = shown.until("\n> ", after=shown.until("compute", after=at))
    shown.type("/set max_tokens=2000\n")
    at = shown.until("> ", after=at + len("/set max_tokens=2000"))
    shown.type("Tell me a long story about the sea.\n")
    at = shown.until(" the ", after=shown.until("about the sea.\n", after=at))
    shown.interrupt()
    at = shown.until(" …", after=at)
    for line, words in (
        ("/set heat=1", "/set heat=1: "), ("/set max_tokens=none", "expected a number"), ("/sing", "there is no such command"),
        ("/set seed=2026-13-45", "ranvier: "), ("/help", "Ctrl-D ends"), ("/why", "\n> "),
    ):  # fmt: skip
        shown.type(f"{line}\n")
        at = shown.until(words, after=at + len(line))
    shown.type("\x04")
    assert shown.end() == 0 and "Traceback" not in shown.seen
    history = tmp_path / "ranvier" / "history"
    assert "My name is Ada." in history.read_text() and history.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_talk_whose_window_is_closed(
    runs: Path, terminal: Callable[..., Terminal], tmp_path: Path, number: int
) -> None:
    """End a talk in order when a signal asks for it: the run's outcome is written, and nothing is left."""
    shown = terminal("run", SMOLLM2, "--runs", str(runs), *FAST, environment={"XDG_STATE_HOME": str(tmp_path)})
    shown.until("> ", 90)
    # a signal between the prompt and the wait for a key takes effect with the next key, or the next signal
    assert wait_until(
        lambda: os.kill(shown.process.pid, number) or wait_until(lambda: shown.process.poll() is not None, 20), 60
    )
    assert shown.end() == 128 + number
    [run_dir] = runs.iterdir()
    assert json.loads((run_dir / "run.json").read_text())["outcome"] == "done"


def test_ctrl_c_while_a_talk_starts(runs: Path, terminal: Callable[..., Terminal]) -> None:
    """End everything when Ctrl-C comes before the first line."""
    shown = terminal("run", SMOLLM2, "--runs", str(runs), *FAST)
    shown.until("loading", 60)
    shown.interrupt()
    assert shown.end() == 130 and "Traceback" not in shown.seen


class Asked:
    """Stand for a run: note what it is asked, and answer with one word."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []

    def generate(self, messages: list[dict[str, str]], **options: Any) -> Any:
        self.messages.append([f"{message['role']}: {message['content']}" for message in messages])

        class Answered:
            session = 1
            result = SimpleNamespace(text="yes")

            def __iter__(self) -> Iterator[Any]:
                return iter([SimpleNamespace(text="yes")])

            def close(self) -> None:
                pass

        return Answered()


def test_what_a_talk_asks() -> None:
    """Send what was said before, and forget it with /new and /system, whose message stays with /new."""
    run: Any = Asked()
    talking = Talk(run, {"sampling": Sampling()}, None)
    for line in ("one", "two", "/system be brief", "three", "four", "/new", "five", "/system", "six"):
        talking.take(line)
    one, brief = "user: one", "system: be brief"
    assert run.messages == [
        [one], [one, "assistant: yes", "user: two"], [brief, "user: three"],
        [brief, "user: three", "assistant: yes", "user: four"], [brief, "user: five"], ["user: six"],
    ]  # fmt: skip


def made(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        folder = root / name
        (folder / "logs").mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
        (folder / "run.json").write_text(json.dumps({"started": f"2026-11-27T10:00:0{number}+00:00"}))


def test_names_of_runs(tmp_path: Path) -> None:
    """Find a run by `latest`, by its number, by the beginning of its name, and by its path."""
    old, middle, new = names = ("mine-20261127-100000-aaaa", "mine-20261127-100001-bbbb", "other-20261127-100002-cccc")
    made(tmp_path, *names)
    (tmp_path / "no-run").mkdir()
    for text, name in (
        ("latest", new), ("latest~0", new), ("latest~2", old), ("1", new), ("3", old), ("o", new), ("mine-20261127-100001", middle),
    ):  # fmt: skip
        assert named(text, tmp_path) == tmp_path / name
    assert named(str(tmp_path / old), tmp_path) == tmp_path / old
    assert named("nowhere/else", tmp_path) == Path("nowhere/else")
    for text, words in (
        ("latest~3", "has 3 runs"), ("0", "no such run"), ("4", "no such run"), ("mine", "2 runs begin so"), ("x", "no run's name"),
        ("latest", "has 0 runs"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            named(text, tmp_path / "empty" if words == "has 0 runs" else tmp_path)


@pytest.mark.slow
def test_commands_take_short_names(runs: Path, tmp_path: Path) -> None:
    """Read a trace of `latest`, and list runs with the numbers that name them."""
    os.symlink(runs, tmp_path / "ranvier-runs")
    done = run("run", SMOLLM2, "--prompt", "Hi", "-n", "3", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [name] = [path.name for path in runs.iterdir()]
    for text in ("latest", "1", "smollm2"):
        told = json.loads(run("trace", text, "--json", cwd=tmp_path).stdout)
        assert Path(told["run_dir"]).name == name
    assert run("trace", "latest", "--diff", "1", cwd=tmp_path).returncode == 0
    assert run("runs", cwd=tmp_path).stdout.split()[:2] == ["1", name]
    lost = run("trace", "latest~1", cwd=tmp_path)
    assert lost.returncode == 2 and "ranvier-runs has 1 run;" in lost.stderr
