"""Name the right culprit and the right reason with `ranvier why`, for real processes that are stuck."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from linux import only_linux

import ranvier
from ranvier.graph.observe.blame import Answer, AtGateway, Fact, Seen, explain
from ranvier.graph.observe.why import main_thread

CUSTOM = Path(__file__).parents[1] / "custom"
Graphs = Callable[..., ranvier.Graph]
PATIENT = {"heartbeat_deadline_s": 60.0, "progress_deadline_s": 60.0, "join_deadline_s": 60.0, "start_deadline_s": 60.0,
           "heartbeat_interval_s": 0.05}  # fmt: skip


@pytest.fixture
def graphs(graph_file: Callable[..., Path], tmp_path: Path) -> Graphs:
    """Provide a function that returns a graph of actors of faulty.py, with a supervisor that waits long before it acts."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def make(actors: Mapping[str, Any], edges: Sequence[Any], **settings: Any) -> ranvier.Graph:
        path = graph_file(actors=actors, edges=edges, supervision=PATIENT, **settings)
        return ranvier.load(path, allow_code=True)

    return make


def actor(kind: str, **args: Any) -> dict[str, Any]:
    """Return the section of an actor of faulty.py."""
    return {"kind": f"./faulty.py:{kind}", **({"args": args} if args else {})}


ROW = ["gateway.x -> good.x", "good.y -> bad.x", "bad.y -> gateway.y"]


def asked(
    graph: ranvier.Graph,
    runs: Path,
    x: Any,
    disturb: Callable[[ranvier.Run], None] = lambda _: None,
    calls: int = 1,
    apart_s: float = 0.05,
    reason: str = "",
) -> Answer:
    """Return a run's answer while calls hang, as soon as it blames an actor, or an actor for this `reason`."""
    found: list[Answer] = []

    async def call(run: ranvier.Run) -> None:
        await run.call(**x)

    async def main() -> None:
        with trio.fail_after(90):
            async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
                disturb(run)
                for _ in range(calls):
                    nursery.start_soon(call, run)
                    await trio.sleep(apart_s)  # otherwise they are sent as one batch
                # A wait that has just begun is not reported yet.
                while not any(reason in fact.reason for fact in (found[-1].culprits if found else ())):
                    with trio.fail_after(20):
                        found.append(await run.why())
                for pid in run.pids.values():  # a host that is stuck cannot stop itself
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                        os.kill(pid, signal.SIGKILL)
                nursery.cancel_scope.cancel()

    trio.run(main)
    return found[-1]


def thirteen() -> dict[str, Any]:
    """Return an input at which the second actor fails."""
    import torch

    return {"x": torch.tensor([12.0])}


@only_linux
@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        ("deadlock", "in a step", r"it has been in one step for \d\.\d s \(pid \d+\)"),
        ("hold the interpreter", "silent", r"it does not answer \(pid \d+\)"),
        pytest.param("stop", "stopped", r"it is stopped \(pid \d+\)", marks=pytest.mark.slow),
    ],
)
def test_an_actor_that_is_stuck(fault: str, reason: str, words: str, graphs: Graphs, runs: Path) -> None:
    """Blame an actor that waits for ever, a C call that holds the interpreter, or a stopped process."""
    import re

    graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty", at_step=fault)}, ROW, restart="never")
    answer = asked(graph, runs, thirteen())
    [culprit] = answer.culprits
    assert (culprit.who, culprit.reason) == ("bad.0", reason)
    assert re.match(words, culprit.words)
    if fault == "deadlock":
        assert any("with lock, lock:" in line for line in culprit.stack)
    elif fault == "hold the interpreter":  # it cannot answer, so py-spy reads its stack from outside
        assert culprit.stack[-1].startswith("go_wrong ("), culprit.stack
    assert str(answer).startswith("because of bad.0: ")


@only_linux
def test_a_stopped_actor_and_those_who_wait_for_it(graphs: Graphs, runs: Path) -> None:
    """Blame a stopped actor, and not its neighbour, which waits for credit."""
    graph = graphs(
        {"good": actor("Faulty"), "bad": actor("Faulty")},
        ["gateway.x -> good.x", {"from": "good.y", "to": "bad.x", "credits": 2}, "bad.y -> gateway.y"], restart="never",
    )  # fmt: skip

    def stop(run: ranvier.Run) -> None:
        os.kill(next(pid for key, pid in run.pids.items() if key.startswith("bad.")), signal.SIGSTOP)

    answer = asked(graph, runs, thirteen(), stop, calls=6)
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("bad.0", "stopped")]
    [waits] = [fact for fact in answer.waiting if fact.reason == "no credit" and fact.who == "good.0"]
    assert waits.waits_for == "bad.0"
    assert "credit of bad.0 (good.y -> bad.x: " in waits.words


