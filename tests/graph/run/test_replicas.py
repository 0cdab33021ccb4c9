"""Run replicas in real processes: each policy, hedging, joining and leaving during sessions, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph.plan import show
from ranvier.graph.trace import summary, table


class Gate:
    """Hold a lock, at which actors of counting.py wait until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        self._file.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Provide a closed gate, which is opened after the test."""
    made = Gate(tmp_path / "gate")
    yield made
    made.open()


WriteGraph = Callable[..., ranvier.Graph]
Tiny = Callable[..., tuple[Path, Any]]


@pytest.fixture
def counting(graph_file: Callable[..., Path]) -> WriteGraph:
    """Provide `counting(**work)`, which returns a graph with one replicated actor of counting.py.

    With `front=True`, the actor is behind another one."""

    def write(front: bool = False, args: dict[str, Any] | None = None, **work: Any) -> ranvier.Graph:
        actors: dict[str, Any] = {"work": {"kind": "./counting.py:Counting", "args": args or {}, **work}}
        edges = ["gateway.x -> work.x", "work.y -> gateway.y"]
        if front:
            actors["front"] = {"kind": "./counting.py:Pass"}
            edges = ["gateway.x -> front.x", "front.x -> work.x", *edges[1:]]
        path = graph_file(actors=actors, edges=edges)
        shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)
        return ranvier.load(path, allow_code=True)

    return write


async def call(run: ranvier.Run, x: float) -> int:
    """Check the answer to a call, and return the replica that gave it."""
    [[answer, who]] = (await run.call(x=torch.tensor([x])))["y"].tolist()
    assert answer == x + 1
    return int(who)


async def calls(run: ranvier.Run, count: int) -> Counter[int]:
    """Count which replicas answer `count` calls, made one after the other."""
    return Counter([await call(run, float(number)) for number in range(count)])


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("policy", ["sticky", "round_robin", "least_queued", "lowest_latency"])
def test_calls_are_shared(policy: str, front: bool, counting: WriteGraph, runs: Path) -> None:
    """Use every replica, whether the gateway or an actor chooses, and take exact turns in round robin."""

    async def main() -> Counter[int]:
        graph = counting(front=front, replicas=3, policy=policy)
        async with ranvier.launch(graph, runs=runs) as run:
            return await calls(run, 30)

    answered = trio.run(main)
    assert set(answered) == {0, 1, 2}
    if policy in ("sticky", "round_robin"):
        assert answered == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("policy", ["least_queued", {"hedge": 2}, {"hedge": 2, "after": "p95"}])
@pytest.mark.parametrize("front", [False, True])
def test_one_that_stands_still_holds_nobody_up(
    policy: Any, front: bool, counting: WriteGraph, runs: Path, gate: Gate
) -> None:
    """Answer calls by the other replica while one is blocked.

    Replica 1 waits at a gate, and there is credit for fewer than the 25 calls. With `least_queued`, the one call that
    it holds is answered in the end. With hedging, its answers are dropped."""
    held = []

    async def main() -> Path:
        graph = counting(front=front, replicas=2, policy=policy, args={"gate": str(gate.path)})
        async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
            if policy == "least_queued":

                async def hold(x: float) -> None:
                    held.append(await call(run, x))

                for number in range(2):  # one of them goes to each replica
                    nursery.start_soon(hold, float(number))
                while len(held) < 1:
                    await trio.sleep(0.01)
            assert await calls(run, 25) == {0: 25}
            gate.open()
            return run.dir

    run_dir = trio.run(main)
    if policy == "least_queued":
        assert sorted(held) == [0, 1]
    steps = {actor["actor"]: actor["steps"] for actor in summary.summary(summary.read(run_dir))["actors"]}
    assert steps["work.0"] >= 25


@pytest.mark.parametrize("stuck", [0, 1])
def test_many_hedged_calls_at_once_while_one_stands_still(
    stuck: int, counting: WriteGraph, runs: Path, gate: Gate
) -> None:
    """Answer thirty calls over eight credits by the other replica, whichever one is blocked."""
    answered: Counter[int] = Counter()

    async def one(run: ranvier.Run, x: float) -> None:
        answered[await call(run, x)] += 1

    async def main() -> None:
        graph = counting(replicas=2, policy={"hedge": 2}, args={"gate": str(gate.path), "stuck": stuck})
        async with ranvier.launch(graph, runs=runs) as run:
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(one, run, float(number))
            gate.open()

    trio.run(main)
    assert answered == {1 - stuck: 30}


def test_losers_are_dropped_and_counted(counting: WriteGraph, runs: Path) -> None:
    """Take each step once, and count the copies that were not needed.

    Two hedged stages follow each other, so the second gets each step from both replicas of the first. The trace says
    how many messages went into no step."""

    async def main() -> tuple[Counter[int], Path]:
        graph = counting(front=True, replicas=2, policy={"hedge": 2})
        file = json.loads(Path(graph.path).read_text())
        file["actors"]["front"] |= {"replicas": 2, "policy": {"hedge": 2}}
        Path(graph.path).write_text(json.dumps(file))
        async with ranvier.launch(ranvier.load(graph.path, allow_code=True), runs=runs) as run:
            return await calls(run, 20), run.dir

    answered, run_dir = trio.run(main)
    assert answered.total() == 20
    told = summary.summary(summary.read(run_dir))
    [between] = [edge for edge in told["edges"] if edge["edge"] == "front.x -> work.x"]
    left_out = sum(told["counters"][f"front.{replica}"].get("copies_left_out", 0) for replica in (0, 1))
    # A replica that the machine delays gets fewer copies, or does not take the last ones before the run ends.
    assert between["messages"] + between["not_taken"] + left_out >= 40, "at least one of the front, and two copies"
    in_vain = 0
    for replica in (0, 1):
        # The second copy is late, or its session has closed.
        counted = told["counters"][f"work.{replica}"]
        in_vain += counted.get("rows_late", 0) + counted.get("rows_refused", 0)
    assert in_vain >= between["unused"] > 0
    assert f"front.x -> work.x: messages that went into no step: {between['unused']}" in table.of_summary(told)


def test_the_replica_that_answers_sooner_gets_more(counting: WriteGraph, runs: Path) -> None:
    """Send fewer calls to a replica that is always 50 ms late, with `lowest_latency`.

    In round robin it would get 30 of 60 calls."""

    async def main() -> Counter[int]:
        graph = counting(replicas=2, policy="lowest_latency", args={"late_every": 1})
        async with ranvier.launch(graph, runs=runs) as run:
            return await calls(run, 60)

    answered = trio.run(main)
    assert answered.total() == 60
    assert answered[1] < 10


def test_second_copies_go_out_only_for_those_that_are_late(counting: WriteGraph, runs: Path) -> None:
    """Send second copies only of calls that are late.

    The policy is `{hedge: 2, after: p95}`, and one replica is late in one step of ten. Some calls have a second copy,
    but by far not all."""

    async def main() -> tuple[Counter[int], int]:
        graph = counting(replicas=2, policy={"hedge": 2, "after": "p95"}, args={"late_every": 10})
        async with ranvier.launch(graph, runs=runs) as run:
            early = await calls(run, 40)  # until a percentile is known, every call has a copy
            before = run.counters["gateway.0"]["second_copies"]
            return early + await calls(run, 120), run.counters["gateway.0"]["second_copies"] - before

    answered, copies = trio.run(main)
    assert answered.total() == 160
    assert 0 < copies < 60


def greedy(model: Any, prompt: list[int], ids: list[int]) -> bool:
    """Return whether each token is the likeliest for transformers, given those before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return bool(logits.argmax(-1).tolist() == ids)


