"""Use up resources in real processes.

Requests that do not fit get typed errors, those that fit get exact tokens, and nothing grows. The case numbers are
those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import ranvier
from ranvier.graph.trace import summary

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "smollm2.yaml"
PROMPT = [1, 17, 40, 9, 300, 12, 77]
Make = Callable[..., ranvier.Graph]


@pytest.fixture
def two(
    tiny: Callable[..., tuple[Path, Any]], split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path]
) -> Make:
    """Provide a function that returns a graph of a small llama in two actors, which hold `cache_tokens` each."""
    folder, _ = tiny("llama")

    def make(cache_tokens: int = 65536, **settings: Any) -> ranvier.Graph:
        content = split(2, 6)
        for actor in content["actors"].values():
            actor["cache_tokens"] = cache_tokens
        path = graph_file(model={"source": "./set", "dtype": "float32"}, **content, **settings)
        return ranvier.load(path, overrides={"model.source": str(folder)})

    return make


async def tokens(run: ranvier.Run, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens of one stream."""
    return [token.id async for token in run.generate(list(prompt), max_tokens=count, stop_tokens=())]


def test_a_client_that_leaves_in_mid_stream_frees_every_cache_case_46(
    two: Make, exact: Callable[..., list[int]], runs: Path
) -> None:
    """Free every cache when a client leaves in mid-stream, ten times in a row.

    The next client needs all the room at every actor, and does not wait for a deadline."""

    async def main() -> None:
        async with ranvier.launch(two(cache_tokens=100), runs=runs) as run:
            for _ in range(10):
                generation = run.generate(PROMPT, max_tokens=90, stop_tokens=())
                async for token in generation:
                    if token.position == len(PROMPT) + 4:
                        break
                generation.close()
                with trio.fail_after(10):
                    async for token in run.generate(PROMPT[::-1], max_tokens=93, stop_tokens=()):
                        first = token.id
                        break
                assert [first] == exact(PROMPT[::-1], 1)
            assert await tokens(run, PROMPT, 93) == exact(PROMPT, 93)

    trio.run(main)


