"""Measure how soon the first token comes after a prompt of 2,000: two stages against transformers and llama.cpp.

The weights are bfloat16. Each stage has fifteen layers, so that both have the same work with a prompt: the head computes only
on its last token. The stages have a process each, or share one with two threads, in which longer chunks pay. The peers have two
threads in one process. llama.cpp gets BF16, and F16, for which it has other kernels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from contestants import PROMPT, Makers, in_one_host, in_turn, ours
from peers import llama_cpp, openvino, transformers, transformers_forms
from report import Answer, Goal

LONG = [PROMPT[i % len(PROMPT)] for i in range(2000)]
HALVES = {"first": {"kind": "first_stage", "layers": "0-14"}, "last": {"kind": "last_stage", "layers": "15-29"}}


def has_amx() -> bool:
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


def ask(rounds: int) -> Answer:
    own: Makers = {
        **{
            f"two stages, {products}": partial(ours, HALVES, 1, prompt=LONG, new=1, products=products)
            for products in ("repeatable", "fast")
        },
        **{
            f"two stages in one process, {chunk} tokens at once": partial(
                ours, in_one_host(HALVES), 1, prompt=LONG, new=1, products="fast", threads=2, prefill_chunk=chunk
            )
            for chunk in (192, 512)
        },
    }
    peers: Makers = {
        **{
            name: partial(transformers, 2, 1, prompt=LONG, new=1, **form) for name, form in transformers_forms().items()
        },
        **{f"llama.cpp, {form}": partial(llama_cpp, form, 2, 1, prompt=LONG, new=1) for form in ("BF16", "F16")},
        "OpenVINO, bfloat16": partial(openvino, "bfloat16", 2, 1, prompt=LONG, new=1),
    }
    return Answer(
        "first tokens/s",
        in_turn({**own, **peers}, rounds),
        [
            Goal(list(own), [name for name in peers if not name.startswith("OpenVINO")], 1.2 if has_amx() else 1.3),
            Goal([name for name in own if "repeatable" not in name], "OpenVINO, bfloat16"),
            Goal("two stages, repeatable", "two stages, fast"),
        ],
    )