def model_graph(graph_file: Callable[..., Path], folder: Path, **actors: Any) -> ranvier.Graph:
    """Return a graph of a model in four actors, with these settings of its actors."""
    path = graph_file(
        model={"source": "./model", "dtype": "float32"},
        actors={
            "embed": {"kind": "embedding"},
            "lower": {"kind": "blocks", "layers": "0-2", **actors.get("lower", {})},
            "upper": {"kind": "blocks", "layers": "3-5", **actors.get("upper", {})},
            "head": {"kind": "head", **actors.get("head", {})},
        },
        pipeline=["embed", "lower", "upper", "head"],
        prefill_chunk=4,
    )
    if not (path.parent / "model").exists():
        shutil.copytree(folder, path.parent / "model")
    return ranvier.load(path)


PROMPTS = [[5 + 3 * n, 7, 11 + n, 13, 17, 19 + n, 23] for n in range(6)]


def test_a_language_model_in_replicas_is_exact(tiny: Tiny, graph_file: Callable[..., Path], runs: Path) -> None:
    """Give transformers' tokens in six streams at once, and use every replica.

    There are two lower, three hedged upper and two head replicas. Prompts are sent in chunks."""
    folder, model = tiny("replicas")
    graph = model_graph(
        graph_file, folder,
        lower={"replicas": 2}, upper={"replicas": 3, "policy": {"hedge": 2}}, head={"replicas": 2},
    )  # fmt: skip
    results: dict[int, list[int]] = {}

    async def stream(run: ranvier.Run, number: int) -> None:
        results[number] = [
            token.id async for token in run.generate(PROMPTS[number], max_tokens=20, stop_tokens=(), logits=number == 0)
        ]

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            async with trio.open_nursery() as nursery:
                for number in range(len(PROMPTS)):
                    nursery.start_soon(stream, run, number)
            return run.dir

    told = summary.summary(summary.read(trio.run(main)))
    for number, prompt in enumerate(PROMPTS):
        assert len(results[number]) == 20
        assert greedy(model, prompt, results[number])
    took_part = {actor["actor"] for actor in told["actors"] if actor["steps"] > 5}
    assert took_part >= {"lower.0", "lower.1", "upper.0", "upper.1", "upper.2", "head.0", "head.1"}
    assert all(edge["microseconds"]["serialise"]["p50"] is not None for edge in told["edges"])


