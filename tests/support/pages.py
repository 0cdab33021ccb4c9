"""Read the code blocks of a page, and run them in order in one folder, as a reader does who follows the page.

- ```console: lines that begin with `$ ` are commands of bash; the lines below a command are what it prints. Numbers may differ, `…`
  stands for any text, and a line that is only `…` for any lines. A command without lines below it may print anything.
- ```python: a script. ```text right after it is what it prints, by the same rules.
- Any block with `title="NAME"`: a file that the reader writes.
- ```yaml without a title: a part of a graph file; its keys must fit the schema.

A comment before a block changes how it is run: `<!-- exit: 1 -->` is the exit code of its last command, and
`<!-- not run: REASON -->` leaves it out.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"(?:<!-- (?P<order>exit|not run): (?P<value>.*?) -->\n)?^```(?P<info>\w+.*)\n(?P<body>(?:.*\n)*?)^```$", re.M
)
TITLE = re.compile(r'title="([^"]+)"')
NUMBER = re.compile(r"\d[\d.,:]*(?:e[+-]?\d+)?")
RUN_NAME = re.compile(r"\b([\w.-]+?)-\d{8}-\d{6}-[0-9a-f]{4}\b")
LONGEST_S = 300


@dataclass(frozen=True)
class Block:
    """Hold a code block: its language, title and text, the line that it begins in, and how a comment wants it run."""

    language: str
    title: str
    body: str
    line: int
    exit: int = 0
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    text = page.read_text()
    made = []
    for found in BLOCK.finditer(text):
        title = TITLE.search(found["info"])
        order, value = found["order"], found["value"]
        made.append(
            Block(
                found["info"].split()[0], title[1] if title else "", found["body"], text.count("\n", 0, found.start()) + 1,
                int(value) if order == "exit" else 0, value if order == "not run" else "",
            )
        )  # fmt: skip
    return made


def run(page: Path, place: Path) -> int:
    """Run the blocks of a page in a folder. Return how many were run.

    Raises:
        AssertionError: a command failed, or printed something else than the page says.
    """
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(place), "COLUMNS": "200",
    }  # fmt: skip
    with subprocess.Popen(
        ["bash"], cwd=place, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            return _run(page, place, environment, shell)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)  # what the page has left running


def _run(page: Path, place: Path, environment: Mapping[str, str], shell: subprocess.Popen[str]) -> int:
    done, shown = 0, ""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.not_run:
            assert len(block.not_run) > 10, f"{where}: say why it is not run"
        elif block.title:
            (place / block.title).parent.mkdir(parents=True, exist_ok=True)
            (place / block.title).write_text(block.body)
        elif block.language == "console":
            commands = list(_commands(block.body))
            for number, (command, expected) in enumerate(commands, 1):
                code, said = _entered(shell, command)
                wanted = block.exit if number == len(commands) else 0
                assert code == wanted, f"{where}: `{command}` ended with {code}:\n{said[-3000:]}"
                compare(f"{where}: `{command}`", expected, said)
                done += 1
        elif block.language == "python":
            script = subprocess.run(
                [sys.executable, "-c", block.body], cwd=place, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=LONGEST_S, check=False,
            )  # fmt: skip
            assert script.returncode == 0, f"{where}:\n{script.stderr[-3000:]}"
            shown, done = script.stdout, done + 1
        elif block.language == "text" and shown:
            compare(where, block.body.splitlines(), shown)
            shown = ""
    return done


def _entered(shell: subprocess.Popen[str], command: str) -> tuple[int, str]:
    """Enter a command, and return its exit code and what it has printed."""
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write(f'{command}\necho "end-of-command $?"\n')
    shell.stdin.flush()
    said = []
    for line in shell.stdout:
        before, end, code = line.rpartition("end-of-command ")
        if end:
            return int(code), "".join(said) + before
        said.append(line)
    raise AssertionError(f"the shell ended in `{command}`:\n{''.join(said)}")


def _commands(body: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a console block with the lines below it."""
    command, expected = "", list[str]()
    for line in body.splitlines():
        if command.endswith("\\") and not expected:
            command += f"\n{line}"
        elif line.startswith("$ "):
            if command:
                yield command, expected
            command, expected = line[2:], []
        else:
            expected.append(line)
    if command:
        yield command, expected


def compare(where: str, expected: Sequence[str], said: str) -> None:
    """Compare printed lines with those of a page.

    Raises:
        AssertionError: they differ in more than numbers.
    """
    lines = [_plain(line) for line in said.splitlines()]
    at, anywhere = 0, False
    for line in expected:
        if line.strip() == "…":
            anywhere = True
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in _plain(line).split("…")))
        fitting = [number for number in range(at, len(lines)) if pattern.fullmatch(lines[number])]
        if not anywhere:
            fitting = [number for number in fitting if number == at]
        assert fitting, f"{where}: expected {line!r}, got {lines[at : at + 8]}"
        at, anywhere = fitting[0] + 1, False
    if expected and not anywhere:
        assert at == len(lines), f"{where}: prints more than the page says: {lines[at : at + 5]}"


def _plain(line: str) -> str:
    return " ".join(NUMBER.sub("#", RUN_NAME.sub(r"\1-#", line)).split())
