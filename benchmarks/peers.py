"""Provide the peers that generate text, each in its best form: transformers, llama.cpp, OpenVINO GenAI, CTranslate2.

peers.sh installs them and makes the forms of the model that they take. A peer that is not there raises `Missing`. The
protocol and the figure are those of contestants.py; all decode greedily and go on past the end of the text.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from contestants import NEW, PEERS, PROMPT, Contestant, model_file

FORMS = PEERS / "models"

TRANSFORMERS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, threads, streams, prompt, new = sys.argv[1], *map(json.loads, sys.argv[2:6])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, sys.argv[7])).eval()
options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}
ids = torch.tensor([prompt] * streams)
def request():
    made = model.generate(ids, **options)
    assert made.shape == (streams, len(prompt) + new)
if sys.argv[6] == "compiled":
    options["cache_implementation"] = "static"
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    mode = torch.no_grad  # frozen weights and inference mode exclude each other
else:
    mode = torch.inference_mode
with mode():
    for _ in range(3 if sys.argv[6] == "compiled" else 0):
        request()
    for _ in sys.stdin:
        began = time.perf_counter()
        request()
        print(streams * new / (time.perf_counter() - began), flush=True)
"""

LLAMA_CPP = """
import ctypes, json, os, sys, time, numpy, llama_cpp as l
file, threads, streams, prompt, new = sys.argv[1], *map(json.loads, sys.argv[2:6])
silent = l.llama_log_callback(lambda *_: None)  # kept in a variable: the library calls it until it ends
l.llama_log_set(silent, ctypes.c_void_p())
l.llama_backend_init()
options = l.llama_model_default_params()
if len(sys.argv) > 7:  # cut over the servers at these ports
    libraries = os.environ["LLAMA_CPP_LIB_PATH"]
    rpc, base = (ctypes.CDLL(f"{libraries}/lib{name}.so") for name in ("ggml-rpc", "ggml"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    for port in json.loads(sys.argv[7]):
        base.ggml_backend_register(ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())))
    halves = (ctypes.c_float * 128)(1.0, 1.0)
    options.n_gpu_layers, options.tensor_split = 99, halves
model = l.llama_model_load_from_file(file.encode(), options)
options = l.llama_context_default_params()
options.n_ctx = (len(prompt) + new + 64) * streams
options.n_batch, options.n_ubatch, options.n_seq_max = 2048, 512, streams
options.n_threads = options.n_threads_batch = threads
options.flash_attn_type = int(sys.argv[6])
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
    rows = [(t, p, s, p == last) for s in range(streams) for p, t in enumerate(prompt)]
    made = [[token for at in range(0, len(rows), 2048) for token in decode(rows[at:at + 2048])]]
    for step in range(new - 1):
        made.append(decode([(t, len(prompt) + step, s, True) for s, t in enumerate(made[-1])]))
    assert len(made) == new and all(len(step) == streams for step in made)
    print(streams * new / (time.perf_counter() - began), flush=True)
"""

OPENVINO = """
import json, sys, time, numpy, openvino, openvino_genai
folder, threads, streams, prompt, new = sys.argv[1], *map(json.loads, sys.argv[2:6])
properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
options = openvino_genai.GenerationConfig()
options.max_new_tokens, options.ignore_eos, options.do_sample = new, True, False
ids = openvino.Tensor(numpy.array([prompt], numpy.int64))
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size, scheduler.enable_prefix_caching = 1, False  # GiB; each request computes its whole prompt
scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, streams
if streams == 1:
    pipe = openvino_genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **properties)
    def request():
        return pipe.generate(ids, options).tokens
else:
    pipe = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    def request():
        return [each.m_generation_ids[0] for each in pipe.generate([ids] * streams, [options] * streams)]
for _ in sys.stdin:
    began = time.perf_counter()
    made = request()
    took = time.perf_counter() - began
    assert len(made) == streams and all(len(tokens) == new for tokens in made)
    print(streams * new / took, flush=True)
"""

CTRANSLATE2 = """
import json, pathlib, sys, time, ctranslate2
folder, threads, streams, prompt, new = sys.argv[1], *map(json.loads, sys.argv[2:6])
replicas = min(threads, streams)  # a thread each: two threads on one batch are slower than one
names = json.loads(pathlib.Path(folder, "vocabulary.json").read_text())
model = ctranslate2.Generator(folder, device="cpu", compute_type="int8", inter_threads=replicas, intra_threads=1)
share = -(-streams // replicas)
prompts = [[names[token] for token in prompt]] * streams
for _ in sys.stdin:
    began = time.perf_counter()
    made = model.generate_batch(
        prompts, max_batch_size=share, max_length=new, min_length=new, include_prompt_in_result=False, beam_size=1,
        sampling_topk=1,
    )
    took = time.perf_counter() - began
    assert len(made) == streams and all(len(each.sequences_ids[0]) == new for each in made)
    print(streams * new / took, flush=True)
"""


class Missing(report.Ended):
    """Tell that a peer is not there, or that peers.sh could not make its form of the model."""


