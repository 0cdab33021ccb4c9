"""Go on with a request that changes and reads the model after the process that asked for it was lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import trio

import ranvier
from ranvier import ops
from ranvier.graph.sessions import journal

PROMPT, COUNT = [1, 17, 40, 9, 300, 12, 77], 10


def test_a_resumed_request_keeps_its_changes(four: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Take away the end and the last tokens from a journal, as a kill does, and get the same tokens and values again."""
    edits = [
        ops.clamp("hidden 2", torch.linspace(-1, 1, 48), most=0.5),
        ops.add("layer 4 heads", torch.ones(8), heads=2, at="answer"),
    ]
    graph = four(journal=True)

    async def asked(run: ranvier.Run) -> tuple[list[int], torch.Tensor]:
        generation = run.generate(PROMPT, max_tokens=COUNT, stop_tokens=(), edits=edits, reads=["hidden 5"])
        return [token.id async for token in generation], generation.reads["hidden 5"]

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            ids, reads = await asked(run)
            plain = [token.id async for token in run.generate(PROMPT, max_tokens=COUNT, stop_tokens=())]
            assert ids != plain
            file = run.dir / journal.FILE
            lines = [msgspec.json.decode(line) for line in file.read_bytes().splitlines()]
        [key] = {line["id"] for line in lines if line["kind"] == "request" and line["info"]["edits"]}
        kept = [line for line in lines if line["kind"] == "run" or line.get("id") == key]
        kept = [line for line in kept if line["kind"] != "end"][: 2 + 4]  # the run, the request, and four tokens
        file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in kept))
        async with ranvier.launch(graph, runs=runs, resume=file.parent) as run:
            generation = run.resume(key)
            assert [token.id async for token in generation] == ids
            torch.testing.assert_close(generation.reads["hidden 5"], reads, rtol=1e-4, atol=2e-5)

    trio.run(main)