@only_linux
def test_a_deadline_that_passes_says_who_was_to_blame(
    tiny: Any, graph_file: Callable[..., Path], split: Any, runs: Path
) -> None:
    """Put the culprit into the error of a request that is over its deadline.

    The run looks for the culprit before it gives the request up."""
    path = graph_file(model={"source": "unset", "dtype": "float32"}, supervision=PATIENT, **split(2, 6))
    graph = ranvier.load(path, overrides={"model.source": str(tiny("llama")[0])})
    last = list(graph.actors)[-1]

    async def main() -> None:
        with trio.fail_after(90):
            async with ranvier.launch(graph, runs=runs) as run:
                pid = next(pid for key, pid in run.pids.items() if key.startswith(f"{last}."))
                os.kill(pid, signal.SIGSTOP)
                said = rf"deadline exceeded, 0 of 9 tokens delivered\nbecause of {last}\.0: it is stopped \(pid {pid}\)"
                with pytest.raises(ranvier.Expired, match=said):
                    async for _ in run.generate([1, 2, 3], max_tokens=9, stop_tokens=(), deadline_s=2):
                        pass
                os.kill(pid, signal.SIGCONT)

    trio.run(main)


def test_an_actor_that_was_lost_and_is_not_back_yet(graphs: Graphs, runs: Path) -> None:
    """Blame an actor that was lost and is not replaced yet."""
    again = {"max": 3, "window_s": 60, "backoff_s": 20}
    graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty")}, ROW, restart=again)

    def kill(run: ranvier.Run) -> None:
        os.kill(next(pid for key, pid in run.pids.items() if key.startswith("bad.")), signal.SIGKILL)

    answer = asked(graph, runs, thirteen(), kill)
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("bad.0", "lost")]
    assert answer.culprits[0].words == "it was lost, and session 1 waits for its replacement"


def test_a_receiver_that_leaks_credit(graphs: Graphs, runs: Path) -> None:
    """Blame a receiver that handles messages and never returns their credit."""
    graph = graphs(
        {"good": actor("Faulty"), "bad": actor("Leaky")},
        ["gateway.x -> good.x", {"from": "good.y", "to": "bad.x", "credits": 2}, "bad.y -> gateway.y"], restart="never",
    )  # fmt: skip
    answer = asked(graph, runs, thirteen(), calls=6)
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("bad.0", "gives no credit")]
    words = "it gives good.0 no credit, and waits for nobody: it keeps the messages that it received"
    assert answer.culprits[0].words == words


@pytest.mark.parametrize(
    ("fault", "numbers"),
    [pytest.param("slow", {"latency_s": 0.4}, marks=pytest.mark.slow), ("throttled", {"bytes_per_s": 40_000})],
)
def test_a_link_that_is_slow_or_throttled(fault: str, numbers: Mapping[str, Any], graphs: Graphs, runs: Path) -> None:
    """Blame the edge, and not the actors at its ends, which are idle."""
    import torch

    graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty")}, ROW, transport="tcp://127.0.0.1")
    chaos = graph.path.parent / "chaos.yaml"
    chaos.write_text(json.dumps({"links": [{"from": "good", "to": "bad", **numbers}]}))

    async def main() -> Answer:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs, chaos=chaos) as run, trio.open_nursery() as nursery:
                await run.call(x=torch.tensor([1.0]))
                await trio.sleep(0.3)  # an actor that has just worked is not idle yet
                steps = run.status()["hosts"][0]["steps"]
                nursery.start_soon(functools.partial(run.call, x=torch.ones(1 if fault == "slow" else 20_000)))
                while run.status()["hosts"][0]["steps"] == steps:
                    await trio.sleep(0.01)  # until the first actor has sent it
                with trio.fail_after(20):
                    answer = await run.why()
                assert run.counters["chaos"]["delayed" if fault == "slow" else "throttled"]
                nursery.cancel_scope.cancel()
        return answer

    answer = trio.run(main)
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("good.y -> bad.x", "on the way")], str(answer)
    assert f"1 message ({4 if fault == 'slow' else 80_000} bytes) is on the way from good.0 to bad.0" in str(answer)


def test_a_replica_that_has_too_much_to_do(graphs: Graphs, runs: Path) -> None:
    """Blame a replica whose queue is much longer than that of the other."""
    graph = graphs(
        {"good": actor("Faulty"), "bad": {**actor("SlowReplica"), "replicas": 2, "policy": "round_robin", "batch_tokens": 1}},
        ROW, restart="never",
    )  # fmt: skip
    answer = asked(graph, runs, thirteen(), calls=24, apart_s=0.005, reason="overloaded")
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("bad.0", "overloaded")], str(answer)
    assert answer.culprits[0].words.endswith("in that of another replica")