@pytest.mark.slow
def test_a_thousand_sessions_cases_47_48(two: Make, exact: Callable[..., list[int]], runs: Path) -> None:
    """Answer a thousand sessions at once exactly, or refuse them with an error that says what is free.

    The graph has room for two hundred. No session hangs, and those that run are not disturbed."""
    prompts = [[3 + (index * 31 + place * 7) % 300 for place in range(1 + index % 5)] for index in range(1000)]
    got: dict[int, list[int] | str] = {}

    async def main() -> None:
        async with ranvier.launch(two(cache_tokens=200 * 8), runs=runs) as run:

            async def one(index: int) -> None:
                try:
                    got[index] = await tokens(run, prompts[index], 8 - len(prompts[index]))
                except ranvier.Overloaded as error:
                    got[index] = str(error)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for index in range(1000):
                        nursery.start_soon(one, index)
            assert await tokens(run, PROMPT, 5) == exact(PROMPT, 5)

    trio.run(main)
    away = [index for index, outcome in got.items() if isinstance(outcome, str)]
    assert len(got) == 1000
    assert len(away) >= 500
    assert all("tokens of KV cache, 0 of 1600 are free at" in str(got[index]) for index in away)
    served = sorted(got.keys() - set(away))
    assert len(served) >= 200
    for index in served[:: max(1, len(served) // 60)]:
        assert got[index] == exact(prompts[index], 8 - len(prompts[index])), index


@pytest.mark.slow
def test_a_full_disk_under_the_trace_costs_records_alone_case_49(
    two: Make, exact: Callable[..., list[int]], runs: Path
) -> None:
    """Lose only trace records on a full disk, and count them.

    No file of the hosts may grow over 20 kB, and they continue to serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> Path:
        async with ranvier.launch(two(), runs=runs) as run:
            for pid in run.pids.values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, hard))
            assert await tokens(run, PROMPT, 300) == exact(PROMPT, 300)
            for pid in run.pids.values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
            assert await tokens(run, PROMPT, 10) == exact(PROMPT, 10)
            return run.dir

    read = summary.read(trio.run(main))
    assert min(read.dropped.values()) > 100
    assert set(read.dropped) == {"first.0", "last.0"}


@pytest.mark.slow
def test_descriptors_that_are_used_up_end_the_command_with_a_typed_error_case_51(runs: Path) -> None:
    """End the command with tokens or with a typed error, at every limit of descriptors from too few to enough."""
    command = [
        sys.executable, "-m", "ranvier", "run", str(EXAMPLE), "--prompt", "x", "-n", "2", "--runs", str(runs),
        "--json",
    ]  # fmt: skip
    outcomes = []
    for limit in (16, 24, 40, 60, 80, 100, 120, 140, 160, 300):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit)),
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        if done.returncode:
            assert "Too many open files" in done.stderr or "more descriptors" in done.stderr, (limit, done.stderr)
            assert "ranvier: " in done.stderr, (limit, done.stderr)
        outcomes.append(done.returncode)
    assert outcomes[0] == 1
    assert outcomes[-1] == 0


@pytest.mark.slow
def test_ten_thousand_connections_leave_nothing_behind_case_52(
    two: Make, exact: Callable[..., list[int]], runs: Path
) -> None:
    """Use no more descriptors and memory after ten thousand connections to an inbox over TCP."""

    async def main() -> None:
        async with ranvier.launch(two(transport="tcp://127.0.0.1"), runs=runs) as run:
            address = run._supervisor.supervision.hosts["first.0.1"].address
            assert address is not None
            port, pid = int(address.rpartition(":")[2]), run.pids["first.0.1"]

            def connect(times: int) -> None:
                for _ in range(times):
                    socket.create_connection(("127.0.0.1", port)).close()

            await trio.to_thread.run_sync(connect, 1000)
            await trio.sleep(1)
            descriptors, memory = len(os.listdir(f"/proc/{pid}/fd")), resident(pid)
            await trio.to_thread.run_sync(connect, 9000)
            with trio.fail_after(10):
                while len(os.listdir(f"/proc/{pid}/fd")) > descriptors:
                    await trio.sleep(0.05)
            assert resident(pid) - memory < 8 << 20
            assert await tokens(run, PROMPT, 5) == exact(PROMPT, 5)

    trio.run(main)


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_refused_request_does_not_spoil_the_outcome(two: Make, runs: Path) -> None:
    """Write the outcome of a run into its folder, even after a refused request."""

    async def main() -> Path:
        async with ranvier.launch(two(cache_tokens=10), runs=runs) as run:
            with pytest.raises(ranvier.RequestError, match="needs 100 tokens of KV cache, an actor holds 10"):
                await tokens(run, PROMPT, 93)
            return run.dir

    folder = trio.run(main)
    assert json.loads((folder / "run.json").read_text())["outcome"] == "done"


def test_a_request_over_its_deadline_ends_and_frees_what_it_held(
    two: Make, exact: Callable[..., list[int]], runs: Path
) -> None:
    """End a request at its deadline, and free what it held."""

    async def main() -> None:
        async with ranvier.launch(two(cache_tokens=500), runs=runs) as run:
            got: list[int] = []

            async def read() -> None:
                async for token in run.generate(PROMPT, max_tokens=480, stop_tokens=(), deadline_s=0.2):
                    got.append(token.id)

            with pytest.raises(ranvier.Expired, match=r"session 1: deadline exceeded, \d+ of 480 tokens delivered"):
                await read()
            assert got == exact(PROMPT, len(got))
            with pytest.raises(ranvier.RequestError, match="deadline_s: expected a finite number over 0, got -1"):
                run.generate(PROMPT, deadline_s=-1)
            ids = [token.id async for token in run.generate(PROMPT, max_tokens=20, stop_tokens=(), deadline_s=30)]
            assert ids == exact(PROMPT, 20), "one that is done in time is not touched"

    trio.run(main)
