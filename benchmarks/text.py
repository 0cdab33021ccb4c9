"""How fast is text, and what does the cut cost? One question of QUESTIONS a run, all ready from the start, in turn.

SmolLM2-135M, 11 tokens in and 64 out for each stream unless the question says otherwise, greedy; tokens a second of whole
requests, the prompt too. `python benchmarks/text.py one-stream --rounds 5` prints a table and saves it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import report
from contestants import FOUR, NEW, ONE, PROMPT, TWO, Contestant, llama_cpp, llama_cpp_cut, ours, transformers

LONG = [PROMPT[i % len(PROMPT)] for i in range(2000)]
Makers = dict[str, Callable[[], Contestant]]
Pairs = list[tuple[str, str]]


def one_stream(folder: str) -> tuple[Makers, Pairs]:
    """One stream: ours in four actors (two threads each: one is busy at a time), transformers, llama.cpp."""
    return _against_others(folder, 1, 2)


def sixteen_streams(folder: str) -> tuple[Makers, Pairs]:
    """Sixteen streams: ours in four actors (one thread each), transformers' batch of 16, llama.cpp's 16 sequences."""
    return _against_others(folder, 16, 1)


def _against_others(folder: str, streams: int, threads: int) -> tuple[Makers, Pairs]:
    makers: Makers = {
        weights: partial(ours, folder, FOUR, streams, weights=weights, threads=threads)
        for weights in ("dtype", "int8", "stored")
    }
    makers |= {
        f"transformers, {count} threads": partial(transformers, count, streams)
        for count in (
            (1, 2) if streams == 1 else (2,)
        )  # one thread is never the faster for many, and takes a minute a turn
    }
    makers["llama.cpp, 2 threads"] = partial(llama_cpp, 2, streams)
    return makers, [
        *(("dtype", name) for name in makers if name.startswith("transformers")), ("stored", "llama.cpp, 2 threads"),
    ]  # fmt: skip


def cut_one_stream(folder: str) -> tuple[Makers, Pairs]:
    """The model cut in two, one stream: two actors against llama.cpp's two servers, the same file."""
    return _cuts(folder, 1)


def cut_sixteen_streams(folder: str) -> tuple[Makers, Pairs]:
    """The model cut in two, sixteen streams: two actors against llama.cpp's two servers, the same file."""
    return _cuts(folder, 16)


def _cuts(folder: str, streams: int) -> tuple[Makers, Pairs]:
    makers: Makers = {
        "two actors, stored": lambda: ours(folder, TWO, streams, weights="stored"),
        "two servers of llama.cpp": lambda: llama_cpp_cut(streams),
    }
    return makers, [("two actors, stored", "two servers of llama.cpp")]


def four_or_one(folder: str) -> tuple[Makers, Pairs]:
    """What the cut costs one stream: four actors against the same model as one, bfloat16, two threads each."""
    makers: Makers = {
        "four actors": lambda: ours(folder, FOUR, 1, threads=2),
        "one actor": lambda: ours(folder, ONE, 1, threads=2),
    }
    return makers, [("four actors", "one actor")]


def two_cores(folder: str) -> tuple[Makers, Pairs]:
    """What a second core brings: two stages with 16 streams against one stage on one core with 8, bfloat16."""
    makers: Makers = {
        "two stages, two cores, 16": lambda: ours(folder, TWO, 16),
        "two stages, two cores, 16, stored": lambda: ours(folder, TWO, 16, weights="stored"),
        "one stage, one core, 8, stored": lambda: ours(folder, ONE, 8, weights="stored", cores=[0]),
        "two stages, two cores, 16, int8": lambda: ours(folder, TWO, 16, weights="int8"),
        "one stage, one core, 8, int8": lambda: ours(folder, ONE, 8, weights="int8", cores=[0]),
        "one stage, one core, 8": lambda: ours(folder, ONE, 8, cores=[0]),
    }
    return makers, [("two stages, two cores, 16", "one stage, one core, 8")]


def split_or_threads(folder: str) -> tuple[Makers, Pairs]:
    """Sixteen streams over two cores: splits (stages, replicas) against one actor with two threads, bfloat16."""
    makers: Makers = {
        "two stages": lambda: ours(folder, TWO, 16),
        "four actors": lambda: ours(folder, FOUR, 16),
        "two replicas": lambda: ours(folder, {"model": {"kind": "model", "replicas": 2}}, 16),
        "one actor, two threads": lambda: ours(folder, ONE, 16, threads=2),
    }
    return makers, [(name, "one actor, two threads") for name in ("two stages", "four actors", "two replicas")]


def more_streams(folder: str) -> tuple[Makers, Pairs]:
    """1, 4, 16 and 64 streams through two stages, bfloat16."""
    makers: Makers = {f"{n} streams": partial(ours, folder, TWO, n) for n in (1, 4, 16, 64)}
    return makers, [("4 streams", "1 streams"), ("16 streams", "4 streams"), ("64 streams", "16 streams")]


def long_prompt(folder: str) -> tuple[Makers, Pairs]:
    """2,000 tokens in and one out: how many such first tokens a second, two stages against transformers, bfloat16."""
    makers: Makers = {
        "two stages": lambda: ours(folder, TWO, 1, prompt=LONG, new=1),
        "transformers, 2 threads": lambda: transformers(2, 1, LONG, 1),
    }
    return makers, [("two stages", "transformers, 2 threads")]


def tracing(folder: str) -> tuple[Makers, Pairs]:
    """Sixteen streams through four actors, with the trace of every message and without."""
    makers: Makers = {
        "trace on": lambda: ours(folder, FOUR, 16),
        "trace off": lambda: ours(folder, FOUR, 16, trace=False),
    }
    return makers, [("trace on", "trace off")]


QUESTIONS = {
    question.__name__.replace("_", "-"): question
    for question in (
        one_stream, sixteen_streams, cut_one_stream, cut_sixteen_streams, four_or_one, two_cores, split_or_threads,
        more_streams, long_prompt, tracing,
    )
}  # fmt: skip


def ask(name: str, rounds: int) -> None:
    """Let the contestants of one question take turns; print, and save to results/text-<name>.json."""
    question = QUESTIONS[name]
    contestants: dict[str, Contestant] = {}
    with tempfile.TemporaryDirectory(prefix="rv-") as folder:
        makers, pairs = question(folder)
        try:
            for each, make in makers.items():
                contestants[each] = make()
            figures = report.in_turn({each: made.measure for each, made in contestants.items()}, rounds)
        finally:
            for made in contestants.values():
                made.close()
    print(f"{name}: {question.__doc__}\n{rounds} rounds in turn, tokens/s: median (least to most)\n")
    for each, values in figures.items():
        print(f"  {each:28} {report.spread(values, 'tok/s')}")
    ratios = {f"{a} / {b}": round(statistics.median(report.ratios(figures, a, b)), 3) for a, b in pairs}
    print("\n" + "\n".join(f"  {pair}: {ratio:.2f}" for pair, ratio in ratios.items()))
    told = {
        "question": question.__doc__,
        "rounds": rounds,
        "new_tokens": NEW,
        "tokens_per_second": figures,
        "ratios": ratios,
    }
    print(f"\nsaved {report.save(f'text-{name}', told).name}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"all if none is given: {', '.join(QUESTIONS)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if wrong := set(options.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(wrong))}; there are {', '.join(QUESTIONS)}")
    for name in options.questions or QUESTIONS:
        ask(name, options.rounds)


if __name__ == "__main__":
    main()