def test_a_full_disk(graphs: Graphs, tmp_path: Path) -> None:
    """Continue to serve on a full disk, and name the disk.

    The run folder is on its own file system, which is filled during the run."""
    import torch

    disk = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system of one's own can be mounted here: {mounted.stderr}")
    try:
        graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty")}, ROW)

        async def main() -> Answer:
            with trio.fail_after(90):
                async with ranvier.launch(graph, runs=disk) as run:
                    with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
                        while fill.write(bytes(1 << 16)):
                            pass
                    assert (await run.call(x=torch.tensor([1.0])))["y"].tolist() == [3.0]
                    with trio.fail_after(20):
                        answer = await run.why()
                    (disk / "fill").unlink()
            return answer

        answer = trio.run(main)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()
    assert ("gateway", "disk full") in [(fact.who, fact.reason) for fact in answer.culprits]


def test_the_main_thread_of_a_dump() -> None:
    """Read the main thread's stack from what py-spy 0.4 prints."""
    dump = (
        'Process 7: python\nPython v3.11.7\n\nThread 8 (idle): "control"\n    run (c.py:1)\n\n'
        'Thread 7 (active): "MainThread"\n    go_wrong (faulty.py:150)\n    step (faulty.py:54)\n'
    )
    assert main_thread(dump, 7) == ["step (faulty.py:54)", "go_wrong (faulty.py:150)"]
    assert main_thread("Error: permission denied", 7) == []


def test_a_join_that_lacks_one_input(graphs: Graphs, runs: Path) -> None:
    """Blame the actor that sent nothing to a join, and name the session that waits there."""
    graph = graphs(
        {"one": actor("Faulty"), "two": actor("Faulty", at_step="say nothing"), "sum": actor("Sum")},
        ["gateway.x -> one.x", "gateway.x -> two.x", "one.y -> sum.a", "two.y -> sum.b", "sum.y -> gateway.y"],
        restart="never",
    )  # fmt: skip
    import torch

    answer = asked(graph, runs, {"x": torch.tensor([13.0])})
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("two.0", "sent nothing")]
    [waits] = [fact for fact in answer.waiting if fact.reason == "join"]
    assert (
        "sum.0 has waited" in waits.words
        and "for b of session 1, position 0, from two.0; it has received a" in waits.words
    )


def test_a_load_that_hangs_and_the_command(graphs: Graphs, runs: Path, tmp_path: Path) -> None:
    """Blame an actor that hangs while it loads, by the command, while the run is being launched."""
    graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty", at_load="sleep")}, ROW, restart="never")
    command = [sys.executable, "-m", "ranvier", "why"]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launch)
            with trio.fail_after(30):
                while not list(runs.glob("*/sockets/supervisor")):
                    await trio.sleep(0.05)
                [folder] = [path.parent.parent for path in runs.glob("*/sockets/supervisor")]
                while True:
                    done = await trio.run_process(
                        [*command, str(folder), "--json"], capture_stdout=True, capture_stderr=True, check=False
                    )
                    assert done.returncode == 0, done.stderr
                    told = json.loads(done.stdout)
                    if [each["who"] for each in told["culprits"]] == ["bad.0"] and "50%" in told["culprits"][0][
                        "words"
                    ]:
                        break  # the other actor has loaded meanwhile
                    await trio.sleep(0.2)
                done = await trio.run_process([*command, str(folder)], capture_stdout=True)
                assert b"because of bad.0: it is loading, 50% loaded after" in done.stdout
            nursery.cancel_scope.cancel()

    async def launch() -> None:
        async with ranvier.launch(graph, runs=runs):
            await trio.sleep_forever()

    trio.run(main)


def test_a_client_that_does_not_take_its_answers(
    tiny: Any, graph_file: Callable[..., Path], split: Any, runs: Path
) -> None:
    """Blame a client that does not read its answers."""
    folder, _ = tiny("llama")
    path = graph_file(model={"source": "unset", "dtype": "float32"}, **split(2, 6))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})

    async def main() -> Answer:
        with trio.fail_after(90):
            async with ranvier.launch(graph, runs=runs) as run:
                generation = run.generate([1, 2, 3], max_tokens=40, stop_tokens=())
                async for _ in generation:
                    await trio.sleep(1)  # all other tokens arrive meanwhile
                    return await run.why()
        raise AssertionError

    answer = trio.run(main)
    assert [(fact.who, fact.reason) for fact in answer.culprits] == [("client", "client")]
    assert "the client of session 1 does not take its answers" in answer.culprits[0].words


