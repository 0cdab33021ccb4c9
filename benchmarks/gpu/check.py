"""Check the step on a GPU and measure it: python benchmarks/gpu/check.py [--limit 330]. Each row is printed as soon as it is known.

Without a GPU: python benchmarks/gpu/check.py --cpu (small sizes, in Triton's interpreter; no times).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace

BENCHMARKS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [BENCHMARKS, os.path.join(os.path.dirname(BENCHMARKS), "tests", "support")]
if __name__ == "__main__" and "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import plain_layers
import torch

from gpu.candidates import attention_candidates, candidates
from gpu.measure import Measured, compilations, seconds
from ranvier.actors.model.coded import in_4_bits, in_8_bits
from ranvier.actors.model.gpu import products
from ranvier.actors.model.gpu.launches import Buffers, Wiring
from ranvier.actors.model.gpu.paged_cache import PAGE
from ranvier.actors.model.gpu.shapes import Pages, Shape
from ranvier.actors.model.gpu.steps import Place, Step
from ranvier.actors.model.gpu.tiles import PRODUCTS, default_attention, default_tiles

START = time.monotonic()
SHORT, DEEP = 16, 128
"""Pages per row of the short and the deep steps."""
MODELS = {
    "1B": Shape(2048, 32, 8, 64, 8192, 16, 128256),
    "8B": Shape(4096, 32, 8, 128, 14336, 32, 128256),
}
SMALL = {
    "llama D64": Shape(512, 8, 2, 64, 1536, 4, 8192),
    "smollm2": Shape(576, 9, 3, 64, 1536, 4, 8192),
    "qwen2 bias": Shape(896, 14, 2, 64, 4864, 3, 8192),
    "qwen3 D128 norms": Shape(1024, 16, 8, 128, 3072, 3, 8192),
    "window 100": Shape(512, 8, 4, 64, 1536, 3, 8192),
    "1B, 4 layers": Shape(2048, 32, 8, 64, 8192, 4, 32000),
}
# what layers have beside llama's
PARTS = {"qwen2 bias": {"qkv_bias": True}, "qwen3 D128 norms": {"qk_norm": True}, "window 100": {"window": 100}}
PDL = [True]
"""False after a failure with it."""


def say(*words: object) -> None:
    line = f"[{time.monotonic() - START:5.1f}] " + " ".join(map(str, words))
    print(line, flush=True)


def steps_of(name: str, tokens: int, width: int, pdl: bool, tried: bool, first=None, rounded=None, small=False):
    """Return all launches of a step of one layer on the meta device, of the default tiles and of those to be tried.

    `rounded` makes codes of its matrices.
    """
    meta = torch.device("meta")
    shape = replace({**MODELS, **SMALL}[name], layers=1)
    weights = plain_layers.random_weights(shape, torch.bfloat16, meta, 1024, **PARTS.get(name, {}))
    if rounded is not None:
        weights, _ = plain_layers.coded(weights, rounded, "meta")
    pages = Pages.empty(shape, 8, PAGE, torch.bfloat16, meta)
    first = first or default_tiles(shape, tokens, width, PAGE, pdl, coded=rounded is not None, small=small)
    all_tiles = [first]
    if tried:
        all_tiles += [first.with_product(name, tile) for name in PRODUCTS for tile in candidates(shape, name, tokens)]
        cuts = [
            cut
            for pages in (width, DEEP)
            for cut in attention_candidates(default_attention(shape, tokens, pages, PAGE), PAGE)
        ]
        all_tiles += [replace(first, attention=cut) for cut in cuts]
    made = []
    for tiles in all_tiles:
        buffers = Buffers.of(shape, tokens, width, PAGE, tiles, torch.bfloat16, meta)
        made += Wiring(shape, weights, pages, buffers, width, tiles).launches()
    return made


def everything(names, tokens, tried, others=(), coded=False, desktop=False):
    """Return one launch per compilation."""
    made = []
    for name in names:
        for count in tokens:
            made += steps_of(name, count, SHORT, not desktop, tried, small=desktop)
            for rounded in (in_8_bits, in_4_bits) if coded else ():
                made += steps_of(name, count, SHORT, not desktop, False, rounded=rounded, small=desktop)
    for name in others:
        for count in (1, 8, 32):
            made += steps_of(name, count, SHORT, True, False)
            made += steps_of(name, count, SHORT, False, False) if count in (1, 8) else []
    return compilations(made)


def jobs():
    """Return every kernel that the check will launch, one launch per compilation, the slow ones first."""
    made = everything(MODELS, (1, 32), True)
    made += everything(MODELS, (8,), False)
    for name in MODELS:
        made += steps_of(name, 1, SHORT, False, False)
    for small in list(SMALL)[: 1 if "--speed" in sys.argv else None]:
        made += everything((), (), False, (small,))
    made += steps_of("llama D64", 1, SHORT, True, False, default_tiles(SMALL["llama D64"], 32, SHORT, PAGE, True))
    return compilations(made)


def compile_share(index: int, count: int) -> None:
    """Compile every `count`-th kernel into Triton's cache on disk."""
    failed = 0
    for number, launch in enumerate(jobs()):
        if number % count == index:
            try:
                getattr(launch.compile(), "_init_handles", lambda: None)()  # builds the launcher, too
            except Exception as error:
                failed += 1
                print(
                    "compile",
                    launch.kernel.__name__,
                    dict(launch.constants),
                    dict(launch.options),
                    type(error).__name__,
                    str(error)[-300:],
                    flush=True,
                )
    sys.exit(failed > 0)