def test_replicas_join_and_leave_while_streams_go_on(tiny: Tiny, graph_file: Callable[..., Path], runs: Path) -> None:
    """Let replicas join and leave during streams, which stay exact.

    A running stream stays where it is, and a new one may go to the new replica. A replica that leaves ends after its
    streams."""
    folder, model = tiny("replicas")
    graph = model_graph(graph_file, folder)
    results: dict[int, list[int]] = {}

    async def stream(run: ranvier.Run, number: int, tokens: int) -> None:
        ids = results.setdefault(number, [])
        async for token in run.generate(PROMPTS[number], max_tokens=tokens, stop_tokens=()):
            ids.append(token.id)

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
            nursery.start_soon(stream, run, 0, 200)
            while not results.get(0):
                await trio.sleep(0.01)
            assert await run.scale("lower", 2) == "lower has 2 replicas: lower.1 joined"
            assert await run.scale("head", 2) == "head has 2 replicas: head.1 joined"
            assert sorted(run.pids) == ["embed.0.1", "head.0.1", "head.1.1", "lower.0.1", "lower.1.1", "upper.0.1"]
            nursery.start_soon(stream, run, 1, 60)
            while not results.get(1):
                await trio.sleep(0.01)
            steps = run._supervisor.supervision.hosts["lower.1.1"]
            assert await run.scale("lower", 1) == "lower has 1 replica: lower.1 left"
            assert len(results[1]) == 60, "it left before its stream was over"
            assert steps.exited == 0
            assert await run.scale("lower", 2) == "lower has 2 replicas: lower.2 joined"
            await stream(run, 2, 10)
            await stream(run, 3, 10)

    trio.run(main)
    assert [len(results[number]) for number in range(4)] == [200, 60, 10, 10]
    for number, ids in results.items():
        assert greedy(model, PROMPTS[number], ids)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Ranvier to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ranvier", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.slow