def test_nobody_asks(graphs: Graphs, runs: Path) -> None:
    """Report that there are no requests."""
    graph = graphs({"good": actor("Faulty"), "bad": actor("Faulty")}, ROW)

    async def main() -> Answer:
        with trio.fail_after(90):
            async with ranvier.launch(graph, runs=runs) as run:
                return await run.why()

    [culprit] = trio.run(main).culprits
    assert culprit.reason == "nobody asks"


# -- the decision alone -------------------------------------------------------------------------------------------------


def seen(label: str, **more: Any) -> Seen:
    """Return the observation of an actor that is idle, with these changes."""
    told = {
        "stepping_s": 0.0,
        "idle_s": 5.0,
        "steps": 3,
        "queued": 0,
        "credit": [],
        "unread": [],
        "joins": [],
        "stack": [],
    }
    told.update(more.pop("situation", {}))
    fields = {
        "pid": 7,
        "process": "S",
        "state": "running",
        "loaded": 1.0,
        "since_start_s": 9.0,
        "silent_s": 0.1,
        "lost": None,
    }
    return Seen(label, **{**fields, "situation": told, **more})


def test_who_gives_no_credit_and_waits_for_nobody_keeps_what_it_took() -> None:
    """Blame an actor that gives no credit and waits for no actor."""
    leak = explain(
        [seen("a.0", situation={"credit": [["a.y -> b.x", "b.0", 3, 2.5]]}), seen("b.0")],
        AtGateway([1]),
        {("b", "x"): ["a"]},
    )
    assert [(fact.who, fact.reason) for fact in leak.culprits] == [("b.0", "gives no credit")]
    assert "a.0 has waited 2.5 s for credit of b.0 (a.y -> b.x: 3 messages)" in str(leak)


def test_who_is_at_work_is_slow_and_no_leak() -> None:
    """Report an actor that is at work as slow, and not for the credit that it holds."""
    waits = seen("a.0", situation={"credit": [["a.y -> b.x", "b.0", 3, 0.5]]})
    works = {"steps": 5, "queued": 2}
    slow = explain([waits, seen("b.0", situation=works, before={"steps": 3})], AtGateway([1]), {})
    assert [(fact.who, fact.reason) for fact in slow.culprits] == [("b.0", "slow")]
    assert "it is at work, and a.0 waits for it: 2 steps between two reports, 2 messages in its queue" in str(slow)


def test_a_circle() -> None:
    """Report actors that wait for each other as a circle."""
    answer = explain(
        [seen("a.0", situation={"credit": [["a.y -> b.x", "b.0", 1, 2.0]]}),
         seen("b.0", situation={"credit": [["b.y -> a.x", "a.0", 1, 2.0]]})],
        AtGateway([1]), {},
    )  # fmt: skip
    assert answer.cycles == [["a.0", "b.0", "a.0"]]
    assert "a circle: a.0 waits for b.0 waits for a.0" in str(answer)


def test_a_link_that_is_slow_a_replica_with_too_much_and_a_full_disk() -> None:
    """Blame a slow link, an overloaded replica, a full disk and a lost actor.

    Messages that have just been sent are blamed on nothing."""
    unread = {"unread": [["a.y -> b.x", "b.0", 4, 96]]}
    slow = explain([seen("a.0", situation=unread, before=unread), seen("b.0")], AtGateway([1]), {})
    assert [(fact.who, fact.reason) for fact in slow.culprits] == [("a.y -> b.x", "on the way")]
    stuck = explain(
        [seen("a.0", situation={**unread, "stepping_s": 9.0}, before=unread), seen("b.0")], AtGateway([1]), {}
    )
    assert [(fact.who, fact.reason) for fact in stuck.culprits] == [("a.0", "in a step")], (
        "it has read no acknowledgement"
    )
    passing = explain([seen("a.0", situation=unread, before={}), seen("b.0")], AtGateway([1]), {})
    assert not passing.culprits
    many = explain([seen("a.0", situation={"queued": 9}), seen("a.1", situation={"queued": 1})], AtGateway([1]), {})
    assert [(fact.who, fact.reason) for fact in many.culprits] == [("a.0", "overloaded")]
    full = explain([seen("a.0")], AtGateway([1], disk_full=True), {})
    assert [fact.reason for fact in full.culprits] == ["disk full"]
    lost = explain([seen("a.0", lost="its process was ended by signal 9", situation={})], AtGateway([1]), {})
    assert lost.culprits == [Fact("a.0", "lost", "it was lost (its process was ended by signal 9), and is replaced")]
