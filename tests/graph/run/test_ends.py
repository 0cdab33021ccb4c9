"""Check how a command ends: by signals, with closed streams, and in a folder with odd files.

Check also what other users can see of it meanwhile. The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from linux import only_linux

COMMAND = [sys.executable, "-m", "ranvier"]
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMOLLM2 = str(EXAMPLES / "smollm2.yaml")


def ranvier(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False, **options)


def processes(mark: str) -> list[int]:
    """Return the living processes that have `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                carries = mark.encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if carries and state != "Z":
                found.append(int(entry.name))
    return found


def until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until `holds` returns something true, and return it."""
    deadline_s = time.monotonic() + seconds
    while not (made := holds()):
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.01)
    return made


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    """Write a graph whose actor starts two processes and then sleeps, and return its folder.

    One of the two begins a new session of the operating system."""
    (tmp_path / "parts.py").write_text(
        textwrap.dedent("""
            import subprocess, time
            from torch import nn

            class Starter(nn.Module):
                def forward(self, x):
                    if x.device.type != "meta":
                        for more in ({}, {"start_new_session": True}):
                            subprocess.Popen(["sleep", "77777"], **more)
                        time.sleep(100)
                    return x
        """)
    )
    (tmp_path / "g.yaml").write_text(
        'ranvier: 1\nname: starts\nactors:\n  p: {kind: "./parts.py:Starter", inputs: {x: "float32[n]"}}\n'
        "edges: [gateway.x -> p.x, p.output -> gateway.y]\n"
    )
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    return tmp_path


def asleep(mark: str) -> list[int]:
    """Return the `sleep` processes that have `mark` in their environment."""

    def name(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            return ""

    return [pid for pid in processes(mark) if name(pid) == "sleep"]


@only_linux
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, 131, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_and_what_its_actors_started_case_56(
    number: signal.Signals, code: int, starter: Path, runs: Path
) -> None:
    """End the run and every process that its actors started, when a signal arrives in a step.

    The exit code and the outcome in run.json fit the signal."""
    mark = f"MARK={secrets.token_hex(8)}"
    process = subprocess.Popen(
        [*COMMAND, "run", "g.yaml", "--allow-code", "--input", "x.safetensors", "--runs", str(runs)],
        cwd=starter, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "MARK": mark.partition("=")[2]},
    )  # fmt: skip
    until(lambda: len(asleep(mark)) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert b"Traceback" not in errors
    until(lambda: not processes(mark), 20)
    [folder] = runs.glob("starts-*")
    outcome = json.loads((folder / "run.json").read_text()).get("outcome")
    assert outcome == (None if number is signal.SIGKILL else "interrupted")


@only_linux
def test_an_actor_that_is_lost_takes_along_what_it_started_case_56(starter: Path, runs: Path) -> None:
    """End the children of a killed host, while the run continues."""
    mark = f"MARK={secrets.token_hex(8)}"
    process = subprocess.Popen(
        [*COMMAND, "run", "g.yaml", "--allow-code", "--input", "x.safetensors", "--runs", str(runs)],
        cwd=starter, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "MARK": mark.partition("=")[2]},
    )  # fmt: skip
    first = until(lambda: asleep(mark) if len(asleep(mark)) == 2 else [])
    host = int(Path(f"/proc/{first[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(host, signal.SIGKILL)
    # A child in its own session stays until the run ends.
    until(lambda: len(set(asleep(mark)) & set(first)) < 2, 20)
    process.terminate()
    process.wait(20)
    until(lambda: not processes(mark), 20)


def test_ctrl_c_while_it_imports_ends_without_a_traceback_case_78(runs: Path) -> None:
    """End with code 130 and one line when Ctrl-C arrives during imports.

    It is sent at several moments after the zygote has started."""
    for after_s in (0.0, 0.1, 0.3):
        process = subprocess.Popen(
            [*COMMAND, "run", SMOLLM2, "--prompt", "x", "--max-tokens", "500", "--runs", str(runs)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda children=children: children.read_text().strip())
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130, errors
        assert b"Traceback" not in errors
        assert errors.endswith(b"interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed",
    [
        "<&- >&- 2>&-",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-")),
    ],
)
def test_closed_standard_streams_case_67(closed: str, runs: Path) -> None:
    """Run with closed standard streams, as daemons, cron and init start commands."""
    command = " ".join([*COMMAND, "run", SMOLLM2, "--prompt", "hi", "-n", "2", "--runs", str(runs), closed])
    done = subprocess.run(["bash", "-c", command], timeout=60, check=False, capture_output=True)
    assert done.returncode == 0
    [folder] = runs.glob("smollm2-*")
    assert json.loads((folder / "run.json").read_text())["outcome"] == "done"


# -- code beside the graph ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_called_like_modules_are_not_imported_case_62(runs: Path, tmp_path: Path) -> None:
    """Run no file beside the graph without --allow-code, even if it is named like a module.

    A downloaded folder may have a glob.py or a torch.py."""
    for name in ("glob", "json", "torch", "trio", "ranvier", "random"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit('code was run')\n"
        )
    (tmp_path / "g.yaml").write_text(Path(SMOLLM2).read_text())
    command = [str(Path(sys.executable).parent / "ranvier")]
    for arguments in (["check", "g.yaml"], ["run", "g.yaml", "--prompt", "hi", "-n", "2", "--runs", str(runs)]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", [
    pytest.param(False, marks=pytest.mark.slow, id="a folder"), pytest.param(True, id="a package"),
])  # fmt: skip
def test_a_graphs_own_files_import_each_other_case_62(package: bool, runs: Path, tmp_path: Path) -> None:
    """Let a graph's files import each other, by plain and by relative names.

    A file is loaded once under each name, however many actors it defines. Python's own modules are not replaced."""
    (tmp_path / "helper.py").write_text("import os\nopen('times', 'a').write(f'{os.getpid()} ')\nfactor = 3\n")
    (tmp_path / "glob.py").write_text("raise SystemExit('in the place of a module of Python')\n")
    if package:
        (tmp_path / "__init__.py").write_text("")
    (tmp_path / "parts.py").write_text(
        "from torch import nn\nfrom helper import factor\nfrom .helper import factor as same\nimport glob\n"
        "class A(nn.Module):\n    def forward(self, x): return x * factor\n"
        "class B(nn.Module):\n    def forward(self, x): return x * same\nclass C(B): pass\n"
        "assert issubclass(C, B)\n"
    )
    (tmp_path / "g.yaml").write_text(
        'ranvier: 1\nname: own\nactors:\n  a: {kind: "./parts.py:A", inputs: {x: "float32[n]"}}\n'
        '  b: {kind: "./parts.py:B", inputs: {x: "float32[n]"}}\n'
        "edges: [gateway.x -> a.x, a.output -> b.x, b.output -> gateway.y]\n"
    )
    import torch
    from safetensors.torch import load_file, save_file

    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    command = [
        str(Path(sys.executable).parent / "ranvier"),
        "run",
        "g.yaml",
        "--allow-code",
        "--input",
        "x.safetensors",
    ]
    done = subprocess.run(
        [*command, "--output", "y.safetensors", "--runs", str(runs)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "y.safetensors")["y"].tolist() == [9.0, 9.0, 9.0]
    times = (tmp_path / "times").read_text().split()
    assert max(times.count(pid) for pid in times) <= 2, "by its plain name, and as a part of the folder"
    elsewhere = ranvier("check", str(tmp_path / "g.yaml"), "--allow-code", cwd="/")
    assert elsewhere.returncode == 0, elsewhere.stderr


# -- prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["-", pytest.param("file", marks=pytest.mark.slow)])
def test_a_prompt_is_not_seen_by_others_case_80(way: str, runs: Path, tmp_path: Path) -> None:
    """Keep a prompt from standard input or a file out of all command lines and of the run's files."""
    secret = "Salamanders-of-1871"
    file = tmp_path / "prompt.txt"
    file.write_text(f"Tell me about {secret}.")
    given = ["--prompt", "-"] if way == "-" else ["--prompt-file", str(file)]
    with file.open("rb") as opened:
        process = subprocess.Popen(
            [*COMMAND, "run", SMOLLM2, *given, "-n", "40", "--runs", str(runs), "--json", "--set", "journal=true"],
            stdin=opened, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    seen: list[str] = []
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen += [entry.parent.name] if secret.encode() in entry.read_bytes() else []
            except OSError:
                continue
        time.sleep(0.05)
    made = json.loads(process.communicate()[0])
    assert made["prompt_tokens"] > 20
    assert not seen
    for path in Path(made["run_dir"]).rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    both = ranvier("run", SMOLLM2, "--prompt", "x", "--prompt-file", str(file))
    assert both.returncode == 2
    assert "are both given; give one" in both.stderr