def test_scale_is_a_command(counting: WriteGraph, runs: Path, tmp_path: Path) -> None:
    """Scale from another process, by the run's folder.

    An impossible change is refused, and the run continues."""
    graph = counting(args={"no_more_than": 2})

    async def scale(run: ranvier.Run, change: str) -> subprocess.CompletedProcess[str]:
        return await trio.to_thread.run_sync(command, "scale", str(run.dir), change)

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            done = await scale(run, "work=2")
            assert (done.returncode, done.stdout) == (0, "work has 2 replicas: work.1 joined\n"), done.stderr
            assert set(await calls(run, 4)) == {0, 1}
            for change, words in (
                ("wrk=2", "no actor 'wrk'; there are work"),
                ("work=0", "expected 1 to 64 replicas, got 0"),
                ("work=3", "work.2"),
                ("work", "expected ACTOR=N, such as upper=2"),
            ):
                done = await scale(run, change)
                assert done.returncode == 2
                assert words in done.stderr
            assert "no room for me" in (await scale(run, "work=3")).stderr
            assert set(await calls(run, 4)) == {0, 1}, "those that did not come changed something"
            done = await scale(run, "work=1")
            assert done.stdout == "work has 1 replica: work.1 left\n", done.stderr
            assert await calls(run, 4) == {0: 4}
            return run.dir

    run_dir = trio.run(main)
    over = command("scale", str(run_dir), "work=2")
    assert over.returncode == 2
    assert "this run is over" in over.stderr
    assert "no run folder" in command("scale", str(tmp_path), "work=2").stderr


def test_whoever_asked_may_go_away(counting: WriteGraph, runs: Path) -> None:
    """Complete a scaling whose caller has given up, so that the next one sees it.

    A scaling of a run that is lost fails with the reason of the loss."""
    graph = ranvier.load(counting(front=True).path, allow_code=True, overrides={"restart": "never"})

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            with trio.move_on_after(0.02) as given_up:
                await run.scale("work", 3)
            assert given_up.cancelled_caught
            assert (await run.scale("work", 3)).startswith("work has 3 replicas: ")
            assert run._gateway.placement.active("work") == [0, 1, 2]
            assert set(await calls(run, 6)) == {0, 1, 2}
            os.kill(run.pids["front.0.1"], signal.SIGKILL)
            with pytest.raises(ranvier.ActorFailed, match=r"front\.0: its process was ended by signal 9"):
                await run.scale("work", 4)

    trio.run(main)


def test_a_client_that_goes_away_or_talks_nonsense(counting: WriteGraph, runs: Path) -> None:
    """Continue the run if a client leaves before its answer, or sends an invalid question."""
    graph = counting()

    async def main() -> None:
        from ranvier.actors.protocol.control_protocol import Scale, Stop, encode
        from ranvier.transport.wires.zeromq import ask

        async with ranvier.launch(graph, runs=runs) as run:
            address = f"ipc://{run.dir}/sockets/supervisor"
            questions = [
                encode(Scale("work", 2)),
                encode({"kind": "scale", "actor": "work"}),
                encode(Stop(sent_ns=1)),
                b"\xc1 nonsense",
            ]
            for number, question in enumerate(questions):
                assert ask(f"client-{number}", address, question, 0.05) is None
            with trio.fail_after(20):
                while len(run._gateway.placement.active("work")) < 2:
                    await trio.sleep(0.01)
            assert set(await calls(run, 4)) == {0, 1}
            log = run.folder.logs / "supervisor.jsonl"
            with trio.fail_after(20):
                while log.read_text().count('"refused"') < 3:
                    await trio.sleep(0.01)

    trio.run(main)


def test_show_says_how_many(counting: WriteGraph) -> None:
    """Show the number of replicas and their policy."""
    planned = ranvier.plan(counting(replicas=3, policy={"hedge": 2, "after": "p90"}))
    assert "3 x hedge 2 after p90" in show.text(planned)
    assert "3 processes" in show.text(planned)
    assert "3 x hedge 2 after p90" in show.mermaid(planned)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(("join", "slow", "expected"), [("first", "ab", 103.0), ({"quorum": 2}, "a", 205.0)])
