"""Check the imports between the top-level packages, the contents of the wheel, and the forbidden constructs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("transport", "actors", "graph")
SOURCES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Return the packages of this project that a file imports, also inside functions and by relative names."""
    room = path.relative_to(REPOSITORY).parts[0]
    depth = len(path.relative_to(REPOSITORY).parts)  # from transport/x.py, 2 dots lead out of its package
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
            elif node.level < depth:
                names = [f"ranvier.{room}"]
            else:
                names = [f"ranvier.{node.module or alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ranvier.")}
    return found & set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_one_way(path: Path) -> None:
    """Let `transport` import only itself, `actors` also `transport`, and `graph` all three."""
    allowed = {"transport": {"transport"}, "actors": {"transport", "actors"}, "graph": set(ROOMS)}
    assert imported(path) <= allowed[path.relative_to(REPOSITORY).parts[0]]


ONLY_LINUX = re.compile(
    r"\b(eventfd|memfd_create|pidfd_\w+|sched_\w+|pipe2|prctl|SCHED_IDLE|MADV_HUGEPAGE|F_ADD_SEALS|F_SEAL_\w+|MAP_POPULATE"
    r"|select\.epoll|EPOLL\w+|SOCK_SEQPACKET|MSG_NOSIGNAL|sys\.platform)\b|\"/proc/|f\"/proc/"
)
KNOWS_LINUX = {
    "transport/system.py", "transport/wires/unix_sockets.py", "transport/wires/shared_memory.py", "actors/model/kernels/pages.py",
}  # fmt: skip
"""The one place, the wire `local` with what it is made of, and large pages; the last three ask the first one before."""


def test_one_place_knows_linux() -> None:
    """Use what only Linux has in one place, and in the parts that are switched off with it."""
    found = {
        str(path.relative_to(REPOSITORY))
        for path in SOURCES
        for line in path.read_text().splitlines()
        if ONLY_LINUX.search(line.partition("#")[0])
    }
    assert found == KNOWS_LINUX


def test_the_rooms_are_links() -> None:
    """Keep src/ranvier/NAME a relative link to the package's folder."""
    for room in ROOMS:
        link = REPOSITORY / "src" / "ranvier" / room
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == REPOSITORY / room


FORBIDDEN = re.compile(
    r"\b(import|from)\s+(pickle|cloudpickle|dill|marshal|shelve)\b|(recv|send)_pyobj|torch\.load\(|yaml\.load\(|shell=True"
    r"|\beval\(|\bexec\(|trust_remote_code(?!=False)"
)


@pytest.mark.parametrize("path", SOURCES + sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda p: p.name)
def test_no_pickle_anywhere(path: Path) -> None:
    """Use no pickle, no `torch.load` and nothing similar, and offer no option that allows them."""
    assert not FORBIDDEN.search(path.read_text())


def test_importing_is_light() -> None:
    """Import ranvier and check a graph without importing torch and without starting a thread."""
    script = (
        "import sys, threading, ranvier; from ranvier import load, plan; "
        f"plan(load({str(REPOSITORY / 'examples' / 'smollm2.yaml')!r})); import ranvier.graph.run.launch; "
        "print('torch' in sys.modules, threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


def test_every_public_name_is_there() -> None:
    """Give every public name a docstring, list it in `dir`, and raise AttributeError for other names."""
    import ranvier

    for name in ranvier.__all__:
        assert getattr(ranvier, name).__doc__, name
    assert set(ranvier.__all__) <= set(dir(ranvier))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ranvier.nothing


def test_the_version_is_the_same_everywhere() -> None:
    """Give the same version in the package, its metadata, the command, and the changelog."""
    import importlib.metadata

    import ranvier

    assert importlib.metadata.version("ranvier") == ranvier.__version__
    done = subprocess.run([sys.executable, "-m", "ranvier", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ranvier {ranvier.__version__}\n"
    assert f"## {ranvier.__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_wheel_offers_ranvier_and_nothing_bare(tmp_path: Path) -> None:
    """Run from the wheel alone, without the checkout.

    The wheel installs `ranvier.actors`, but no bare `actors`, `graph` or `transport`."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, system_site_packages=False, with_pip=False)
    target = next((home / "lib").glob("python*")) / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    # Dependencies come from this environment: after the installed package, and without this checkout.
    here = [path for path in sys.path if path.endswith("site-packages")]
    script = (
        f"import sys, importlib.util as u; sys.path[:] = [p for p in sys.path if p] + {here!r}; "
        "import ranvier.actors.host.host, ranvier.transport.wires.zeromq, ranvier.graph.commands.cli; "
        "print(ranvier.__file__); print([u.find_spec(n) for n in ('actors', 'graph', 'transport')]); "
        "import pathlib; print((pathlib.Path(ranvier.__file__).parent / 'py.typed').exists()); "
        "print(u.find_spec('ranvier.actors.model.kernels._product_avx2') is not None); "
        "print(*sorted(p.name for p in (pathlib.Path(ranvier.__file__).parent / 'graph/page/files').iterdir()))"
    )
    done = subprocess.run(
        [str(home / "bin" / "python"), "-S", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {script}"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    place, bare, typed, kernels, page = done.stdout.splitlines()
    assert page.split() == sorted(path.name for path in (REPOSITORY / "graph" / "page" / "files").iterdir())
    assert kernels == str(shutil.which("gcc") is not None)
    assert place.startswith(str(target))
    assert bare == "[None, None, None]"
    assert typed == "True"


def test_every_benchmark_is_a_question_that_is_asked() -> None:
    """Keep one question per file of benchmarks/. `run.py --help` lists each of them, and `make bench` calls run.py."""
    folder = REPOSITORY / "benchmarks"
    shared = {"run", "report", "contestants", "peers", "served", "http_client"}
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), "--help"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.partition("questions:")[2].splitlines() if line.strip()]
    assert sorted(listed) == sorted({file.stem for file in folder.glob("*.py")} - shared)
    assert "benchmarks/run.py" in (REPOSITORY / "Makefile").read_text()
