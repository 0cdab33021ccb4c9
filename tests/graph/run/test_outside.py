"""Check what comes from outside a run: clients that leave together, a parent that is stopped or killed, a lost zygote.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from linux import only_linux

import ranvier
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.supervise import launcher
from ranvier.actors.supervise.zygote_protocol import NotStarted, Start
from ranvier.graph.file.errors import RequestError
from ranvier.graph.sessions import journal
from ranvier.transport.format.errors import LinkClosed

PROMPT = [1, 17, 40, 9, 300, 12, 77]
Four = Callable[..., ranvier.Graph]
Exact = Callable[[Sequence[int], int], list[int]]


async def tokens(
    run: ranvier.Run, count: int, prompt: Sequence[int] = PROMPT, at: Callable[[int], None] = lambda _: None
) -> list[int]:
    """Return the tokens of one stream, and call `at` with their number after each token."""
    ids: list[int] = []
    async for token in run.generate(list(prompt), max_tokens=count, stop_tokens=()):
        assert token.position == len(prompt) + len(ids), "a gap, or a repeat"
        ids.append(token.id)
        at(len(ids))
    return ids


# -- clients ------------------------------------------------------------------------------------------------------------


async def leave_by_closing(generations: list[ranvier.Generation], reading: trio.Nursery) -> None:
    """Close all generations, and stop reading."""
    for generation in generations:
        generation.close()
    reading.cancel_scope.cancel()


async def leave_by_cancelling(_: list[ranvier.Generation], reading: trio.Nursery) -> None:
    """Stop reading."""
    reading.cancel_scope.cancel()


async def leave_by_deadline(_: list[ranvier.Generation], __: trio.Nursery) -> None:
    """Do nothing, because all generations have the same deadline."""


WAYS: dict[str, Callable[[list[ranvier.Generation], trio.Nursery], Awaitable[None]]] = {
    "closing": leave_by_closing, "cancelling": leave_by_cancelling, "deadline": leave_by_deadline,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("clients", "rounds", "transport"),
    [
        (4, 6, "ipc"),
        *(
            pytest.param(clients, 50, transport, marks=pytest.mark.slow)
            for clients in (2, 3, 8, 16, 64)
            for transport in ("ipc", "tcp://127.0.0.1")
        ),
    ],
)
def test_clients_that_leave_together_case_53(
    clients: int, rounds: int, transport: str, way: str, four: Four, exact: Exact, runs: Path
) -> None:
    """Lose no actor when all clients leave in one moment, round after round.

    The caches are free again, and the next client gets exact tokens."""
    expected = exact(PROMPT, 4)

    async def main() -> None:
        async with ranvier.launch(four(transport=transport), runs=runs) as run:
            for _ in range(rounds):
                begun = trio.Event()

                async def read(generation: ranvier.Generation, begun: trio.Event = begun) -> None:
                    try:
                        async for token in generation:
                            if token.position == len(PROMPT) + 3:
                                begun.set()
                    except ranvier.Expired:
                        begun.set()

                deadline_s = 0.15 if way == "deadline" else None
                generations = [
                    run.generate([*PROMPT, index], max_tokens=400, stop_tokens=(), deadline_s=deadline_s)
                    for index in range(3, 3 + clients)
                ]
                with trio.fail_after(60):
                    async with trio.open_nursery() as nursery:
                        for generation in generations:
                            nursery.start_soon(read, generation)
                        await begun.wait()
                        await WAYS[way](generations, nursery)
                for generation in generations:
                    generation.close()
            assert await tokens(run, 4) == expected
            assert not run.recoveries
            assert not run._gateway.streams
            replicas = [replica for own in run._gateway.placement.replicas.values() for replica in own.values()]
            assert [(replica.sessions, replica.reserved_tokens) for replica in replicas] == [(0, 0)] * 4

    trio.run(main)


# -- the parent ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_parent_whose_loop_is_blocked_loses_no_host_case_54(four: Four, exact: Exact, runs: Path) -> None:
    """Lose no host when user code blocks for three times the deadline.

    The heartbeats of that time are read before any host is judged."""
    limits = {"heartbeat_interval_s": 0.1, "heartbeat_deadline_s": 1.5}
    expected = exact(PROMPT, 60)

    async def main() -> None:
        async with ranvier.launch(four(supervision=limits), runs=runs) as run:
            blocked: list[int] = []

            def block(there: int) -> None:
                if there == 5:
                    time.sleep(4.5)
                    blocked.append(there)

            assert await tokens(run, 60, at=block) == expected
            assert blocked
            await trio.sleep(1.5)  # a host that is judged late would be lost by now
            assert not run.recoveries

    trio.run(main)


PARENT = """
import json, os, signal, subprocess, sys, trio, ranvier
graph, folder, runs, count, kill_at, stop_s, settings = sys.argv[1:8]
graph = ranvier.load(graph, overrides={"model.source": folder, **json.loads(settings)})
async def main():
    async with ranvier.launch(graph, runs=runs) as run:
        made = run.generate([1, 17, 40, 9, 300, 12, 77], max_tokens=int(count), stop_tokens=())
        print(json.dumps([str(run.dir), made.request_id, list(run.pids.values())]), flush=True)
        if kill_at == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if float(stop_s):
            subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -STOP {os.getpid()}; sleep {stop_s}; kill -CONT {os.getpid()}"])
        async for token in made:
            print(json.dumps([token.position, token.id, token.durable]), flush=True)
            if token.position - 6 == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)
            if float(stop_s):
                await trio.sleep(0.02)
        await trio.sleep(1)
        print(json.dumps(len(run.recoveries)))
