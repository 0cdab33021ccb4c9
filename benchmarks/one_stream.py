"""Measure one stream: four actors, in one process or in four, against llama.cpp, transformers, OpenVINO and CTranslate2.

The model is SmolLM2-135M, with 11 tokens in and 64 out, greedy. The figure is tokens per second of the whole request, and every
contestant has one thread or two on the same two cores: the better counts. Each peer runs in its fastest form (peers.py).
`stored` is the Q4_1 file as it is. llama.cpp also gets the file as Q4_0, which it repacks for its fastest products. Messages
between our processes go over ZeroMQ.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, Makers, in_one_host, in_turn, ours
from peers import ctranslate2, llama_cpp, openvino, transformers, transformers_forms
from report import Answer, Goal

THREADS = (1, 2)
WEIGHTS = ("bfloat16", "int8", "stored")


def ask(rounds: int) -> Answer:
    cuts = {"one process": in_one_host(FOUR), "four processes": FOUR}
    makers: Makers = {
        f"{name}, {w}, {t} threads": partial(ours, cut, 1, weights=w, threads=t)
        for w in WEIGHTS for name, cut in cuts.items() for t in THREADS
    } | {
        f"{name}, {t} threads": make
        for t in THREADS
        for name, make in {
            **{f"llama.cpp, {form}": partial(llama_cpp, form, t, 1) for form in ("Q4_1", "Q4_0", "Q8_0")},
            **{name: partial(transformers, t, 1, **form) for name, form in transformers_forms().items()},
            **{f"OpenVINO, {form}": partial(openvino, form, t, 1) for form in ("bfloat16", "int8", "int4")},
            "CTranslate2, int8": partial(ctranslate2, t, 1),
        }.items()
    }  # fmt: skip

    def either(*names: str) -> list[str]:
        return [f"{name}, {t} threads" for name in names for t in THREADS]

    llama = either("llama.cpp, Q4_1", "llama.cpp, Q4_0")
    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [
            Goal(either("one process, stored"), llama, 1.15),
            Goal(either("four processes, stored"), llama, 1.0),
            Goal(either("one process, bfloat16"), either(*transformers_forms()), 2.0),
            Goal(either("one process, bfloat16"), either("OpenVINO, bfloat16"), 1.5),
            Goal(either("one process, int8"), either("OpenVINO, int8", "CTranslate2, int8"), 1.5),
            Goal(either("one process, stored"), either("OpenVINO, int4"), 1.5),
            Goal(either("one process, int8"), either("llama.cpp, Q8_0")),
        ],
    )