def bandwidth(device: torch.device) -> tuple[float, float]:
    """Return bytes per second of a copy (read and written) and of a product that only reads."""
    a = torch.empty(4 << 30, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / seconds(lambda: b.copy_(a), 10)
    read = a.nbytes / seconds(lambda: a.view(torch.int64).sum(), 10)
    return copied, read


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def right(
    name: str, shape: Shape, rows: int, device: torch.device, pdl: bool, reading: int = 300, more: int = 3
) -> None:
    """Decode texts of ragged lengths, compare with the float32 model, and replay for the same bits."""
    cuda = device.type == "cuda"
    weights = plain_layers.random_weights(shape, torch.bfloat16, device, 1024, seed=len(name), **PARTS.get(name, {}))
    pages = Pages.empty(shape, rows * SHORT + 1, PAGE, torch.bfloat16, device)
    for held in (*pages.keys, *pages.values):
        held.fill_(float("nan"))
    tables = torch.randperm(pages.count)[: rows * SHORT].view(rows, SHORT).tolist()
    lengths = [max(more + 1, reading - 37 * i % reading) for i in range(rows)]
    texts = [torch.randint(0, shape.vocabulary, (n,), device=device) for n in lengths]
    plain = []
    for text, table in zip(texts, tables):
        kept = []
        plain.append(plain_layers.forward(shape, weights, text, kept)[-more:])
        plain_layers.fill(pages, table, kept, len(text) - more)
    cores = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 132
    step = Step(shape, weights, pages, rows, SHORT, default_tiles(shape, rows, SHORT, PAGE, pdl, cores))
    if cuda:
        step.capture()
    made, same = [], True
    for left in range(more, 0, -1):
        step.put(
            [Place(len(text) - left + 1, table) for text, table in zip(texts, tables)],
            [int(text[len(text) - left]) for text in texts],
        )
        kept = None
        for _ in range(3 if cuda else 1):
            b = step.buffers
            for tensor in (
                b.hidden_TH, b.normed_TH, b.qkv, b.attended, b.inner_TI, b.logits_TV, b.sums, b.parts, b.part_sum
            ):  # fmt: skip
                tensor.fill_(float("nan"))
            step()
            if cuda:
                torch.cuda.synchronize()
            logits = b.logits_TV.clone()
            same = same and (kept is None or torch.equal(kept, logits))
            kept = logits
        assert kept is not None
        same = same and kept.argmax(-1).tolist() == step.chosen.tolist()
        made.append(kept)
    ours = torch.stack(made, 1)
    exact = plain_layers.cast(weights, torch.float32)
    want = torch.stack([plain_layers.forward(shape, exact, text)[-more:] for text in texts])
    theirs = torch.stack(plain)
    mine, peer = distance(ours, want), distance(theirs, want)
    agree = float((ours.argmax(-1) == want.argmax(-1)).float().mean())
    agree_plain = float((theirs.argmax(-1) == want.argmax(-1)).float().mean())
    most = 1.2 if cuda else 1.6  # the interpreter cuts bits off instead of rounding to bfloat16
    ok = mine <= most * peer and same
    say(
        "right" if ok else "WRONG",
        f"{name} T{rows} pdl {pdl}: error {mine:.2e}, plain bfloat16 {peer:.2e}, ratio {mine / peer:.2f}; choices as float32 {agree:.3f}, plain {agree_plain:.3f}; bits of replays the same: {same}",
    )


def alone(device: torch.device) -> None:
    """Say whether a row's bits depend on the rows beside it: within one bucket, and between buckets of one tiling."""
    shape = SMALL["llama D64"]
    weights = plain_layers.random_weights(shape, torch.bfloat16, device, 1024)
    pages = Pages.empty(shape, 33 * SHORT, PAGE, torch.bfloat16, device)
    for held in (*pages.keys, *pages.values):
        held.normal_()
    tiles = default_tiles(shape, 32, SHORT, PAGE, True)
    places = [Place(200 + i, range(i * SHORT, (i + 1) * SHORT)) for i in range(32)]
    found = {}
    for tokens, used in ((32, 32), (32, 1), (16, 16), (4, 4), (1, 1)):
        step = Step(shape, weights, pages, tokens, SHORT, tiles)
        step.capture()
        step.put(places[:used], range(7, 7 + used))
        step()
        torch.cuda.synchronize()
        found[f"{used} of {tokens}"] = step.buffers.logits_TV[0].clone()
    first = found["32 of 32"]
    say(
        "repeatable: the bits of row 0 beside 31 others equal those of",
        {key: torch.equal(first, value) for key, value in found.items()},
        "(tensor-core tiles of 32 rows for all)",
    )


def timed(
    name: str,
    group: Measured,
    tokens: int,
    width: int,
    length: int,
    rates: tuple[float, float],
    note: str = "",
    tiles=None,
) -> float:
    """Time a step: events around replays, and the loop of a host that waits for each token."""
    shape = group.shape
    begin = time.perf_counter()
    step = group.step(tokens, width, length, tiles)
    captured = time.perf_counter() - begin
    took = seconds(step, 40)
    begin = time.perf_counter()
    for _ in range(40):
        step()
        torch.cuda.current_stream().synchronize()
    loop = (time.perf_counter() - begin) / 40
    cached = tokens * length * shape.layers * shape.kv_heads * shape.head_width * 4
    bytes_ = group.weights.bytes_per_token() + cached
    say(
        f"{name} T{tokens} depth {length} {note}: {took * 1e6:.1f} us, {tokens / took:.0f} tok/s, of the copy bandwidth {bytes_ / took / rates[0]:.3f} (weights alone {group.weights.bytes_per_token() / took / rates[0]:.3f}), {bytes_ / took / 1e12:.2f} TB/s; a host that waits for each step {tokens / loop:.0f} tok/s; {len(step.launches)} kernels, capture {captured:.2f} s, page {cached / 1e9:.2f} GB"
    )
    return took


def parts(name: str, group: Measured, tokens: int, length: int) -> None:
    """Say what each kernel adds to a step: the time without it, in microseconds per launch."""
    made = {}
    for left_out in (None, "qkv", "attend", "out", "up", "down", "head", "pick"):
        step = Step(group.shape, group.weights, group.pages, tokens, SHORT, group.tiles_for(tokens, SHORT))
        removed = sum(launch.name == left_out for launch in step.launches)
        step.launches = [launch for launch in step.launches if launch.name != left_out]
        step.capture()
        step.put([Place(length, range(at * SHORT, (at + 1) * SHORT)) for at in range(tokens)], range(1, tokens + 1))
        took = seconds(step, 20) * 1e6
        made[left_out or "whole"] = took if left_out is None else (made["whole"] - took) / removed
    say(f"{name} T{tokens} depth {length}, us per launch:", {key: round(value, 2) for key, value in made.items()})


def speed(name: str, device: torch.device, rates: tuple[float, float], limit: float) -> None:
    shape = MODELS[name]
    begin = time.monotonic()
    weights = plain_layers.random_weights(shape, torch.bfloat16, device, 16384)
    pages = Pages.empty(shape, 32 * DEEP, PAGE, torch.bfloat16, device)
    for held in (*pages.keys, *pages.values):
        held.normal_()
    torch.cuda.synchronize()
    say(
        f"{name}: {weights.bytes_per_token() / 1e9:.3f} GB per token, at the copy bandwidth {rates[0] / weights.bytes_per_token():.0f} tok/s; made in {time.monotonic() - begin:.1f} s"
    )
    group = Measured(shape, weights, pages, PDL[0])
    for tokens in (1, 32):
        timed(name, group, tokens, SHORT, 512, rates, "default tiles")
        if tokens == 1:
            off = default_tiles(shape, tokens, SHORT, PAGE, False, group.cores)
            timed(name, group, tokens, SHORT, 512, rates, "default tiles, no PDL", off)
        begin = time.monotonic()
        group.choose_products(tokens, SHORT, 512, say)
        group.choose_attention(tokens, SHORT, 512, say)
        tiles = group.tiles_for(tokens, SHORT)
        say(
            f"{name} T{tokens}: measured in {time.monotonic() - begin:.1f} s: { {key: (t.rows, t.columns, t.splits, t.warps, t.stages) for key, t in tiles.products.items()} }, {tiles.attention}"
        )
        timed(name, group, tokens, SHORT, 512, rates, "measured tiles")
        timed(name, group, tokens, SHORT, 64, rates, "measured tiles")
        if tokens == 1:
            for what in (lambda: edges(group), lambda: timeline(name, group)):
                try:
                    what()
                except Exception as error:
                    say("FAILED", type(error).__name__, str(error)[:300])
        parts(name, group, tokens, 512)
    for tokens in (1, 32):
        timed(name, group, tokens, DEEP, 8000, rates, "deep, default attention")
        group.choose_attention(tokens, DEEP, 8000, say)
        timed(name, group, tokens, DEEP, 8000, rates, f"deep, measured {group.attentions[tokens, DEEP]}")
    shared = group.products[32]
    for tokens in (1, 2, 4, 8, 16):
        if time.monotonic() - START < limit - 20:
            made = replace(group.tiles_for(tokens, SHORT), products=shared)
            timed(name, group, tokens, SHORT, 512, rates, "the tiles of 32 (same bits in every bucket)", made)


def edges(group: Measured) -> None:
    """Say how many edges of a captured step are programmatic, and how long an empty chain takes with and without PDL."""
    from cuda.bindings import runtime

    graph = torch.cuda.CUDAGraph(keep_graph=True)
    step = Step(group.shape, group.weights, group.pages, 1, SHORT, group.tiles_for(1, SHORT))
    step.capture()
    with torch.cuda.graph(graph):
        step.run()
    handle = runtime.cudaGraph_t(graph.raw_cuda_graph())
    ask = getattr(runtime, "cudaGraphGetEdges_v2", runtime.cudaGraphGetEdges)
    found = ask(handle, 0)
    found = ask(handle, found[-1])
    kinds = [edge.type for edge in found[3]]
    say("edges of the graph:", {str(kind): kinds.count(kind) for kind in set(kinds)})


def chain(device: torch.device) -> None:
    """Say how long a chain of trivial kernels takes in a graph, with and without PDL."""
    best, at, token = (
        torch.zeros(8, 64, device=device),
        torch.zeros(8, 64, dtype=torch.int32, device=device),
        torch.zeros(8, dtype=torch.int32, device=device),
    )
    for pdl in (False, True):

        def run(pdl: bool = pdl) -> None:
            for _ in range(200):
                products.pick[(8,)](
                    best, at, token, TILES=64, BLOCK=64, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {})
                )

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        say(f"chain of 200 trivial kernels, PDL {pdl}: {seconds(graph.replay, 10) / 200 * 1e6:.2f} us each")


