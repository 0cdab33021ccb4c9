"""Measure graphs whose actors are on a GPU: python benchmarks/gpu/graphs.py [--limit 200]. Each row is printed as soon as it is known.

The models are llamas with random weights. The peer is transformers with a static cache, compiled. Without a GPU:
python benchmarks/gpu/graphs.py --cpu (a tiny model on the processor, to try this script; its figures mean nothing).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import trio
from safetensors.torch import save_file

import ranvier

START = time.monotonic()
SIZES = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 96, 4, 4, 2, 512),
}
PROMPT, TOKENS = 64, 256


def say(*words: object) -> None:
    print(f"[{time.monotonic() - START:5.1f}]", *words, flush=True)


def checkpoint(name: str, folder: Path) -> Path:
    """Write a llama with random weights in bfloat16, one file per layer."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[name]
    width, place = hidden // heads, "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=place).normal_(0, columns**-0.5).cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    index = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        at = f"model.layers.{layer}."
        write(layer + 1, {
            f"{at}self_attn.q_proj.weight": matrix(heads * width, hidden),
            f"{at}self_attn.k_proj.weight": matrix(kv_heads * width, hidden),
            f"{at}self_attn.v_proj.weight": matrix(kv_heads * width, hidden),
            f"{at}self_attn.o_proj.weight": matrix(hidden, heads * width),
            f"{at}mlp.gate_proj.weight": matrix(inner, hidden), f"{at}mlp.up_proj.weight": matrix(inner, hidden),
            f"{at}mlp.down_proj.weight": matrix(hidden, inner),
            f"{at}input_layernorm.weight": ones(), f"{at}post_attention_layernorm.weight": ones(),
        })  # fmt: skip
    write(layers + 1, {
        "model.embed_tokens.weight": matrix(vocabulary, hidden), "lm_head.weight": matrix(vocabulary, hidden),
        "model.norm.weight": ones(),
    })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": width, "vocab_size": vocabulary, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2,
    }))  # fmt: skip
    return folder


def cuts(layers: int) -> dict[str, tuple[dict[str, dict[str, str]], bool]]:
    """Return ways to cut a model: the actors, and whether they share a process."""
    half = layers // 2
    two = {
        "first": {"kind": "first_stage", "layers": f"0-{half - 1}"},
        "last": {"kind": "last_stage", "layers": f"{half}-{layers - 1}"},
    }
    return {
        "one actor": ({"all": {"kind": "model"}}, True),
        "two actors, one process": (two, True),
        "two processes": (two, False),
    }


def measured(model: Path, name: str, cut: str, streams: int, *, trace: bool, device: str | None) -> float:
    """Return tokens per second of all streams together, from the second token on; the median of three times."""
    actors, shared = cuts(SIZES[name][2])[cut]
    placed = {
        actor: {**keys, **({"device": device} if device else {}), **({"host": "gpu"} if shared else {})}
        for actor, keys in actors.items()
    }
    graph = ranvier.load({
        "ranvier": 1, "name": "measured", "model": {"source": str(model), "dtype": "bfloat16"}, "actors": placed,
        "pipeline": list(placed), "trace": trace,
    })  # fmt: skip

    async def one(run: ranvier.Run, number: int, marks: list[tuple[float, float]]) -> None:
        prompt = [(7 * number + 13 * at) % 500 + 3 for at in range(PROMPT)]
        times = []
        async for _ in run.generate(prompt, max_tokens=TOKENS, stop_tokens=()):
            times.append(time.perf_counter())
        marks.append((times[0], times[-1]))

    async def main() -> float:
        async with ranvier.launch(graph, runs=Path(tempfile.mkdtemp(prefix="rv-"))) as run:
            rates = []
            for turn in range(4):
                marks: list[tuple[float, float]] = []
                async with trio.open_nursery() as nursery:
                    for number in range(streams):
                        nursery.start_soon(one, run, number, marks)
                first, last = max(mark[0] for mark in marks), max(mark[1] for mark in marks)
                if turn:  # the first one captures steps
                    rates.append(streams * (TOKENS - 1) / (last - first))
            return median(rates)

    return trio.run(main)


def transformers_rate(model: Path) -> None:
    """Print the peer's tokens per second: one stream, static cache, compiled."""
    from transformers import AutoModelForCausalLM

    held = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to("cuda").eval()
    ids = torch.randint(3, 500, (1, PROMPT), device="cuda")
    settings = {
        "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "cache_implementation": "static",
        "pad_token_id": 0,
    }  # fmt: skip
    held.generate(ids, **settings)
    held.generate(ids, **settings)
    rates = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        held.generate(ids, **{**settings, "max_new_tokens": 1, "min_new_tokens": 1})
        torch.cuda.synchronize()
        middle = time.perf_counter()
        held.generate(ids, **settings)
        torch.cuda.synchronize()
        rates.append((TOKENS - 1) / (time.perf_counter() - middle - (middle - begin)))
    print(f"{median(rates):.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds after which no further case begins")
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    if options.peer:
        transformers_rate(options.peer)
        return
    device = None if options.cpu else "cuda:0"
    if device:
        say(torch.cuda.get_device_name(0), "torch", torch.__version__)
    root = Path(tempfile.mkdtemp(prefix="models-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        for name in ("tiny",) if options.cpu else ("1B", "8B"):
            model = checkpoint(name, root / name)
            gc.collect()
            torch.cuda.empty_cache()
            say(f"{name}: written")
            whole = 0.0
            for cut, streams, trace in (
                ("one actor", 1, False), ("two actors, one process", 1, False), ("two processes", 1, False),
                ("two actors, one process", 1, True), ("one actor", 32, False),
            ):  # fmt: skip
                if time.monotonic() - START > options.limit:
                    say(f"{name} {cut}, {streams} streams: left out, the time is over")
                    continue
                try:
                    rate = measured(model, name, cut, streams, trace=trace, device=device)
                except Exception as error:
                    say(f"FAILED {name} {cut}, {streams} streams: {type(error).__name__}: {str(error)[:600]}")
                    continue
                whole = whole or rate
                share = f", {rate / whole:.3f} of one actor" if streams == 1 else ""
                traced = "traced" if trace else "not traced"
                say(f"{name} {cut}, {streams} streams, {traced}: {rate:.0f} tokens/s{share}")
            if device and time.monotonic() - START < options.limit:
                done = subprocess.run(
                    [sys.executable, __file__, "--peer", str(model)], capture_output=True, text=True, timeout=240
                )
                words = done.stdout.split() or [done.stderr[-300:]]
                say(f"{name} transformers, static cache, compiled: {words[-1]} tokens/s")
            shutil.rmtree(model)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