trio.run(main)
"""


def parent(graph: ranvier.Graph, folder: Path, runs: Path, count: int, **options: Any) -> list[Any]:
    """Return what a process prints that generates `count` tokens.

    It is killed at a token, or stopped for some seconds."""
    arguments = [options.get("kill_at", -1), options.get("stop_s", 0), json.dumps(options.get("settings", {}))]
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(graph.path), str(folder), str(runs), str(count), *map(str, arguments)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if options.get("kill_at") is None else -signal.SIGKILL), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stop_s", [5, 12])
def test_a_parent_that_is_stopped_loses_no_host_case_54(
    stop_s: int, four: Four, tiny: Any, exact: Exact, runs: Path
) -> None:
    """Lose no host when the parent is stopped for longer than every deadline during a stream."""
    limits = {"heartbeat_interval_s": 0.2, "heartbeat_deadline_s": 3.0, "join_deadline_s": 4.0}
    folder, _ = tiny("llama")
    _, *made, lost = parent(four(supervision=limits), folder, runs, 60, stop_s=stop_s)
    assert [token for _, token, _ in made] == exact(PROMPT, 60)
    assert lost == 0


@pytest.mark.parametrize("kill_at", [0, 4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 3, 5, 6, 7, 8))])
def test_a_request_outlives_the_process_that_holds_the_gateway_case_57(
    kill_at: int, four: Four, tiny: Any, exact: Exact, runs: Path
) -> None:
    """Continue a request in a new run after SIGKILL at any token, even before the first or after the last.

    The client gets all tokens after the position that it has seen, and none twice. A client that comes again is sent to
    the run that continues the request."""
    folder, _ = tiny("llama")
    graph = four(journal=True)
    expected = exact(PROMPT, 8)
    (where, request, hosts), *seen = parent(graph, folder, runs, 8, kill_at=kill_at)
    assert [token for _, token, _ in seen] == expected[:kill_at]
    assert all(durable for _, _, durable in seen)
    until_s = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in hosts) and time.monotonic() < until_s:
        time.sleep(0.01)

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs, resume=Path(where)) as run:
            assert list(run.resumed) == [request]
            after = seen[-1][0] if seen else None
            made = run.resume(request, after)
            got = [(token.position, token.id) async for token in made]
            assert [token for _, token in got] == expected[kill_at:]
            assert [position for position, _ in got] == list(range(len(PROMPT) + kill_at, len(PROMPT) + 8))
            assert made.result.finish_reason == "length"
            assert made.result.token_ids == expected
            with pytest.raises(RequestError, match="another client has resumed it"):
                run.resume(request)
            with pytest.raises(RequestError, match="expected a request of the resumed run"):
                run.resume("nobody's")
        with pytest.raises(RequestError, match="its requests were taken over by .*; resume that run"):
            async with ranvier.launch(graph, runs=runs, resume=Path(where)):
                pass

    trio.run(main)


def test_a_request_is_not_resumed_by_another_model_case_57(four: Four, tiny: Any, runs: Path, tmp_path: Path) -> None:
    """Refuse to resume with other weights or settings, by their hash.

    The attempt loses nothing."""
    folder, _ = tiny("llama")
    graph, own = four(journal=True), tmp_path / "own"
    shutil.copytree(folder, own)
    (where, _, _), *_ = parent(graph, own, runs, 8, kill_at=2)
    weights = own / "model.safetensors"
    data = weights.read_bytes()
    same = ranvier.load(graph.path, overrides={"model.source": str(own)})
    cut = ranvier.load(graph.path, overrides={"model.source": str(own), "prefill_chunk": "7"})

    async def refused(graph: ranvier.Graph, what: str) -> None:
        with pytest.raises(RequestError, match=f"are for another {what}: expected hash"):
            async with ranvier.launch(graph, runs=runs, resume=Path(where)):
                pass

    async def main() -> None:
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        await refused(same, "model")
        weights.write_bytes(data)
        await refused(cut, "graph")
        async with ranvier.launch(same, runs=runs, resume=Path(where)) as run:
            assert len(run.resumed) == 1

    trio.run(main)


def left_by_a_run(graph: ranvier.Graph, runs: Path, *lines: journal.Line) -> Path:
    """Return the folder of a run that is over, with these lines in its journal."""

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            return run.dir

    file = trio.run(main) / journal.FILE
    [began] = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(began + b"".join([msgspec.json.encode(line) + b"\n" for line in lines]))
    return file.parent


def asked(key: str, count: int) -> journal.Asked:
    """Return a journal line that requests `count` tokens."""
    info = SessionInfo(session=0, epoch=0, capacity=len(PROMPT) + count, log=tuple(PROMPT), max_tokens=count)
    return journal.of_request(key, info, (), 0.0)


def test_requests_that_there_is_no_room_for_at_once_go_on_case_57(four: Four, exact: Exact, runs: Path) -> None:
    """Continue requests that do not fit together one after the other, all exactly.

    Each of three needs more than half of every cache. Another request has ended before, and one fits nowhere."""
    graph = four(journal=True, actors={name: {"cache_tokens": 100} for name in ("blocks0", "blocks1")})
    keys = ("first", "second", "third")
    where = left_by_a_run(
        graph, runs, *[asked(key, 50) for key in keys], asked("over", 2), journal.Ended("over", "cancelled"), asked("huge", 400)
    )  # fmt: skip
    got: dict[str, list[int]] = {}

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs, resume=where) as run:

            async def read(key: str) -> None:
                got[key] = [token.id async for token in run.resume(key)]

            assert list(run.resumed) == [*keys, "over", "huge"]
            async with trio.open_nursery() as nursery:
                for key in keys:
                    nursery.start_soon(read, key)
            assert [token async for token in run.resume("over")] == []
            with pytest.raises(ranvier.RanvierError, match=r"407|room"):
                await run.resume("huge").__anext__()

    trio.run(main)
    assert got == dict.fromkeys(keys, exact(PROMPT, 50))


def test_a_request_that_waits_for_room_ends_with_its_run_case_57(four: Four, runs: Path) -> None:
    """End a request that waits for room with its run, and notify its reader."""
    graph = four(journal=True, actors={name: {"cache_tokens": 100} for name in ("blocks0", "blocks1")})
    where = left_by_a_run(graph, runs, asked("first", 60), asked("second", 60))

    async def read(generation: ranvier.Generation) -> None:
        with pytest.raises(LinkClosed, match="the run is over"):
            async for _ in generation:
                pass

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                async with ranvier.launch(graph, runs=runs, resume=where) as run:
                    nursery.start_soon(read, run.resume("second"))
                    await run.resume("first").__anext__()

    trio.run(main)


def test_a_journal_that_does_not_say_what_it_is_of_is_refused_case_57(four: Four, runs: Path) -> None:
    """Refuse a journal without its first line, or with an invalid request.

    The run stays as it is, even if the number of run folders is bounded."""
    graph = four(journal=True, runs={"newest": 1})
    where = left_by_a_run(graph, runs, asked("a", 5))
    file = where / journal.FILE

    async def refused(words: str) -> None:
        with pytest.raises(RequestError, match=words):
            async with ranvier.launch(graph, runs=runs, resume=where):
                pass

    good = file.read_bytes()
    file.write_bytes(good.replace(b'"log":[', b'"log":["x",', 1))
    trio.run(refused, "journal.jsonl:2: damaged: .*Expected `int`")
    file.write_bytes(good)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    trio.run(refused, "journal.jsonl:1: damaged: .*expected the run's hashes in the first line")


def test_the_code_beside_an_actor_is_of_the_model_case_57(tmp_path: Path) -> None:
    """Count the code beside an actor's file as part of the model, because the actor may import it."""
    refine = Path(__file__).resolve().parents[3] / "examples" / "refine"
    shutil.copytree(refine, tmp_path / "refine", ignore=shutil.ignore_patterns("ranvier-runs", "__pycache__"))
    plan = ranvier.plan(ranvier.load(tmp_path / "refine" / "refine.yaml", allow_code=True))
    before = journal.began(plan)
    assert journal.began(plan) == before
    (tmp_path / "refine" / "helper.py").write_text("STEPS = 3\n")
    assert journal.began(plan).model != before.model
    assert journal.began(plan).hash == before.hash