def transformers(
    threads: int, streams: int, *, compiled: bool = False, dtype: str = "bfloat16", prompt: Sequence[int] = PROMPT,
    new: int = NEW,
) -> Contestant:  # fmt: skip
    """Return transformers, as it is or compiled, with a static cache and packed weights."""
    settings = {"TORCHINDUCTOR_FREEZING": "1", "TORCHINDUCTOR_CACHE_DIR": str(PEERS / "inductor")} if compiled else {}
    return Contestant(
        sys.executable, TRANSFORMERS, *_arguments(FORMS / "safetensors", threads, streams, prompt, new),
        "compiled" if compiled else "", dtype, HF_HUB_OFFLINE="1", **settings,
    )  # fmt: skip


def transformers_forms() -> dict[str, dict[str, Any]]:
    """Return the forms of transformers that may be its fastest, as arguments by their names.

    Processors without products of bfloat16 compute in float32: there, it is tried too, and bfloat16 only compiled.
    """
    flags = Path("/proc/cpuinfo").read_text()
    forms = [("bfloat16", True)]
    forms += [("bfloat16", False)] if "avx512_bf16" in flags else [("float32", True), ("float32", False)]
    return {
        f"transformers, {dtype}{', compiled' if compiled else ''}": {"dtype": dtype, "compiled": compiled}
        for dtype, compiled in forms
    }


def transformers_code(functions: str, figure: str) -> Contestant:
    """Return transformers whose figure is the value of an expression after each request of one stream."""
    code = TRANSFORMERS.replace(
        "print(streams * new / (time.perf_counter() - began), flush=True)", f"print({figure}, flush=True)"
    )
    arguments = _arguments(FORMS / "safetensors", 2, 1, PROMPT, NEW)
    return Contestant(sys.executable, functions + code, *arguments, "", "bfloat16", HF_HUB_OFFLINE="1")


def llama_cpp(
    form: str, threads: int, streams: int, *, prompt: Sequence[int] = PROMPT, new: int = NEW, flash: bool = True
) -> Contestant:  # fmt: skip
    """Return llama.cpp in one process. `form` is Q4_1 (the file as it is), Q4_0, Q8_0, BF16, or F16."""
    return _llama_cpp(_arguments(_gguf(form), threads, streams, prompt, new), flash)


def llama_cpp_cut(form: str, streams: int, threads_per_server: int = 1, *, flash: bool = True) -> Contestant:
    """Return llama.cpp cut over two servers on loopback with half of the layers each."""
    ports = [_free_port(), _free_port()]
    servers = [
        subprocess.Popen(
            [str(_there(_LIBRARIES / "ggml-rpc-server")), "--threads", str(threads_per_server), "--port", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]  # fmt: skip
    for port in ports:
        _until_listening(port)
    return _llama_cpp(_arguments(_gguf(form), 1, streams, PROMPT, NEW), flash, ports, servers)


def server(form: str, streams: int) -> tuple[list[str], int]:
    """Return the command of llama.cpp's server with two threads and a slot for each stream, and its port on loopback."""
    port = _free_port()
    command = [str(_there(_LIBRARIES / "llama-server")), "--model", str(_there(_gguf(form))), "--port", str(port)]
    sized = ["--threads", "2", "--parallel", str(streams), "--ctx-size", str(512 * streams)]
    return [*command, *sized, "--no-webui"], port


def until_healthy(port: int) -> None:
    """Wait until llama.cpp's server has loaded its model.

    Raises:
        Missing: it does not answer in time.
    """
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise Missing(f"llama.cpp's server does not answer at port {port}") from None
            time.sleep(0.2)


def openvino(
    form: str, threads: int, streams: int, *, prompt: Sequence[int] = PROMPT, new: int = NEW
) -> Contestant:  # fmt: skip
    """Return OpenVINO GenAI. `form` is bfloat16, int8 or int4."""
    return Contestant(
        _python(), OPENVINO, *_arguments(FORMS / f"openvino-{form}", threads, streams, prompt, new)
    )  # fmt: skip


def ctranslate2(threads: int, streams: int, *, prompt: Sequence[int] = PROMPT, new: int = NEW) -> Contestant:
    """Return CTranslate2 in int8. Of one stream it computes with one thread only."""
    return Contestant(
        _python(), CTRANSLATE2, *_arguments(FORMS / "ctranslate2-int8", threads, streams, prompt, new)
    )  # fmt: skip


_LLAMA = PEERS / "llama"
_LIBRARIES = _LLAMA / "build" / "bin"


def _llama_cpp(
    arguments: Sequence[str], flash: bool, ports: Sequence[int] = (), servers: Sequence[subprocess.Popen[bytes]] = ()
) -> Contestant:  # fmt: skip
    cut = [json.dumps(list(ports))] if ports else []
    return Contestant(
        _python(), LLAMA_CPP, *arguments, str(int(flash)), *cut, with_it=servers,
        LLAMA_CPP_LIB_PATH=str(_there(_LIBRARIES)), PYTHONPATH=str(_LLAMA),
    )  # fmt: skip


def _gguf(form: str) -> Path:
    return model_file() if form == "Q4_1" else FORMS / f"{form}.gguf"


def _arguments(model: Path, threads: int, streams: int, prompt: Sequence[int], new: int) -> tuple[str, ...]:
    return str(_there(model)), str(threads), str(streams), json.dumps(list(prompt)), str(new)


def _python() -> Path:
    return _there(PEERS / "bin" / "python")


def _there(path: Path) -> Path:
    if not path.exists():
        raise Missing(f"{path.relative_to(PEERS)} is not there; `make bench` makes it")
    return path


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
                raise Missing(f"llama.cpp's server does not listen at port {port}") from None
            time.sleep(0.1)