def timeline(name: str, group: Measured) -> None:
    """Say when the kernels of one layer begin and how long they take, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    step = group.step(1, SHORT, 512)
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in seen.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    part = events[len(events) // 2 : len(events) // 2 + 12]
    say(f"{name} timeline, us:", [(label[:6], round(a - part[0][0], 2), round(b - a, 2)) for a, b, label in part])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--limit", type=float, default=330)
    parser.add_argument("--compile", default="")
    parser.add_argument("--quick", action="store_true", help="fewer cases of correctness")
    parser.add_argument("--speed", action="store_true", help="one case of correctness, then times")
    parser.add_argument("--workers", type=int, default=15)
    options = parser.parse_args()
    if options.compile:
        compile_share(*map(int, options.compile.split("/")))
    if options.cpu:
        for name in ("llama D64", "window 100"):
            shape = replace(SMALL[name], hidden=128, heads=4, kv_heads=2, inner=192, layers=1, vocabulary=256)
            for tokens in (1, 3):
                right(name, shape, tokens, torch.device("cpu"), False, 90, 2)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda:0")
    about = torch.cuda.get_device_properties(0)
    import triton

    say(
        about.name,
        "multiprocessors",
        about.multi_processor_count,
        "MiB",
        about.total_memory >> 20,
        "L2 MiB",
        about.L2_cache_size >> 20,
        "torch",
        torch.__version__,
        "triton",
        triton.__version__,
        "python",
        sys.version.split()[0],
    )
    rates = bandwidth(device)
    say(f"copy {rates[0] / 1e12:.3f} TB/s, read {rates[1] / 1e12:.3f} TB/s")
    torch.cuda.empty_cache()
    begin = time.monotonic()
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                os.path.abspath(__file__),
                "--compile",
                f"{i}/{options.workers}",
                *(["--speed"] if options.speed else []),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(options.workers)
    ]
    for worker in workers:
        words, _ = worker.communicate(timeout=150)
        if worker.returncode:
            say("compile:", words[-1500:])
    say(f"compiled {sum(1 for _ in jobs())} kernels in {time.monotonic() - begin:.1f} s")
    for name, shape in list(SMALL.items())[: 1 if options.speed else None]:
        for tokens, pdl in ((1, True), (1, False), (8, True), (8, False), (32, True)):
            if name == "llama D64" or (tokens, pdl) == (1, True) or ((tokens, pdl) == (32, True) and not options.quick):
                try:
                    right(name, shape, tokens, device, pdl)
                except Exception:
                    PDL[0] = PDL[0] and not pdl
                    say("FAILED", name, tokens, pdl, traceback.format_exc()[-900:])
    for what in (
        lambda: chain(device),
        lambda: alone(device),
        lambda: speed("1B", device, rates, options.limit),
        lambda: speed("8B", device, rates, options.limit),
    ):
        torch.cuda.empty_cache()
        try:
            what()
        except Exception:
            say("FAILED", traceback.format_exc()[-1500:])
    say(
        "memory in use, MiB",
        (about.total_memory - torch.cuda.mem_get_info()[0]) >> 20,
        "of torch",
        torch.cuda.memory_reserved() >> 20,
    )


if __name__ == "__main__":
    main()