def test_the_fastest_branches_make_the_step(
    join: Any, slow: str, expected: float, front: bool, graph_file: Callable[..., Path], runs: Path, gate: Gate
) -> None:
    """Step with the answers of the fastest branches, and drop late ones.

    One or two of three branches are blocked, for more calls than they have credit. Once they continue, their late
    answers are dropped, and the next call takes the first answers that arrive."""
    branches = {
        name: {
            "kind": "./counting.py:Branch",
            "args": {"plus": plus, **({"gate": str(gate.path)} if name in slow else {})},
        }
        for name, plus in (("a", 1), ("b", 2), ("c", 3))
    }
    source = {"front": {"kind": "./counting.py:Spreader"}} if front else {}
    path = graph_file(
        actors={**source, **branches, "vote": {"kind": "./counting.py:Vote", "join": join}},
        edges=[
            *(["gateway.x -> front.x"] if front else []),
            *(f"{'front' if front else 'gateway'}.x -> {name}.x" for name in branches), *(f"{name}.y -> vote.{name}" for name in branches),
            "vote.y -> gateway.y", "vote.votes -> gateway.votes",
        ],
    )  # fmt: skip
    shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)
    needed = 1 if join == "first" else 2

    async def main() -> None:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            for _ in range(20):  # a slow branch has eight credits, and what waits is dropped with its session
                outputs = await run.call(x=torch.tensor([100.0]))
                assert outputs["y"].tolist() == [expected]
                assert outputs["votes"].tolist() == [needed]
            gate.open()
            for _ in range(20):
                outputs = await run.call(x=torch.tensor([100.0]))
                assert outputs["votes"].tolist() == [needed]
                assert 100 * needed < float(outputs["y"]) <= 100 * needed + 5

    trio.run(main)


def test_an_actor_of_ones_own_gets_something_once_a_session(
    graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """Give a custom actor an input once per session, even if it arrives later than the step that needs it.

    Twenty calls at once go through a loop of five rounds, and each adds its own number in every round."""
    path = graph_file(
        actors={
            "slow": {"kind": "./counting.py:Branch", "args": {"plus": 0}},
            "condition": {"kind": "./counting.py:Condition"},
        },
        edges=[
            "gateway.scale -> slow.x", "slow.y -> condition.scale", "gateway.x -> condition.x",
            {"from": "condition.x", "to": "condition.x", "feedback": True, "at_most": 5}, "condition.x -> gateway.x",
        ],
    )  # fmt: skip
    shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)
    answers: dict[int, list[float]] = {}

    async def one(run: ranvier.Run, number: int) -> None:
        outputs = await run.call(x=torch.tensor([1000.0]), scale=torch.tensor([float(number)]))
        answers[number] = outputs["x"].tolist()

    async def main() -> None:
        async with (
            ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run,
            trio.open_nursery() as nursery,
        ):
            for number in range(20):
                nursery.start_soon(one, run, number)

    trio.run(main)
    assert answers == {number: [1000.0 + 5 * number] for number in range(20)}


def test_a_loop_ends_when_its_actor_says_so(graph_file: Callable[..., Path], runs: Path, tmp_path: Path) -> None:
    """End a loop when its actor reports `done`, or after six rounds.

    Rows halve until they are under one, each in its own number of rounds. The client gets every port of the last round,
    and sees which row was never done."""
    path = graph_file(
        actors={"halve": {"kind": "./counting.py:Halve"}},
        edges=[
            "gateway.x -> halve.x", {"from": "halve.x", "to": "halve.x", "feedback": True, "until": "done", "at_most": 6},
            "halve.x -> gateway.x", "halve.done -> gateway.done", "halve.seen -> gateway.seen",
        ],
    )  # fmt: skip
    shutil.copy(Path(__file__).parents[1] / "custom" / "counting.py", path.parent)
    answers: dict[float, tuple[float, float, float]] = {}

    async def one(run: ranvier.Run, x: float) -> None:
        told = await run.call(x=torch.tensor([x]))
        answers[x] = float(told["x"]), float(told["done"]), float(told["seen"])

    async def main() -> Path:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            async with trio.open_nursery() as nursery:
                for x in (0.5, 3.0, 20.0, 64.0, 1024.0):
                    nursery.start_soon(one, run, x)
            return run.dir

    told = summary.summary(summary.read(trio.run(main)))
    assert answers == {
        0.5: (0.25, 1.0, 0.5), 3.0: (0.75, 1.0, 1.5), 20.0: (0.625, 1.0, 1.25),
        64.0: (1.0, 0.0, 2.0), 1024.0: (16.0, 0.0, 32.0),
    }  # fmt: skip
    rounds = {edge["edge"]: edge["messages"] for edge in told["edges"]}
    assert rounds["halve.x -> halve.x"] <= 0 + 1 + 4 + 5 + 5