def test_on_a_full_disk_a_request_goes_on_and_says_that_it_is_not_durable_case_57(
    four: Four, exact: Exact, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continue a request while the journal cannot be written, and mark its tokens as not durable.

    The request is counted. What was missed is written later."""
    full = [False]
    really = os.pwrite

    def write(descriptor: int, data: bytes, at: int) -> int:
        if full[0]:
            raise OSError("no space left on device")
        return really(descriptor, data, at)

    async def main() -> Path:
        async with ranvier.launch(four(journal=True), runs=runs) as run:
            assert run._requests.journal is not None
            monkeypatch.setattr(run._requests.journal._file, "_write", write)
            durable = {}
            ids = []
            generation = run.generate(PROMPT, max_tokens=400, stop_tokens=())
            async for token in generation:
                full[0] = 5 <= len(ids) < 20
                durable[len(ids)] = token.durable
                ids.append(token.id)
                if len(ids) >= 30 and token.durable:  # after a failure the journal rests for some time
                    generation.close()
                    break
            assert ids == exact(PROMPT, len(ids))
            assert not all(durable.values())
            assert durable[0]
            assert token.durable
            assert run.counters["gateway.0"]["requests_not_durable"] == 1
            return run.dir

    from ranvier.graph.sessions import journal

    lines = (trio.run(main) / journal.FILE).read_bytes().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds[0] == "run"
    assert "end" in kinds


# -- the zygote ---------------------------------------------------------------------------------------------------------


def zygote_of(run: ranvier.Run) -> int:
    """Return the process id of the newest zygote."""
    made: Any = run._supervisor._launcher
    return int(made._zygotes[-1].process.process.pid)


@only_linux
def test_a_zygote_that_is_killed_is_replaced_case_55(four: Four, exact: Exact, runs: Path) -> None:
    """Replace a killed zygote without using up any actor's restarts.

    Its hosts die with it, twice, and each actor may be restarted only once."""
    expected = exact(PROMPT, 40)

    async def main() -> None:
        async with ranvier.launch(four(restart={"max": 1, "window_s": 60, "backoff_s": 0}), runs=runs) as run:
            for times in (1, 2):
                victim = zygote_of(run)

                def kill(there: int, victim: int = victim) -> None:
                    if there == 3:
                        os.kill(victim, signal.SIGKILL)

                with trio.fail_after(60):
                    assert await tokens(run, 40, at=kill) == expected
                    while len(run.recoveries) < 4 * times:
                        await trio.sleep(0.01)
                assert zygote_of(run) != victim
                assert run._supervisor._launcher.counters["zygotes_lost"] == times  # type: ignore[attr-defined]
                held = [path.resolve().name for path in Path("/proc/self/fd").iterdir()]
                assert len([name for name in held if "zygote.err" in name]) == 1, "nothing is held of one that is gone"

    trio.run(main)


@pytest.mark.slow
def test_a_zygote_that_is_stopped_with_a_host_case_55(
    four: Four, exact: Exact, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start a lost host from a new zygote if the old one is stopped, and keep the other hosts."""
    monkeypatch.setattr(launcher, "STARTED_DEADLINE_S", 2.0)
    expected = exact(PROMPT, 40)

    async def main() -> None:
        async with ranvier.launch(four(), runs=runs) as run:
            stopped, pids = zygote_of(run), dict(run.pids)

            def disturb(there: int) -> None:
                if there == 3:
                    os.kill(stopped, signal.SIGSTOP)
                    os.kill(pids["blocks0.0.1"], signal.SIGKILL)

            with trio.fail_after(60):
                assert await tokens(run, 40, at=disturb) == expected
                while not run.recoveries:
                    await trio.sleep(0.01)
            assert [gone.actor for gone in run.recoveries] == ["blocks0.0"]
            assert run._supervisor._launcher.counters["zygotes_stuck"] == 1  # type: ignore[attr-defined]
            assert all(Path(f"/proc/{pid}").exists() for key, pid in pids.items() if not key.startswith("blocks0"))
            os.kill(stopped, signal.SIGCONT)  # commands that it received before must have no effect
            assert await tokens(run, 40) == expected

    trio.run(main)


def test_a_zygote_that_cannot_fork_ends_with_one_typed_error_case_55(
    four: Four, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name the cause in the error, if no process can be started in place of a lost one.

    The error is raised once the restarts are used up."""

    async def main() -> None:
        async with ranvier.launch(four(restart={"max": 2, "window_s": 60, "backoff_s": 0}), runs=runs) as run:
            made: Any = run._supervisor._launcher
            monkeypatch.setattr(made, "_command", refusing(made))
            with (
                trio.fail_after(30),
                pytest.raises(ranvier.ActorFailed, match="its process cannot be started: no memory"),
            ):
                await tokens(run, 400, at=lambda there: there == 3 and os.kill(run.pids["head.0.1"], signal.SIGKILL))  # type: ignore[arg-type,return-value,func-returns-value]

    trio.run(main)


def refusing(made: Any) -> Callable[..., Awaitable[None]]:
    """Return a command that reports that there is no memory for a host."""

    async def command(zygote: Any, start: Start) -> None:
        made._on_event(zygote, NotStarted(start.specs[0].process, "its process cannot be started: no memory"))

    return command
