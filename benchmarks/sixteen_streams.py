"""Measure sixteen streams: our cuts against llama.cpp, transformers' batch of 16, OpenVINO and CTranslate2, on two cores.

The requests are those of one_stream.py, 16 at once. Ours are four actors, in one process with two threads or in four with one,
and two stages. llama.cpp decodes one token of all sequences per call, in one process or cut over two of its servers. OpenVINO
batches continuously, CTranslate2 as one batch. Each peer runs in its fastest form (peers.py).
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, TWO, Makers, in_one_host, in_turn, ours
from peers import ctranslate2, llama_cpp, llama_cpp_cut, openvino, transformers, transformers_forms
from report import Answer, Goal

STREAMS = 16
WEIGHTS = ("bfloat16", "int8", "stored")
CUTS = {"one process": (in_one_host(FOUR), 2), "four processes": (FOUR, 1), "two stages": (TWO, 1)}


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{f"{name}, {w}": partial(ours, cut, STREAMS, weights=w, threads=t)
           for w in WEIGHTS for name, (cut, t) in CUTS.items()},
        **{f"llama.cpp, {form}": partial(llama_cpp, form, 2, STREAMS) for form in ("Q4_1", "Q4_0", "Q8_0")},
        **{f"llama.cpp cut, {form}, {t} threads each": partial(llama_cpp_cut, form, STREAMS, t)
           for form in ("Q4_1", "Q4_0") for t in (1, 2)},
        **{name: partial(transformers, 2, STREAMS, **form) for name, form in transformers_forms().items()},
        **{f"OpenVINO, {form}": partial(openvino, form, 2, STREAMS) for form in ("bfloat16", "int8", "int4")},
        "CTranslate2, int8": partial(ctranslate2, 2, STREAMS),
    }  # fmt: skip

    def best(weights: str) -> list[str]:
        return [f"{name}, {weights}" for name in CUTS]

    llama = [name for name in makers if name.startswith("llama.cpp") and "Q4" in name]
    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [
            Goal(best("stored"), llama, 1.6),
            Goal(best("bfloat16"), list(transformers_forms()), 1.8),
            Goal(best("bfloat16"), "OpenVINO, bfloat16", 1.5),
            Goal(best("int8"), ["OpenVINO, int8", "CTranslate2, int8"], 1.5),
            Goal(best("stored"), "OpenVINO, int4", 1.5),
            Goal(best("int8"), "llama.cpp, Q8_0"),
        ],
    )
