"""Measure the time from the command to the first token: `ranvier run examples/smollm2.yaml` against transformers.

The figure is seconds from the start of the process to the first letters of the answer on its standard output. The files
are in the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from contestants import HERE, model_file
from report import Answer, Goal

LIMIT_S = 3.0
PROMPT = "Name three colours."

TRANSFORMERS = """
import pathlib, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
ids = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True, return_tensors="pt",
                                    return_dict=False)
print(tokenizer.decode(model.generate(ids, max_new_tokens=1, pad_token_id=2)[0, -1:]), flush=True)
"""


def until_output(command: list[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        took_s = time.perf_counter() - began
        process.stdout.read()
    if not first.strip():
        sys.exit(f"no output: {' '.join(command)[:200]}")
    return took_s


def ask(rounds: int) -> Answer:
    with tempfile.TemporaryDirectory(prefix="rv-") as runs:
        ours = [
            str(Path(sys.executable).with_name("ranvier")), "run", str(HERE.parent / "examples" / "smollm2.yaml"),
            "--prompt", PROMPT, "--max-tokens", "4", "--runs", runs,
        ]  # fmt: skip
        theirs = [sys.executable, "-c", TRANSFORMERS, str(model_file()), PROMPT]
        measures = {"ranvier": lambda: until_output(ours), "transformers": lambda: until_output(theirs)}
        for measure in measures.values():
            measure()  # brings the files into the page cache
        figures = report.in_turn(measures, rounds)
    slowest = max(figures["ranvier"])
    verdict = "holds" if slowest < LIMIT_S else "MISSED"
    return Answer(
        "seconds", figures, [Goal("ranvier", "transformers", less=True)],
        [f"the slowest of ours took {slowest:.2f} s, under {LIMIT_S:g}: {verdict}"],
    )  # fmt: skip
