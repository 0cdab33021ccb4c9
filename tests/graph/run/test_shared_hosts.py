"""Run several actors in one process (`host: NAME`): the same results, records and errors as in separate processes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.actors.errors import ActorFailed
from ranvier.graph.plan import show
from ranvier.graph.trace import summary

CUSTOM = Path(__file__).parents[1] / "custom"
PROMPT = [1, 17, 40, 9, 300, 12, 77]
ALL = ("embed", "blocks0", "blocks1", "head")
Four = Callable[..., ranvier.Graph]
Exact = Callable[..., list[int]]


def hosts(**of_actors: str) -> dict[str, dict[str, Any]]:
    """Return sections that put actors into hosts."""
    return {actor: {"host": host} for actor, host in of_actors.items()}


async def tokens(run: ranvier.Run, count: int, at: Callable[[int], None] = lambda _: None) -> list[int]:
    """Return the tokens of one stream. `at` is called with their number after each."""
    ids: list[int] = []
    async for token in run.generate(PROMPT, max_tokens=count, stop_tokens=()):
        ids.append(token.id)
        at(len(ids))
    return ids


CUTS = {
    "all in one": dict.fromkeys(ALL, "main"),
    "two and two": {"embed": "one", "blocks0": "one", "blocks1": "two", "head": "two"},
    "one alone": {"embed": "main", "blocks1": "main", "head": "main"},
    "crossed": {"embed": "one", "blocks0": "two", "blocks1": "one", "head": "two"},
    "single": {"blocks0": "main"},
}


@pytest.mark.parametrize(
    ("cut", "transport"),
    [
        ("all in one", "ipc"), ("two and two", "local"), ("crossed", "ipc"),
        *(pytest.param(cut, "tcp://127.0.0.1", marks=pytest.mark.slow) for cut in CUTS),
        *(pytest.param(cut, "local", marks=pytest.mark.slow) for cut in CUTS if cut != "two and two"),
        *(pytest.param(cut, "ipc", marks=pytest.mark.slow) for cut in ("two and two", "one alone", "single")),
    ],
)  # fmt: skip
def test_streams_are_exact_however_processes_are_shared(
    cut: str, transport: str, four: Four, exact: Exact, runs: Path
) -> None:
    """Give transformers' tokens to one stream and to eight, with a record of every message at both ends."""
    given = CUTS[cut]
    graph = four(actors=hosts(**given), transport=transport, prefill_chunk=3)

    async def main() -> Path:
        made: list[list[int]] = []
        async with ranvier.launch(graph, runs=runs) as run:
            pids = {name.partition(".")[0]: pid for name, pid in run.pids.items()}
            for one in ALL:
                for other in ALL:
                    together = one in given and given[one] == given.get(other)
                    assert (pids[one] == pids[other]) == (together or one == other)
            made.append(await tokens(run, 20))

            async def another() -> None:
                made.append(await tokens(run, 20))

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(another)
        assert made == [exact(PROMPT, 20)] * 9
        return run.dir

    read = summary.summary(summary.read(trio.run(main)))
    assert {edge["edge"]: edge["wire"] for edge in read["edges"]} == {
        edge.name: edge.wire for edge in ranvier.plan(graph).edges if "logits" not in edge.name and "log" not in edge.name
        and "scores" not in edge.name and "reads" not in edge.name
    }  # fmt: skip
    assert {row["actor"] for row in read["actors"]} >= {f"{actor}.0" for actor in ALL}


def test_a_whole_process_is_lost_and_replaced(four: Four, exact: Exact, runs: Path) -> None:
    """Kill a process of three actors twice: the stream stays exact, and only one actor's budget pays for each loss."""
    graph = four({"max": 2, "window_s": 60, "backoff_s": 0}, hosts(embed="main", blocks1="main", head="main"))

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            for times in (1, 2):

                def kill(there: int, victim: str = f"head.0.{times}") -> None:
                    if there == 5:
                        os.kill(run.pids[victim], signal.SIGKILL)

                assert await tokens(run, 60, at=kill) == exact(PROMPT, 60)
                with trio.fail_after(30):
                    while len(run.recoveries) < 3 * times:
                        await trio.sleep(0.01)
            assert sorted(each.actor for each in run.recoveries) == sorted(["embed.0", "blocks1.0", "head.0"] * 2)
            whys = [each.why for each in run.recoveries[:3]]
            assert sum("in the same process was lost" in why for why in whys) == 2
            assert all("signal 9" in why for why in whys)
            assert len({run.pids[f"{actor}.0.3"] for actor in ("embed", "blocks1", "head")}) == 1

    trio.run(main)


@pytest.mark.slow
def test_a_spare_process_takes_over(four: Four, exact: Exact, runs: Path) -> None:
    """Keep a copy of a whole process ready, with all its actors."""
    shared = {actor: {"host": "main", "spares": 1} for actor in ("blocks0", "blocks1")}
    graph = four(actors=shared)

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            with trio.fail_after(30):
                while run.pids.get("blocks0.1.1") is None:
                    await trio.sleep(0.01)
            assert run.pids["blocks0.1.1"] == run.pids["blocks1.1.1"]
            await trio.sleep(0.5)

            def kill(there: int) -> None:
                if there == 5:
                    os.kill(run.pids["blocks0.0.1"], signal.SIGKILL)

            assert await tokens(run, 60, at=kill) == exact(PROMPT, 60)
            with trio.fail_after(30):
                while len(run.recoveries) < 2:
                    await trio.sleep(0.01)
            assert {each.by for each in run.recoveries} == {"blocks0.1", "blocks1.1"}

    trio.run(main)


@pytest.fixture
def shared(graph_file: Callable[..., Path], tmp_path: Path) -> Callable[..., ranvier.Graph]:
    """Provide a function that returns a graph of two actors of faulty.py in one process; the second may fail."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def make(fault: str, **settings: Any) -> ranvier.Graph:
        path = graph_file(
            actors={
                "good": {"kind": "./faulty.py:Faulty", "host": "main"},
                "bad": {"kind": "./faulty.py:Faulty", "host": "main", "args": {"at_step": fault}},
            },
            edges=["gateway.x -> good.x", "good.y -> bad.x", "bad.y -> gateway.y"], **settings,
        )  # fmt: skip
        return ranvier.load(path, allow_code=True)

    return make


def test_an_error_ends_only_its_session(shared: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Name the actor that raised, and go on with all other sessions."""

    async def main() -> None:
        async with ranvier.launch(shared("raise"), runs=runs) as run:
            assert (await run.call(x=torch.tensor([1.0])))["y"].tolist() == [3.0]
            with pytest.raises(ActorFailed, match=r"bad\.0") as caught:
                await run.call(x=torch.tensor([12.0]))
            assert "Traceback" in (caught.value.remote_traceback or "")
            assert (await run.call(x=torch.tensor([2.0])))["y"].tolist() == [4.0]
            assert not run.recoveries

    trio.run(main)


@pytest.mark.slow
def test_a_step_that_hangs_takes_its_process_with_it(shared: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Replace all actors of a process when one of them hangs in a step."""
    graph = shared(
        "sleep", restart={"max": 9, "window_s": 60, "backoff_s": 0}, supervision={"progress_deadline_s": 1.0}
    )

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            with pytest.raises(ActorFailed, match=r"bad\.0.*in one step for"):
                await run.call(x=torch.tensor([12.0]))
            with trio.fail_after(30):
                while len(run.recoveries) < 2:
                    await trio.sleep(0.01)
            assert (await run.call(x=torch.tensor([2.0])))["y"].tolist() == [4.0]

    trio.run(main)


def test_memory_that_is_handed_over_belongs_to_its_message(
    graph_file: Callable[..., Path], tmp_path: Path, runs: Path
) -> None:
    """Let one actor reuse its buffer and another write into its input; a third, which gets the same tensor, sees neither."""
    shutil.copy(CUSTOM / "sharing.py", tmp_path / "sharing.py")
    path = graph_file(
        actors={
            name: {"kind": f"./sharing.py:{kind}", "host": "main"}
            for name, kind in {"giver": "Giver", "spoiler": "Spoiler", "adder": "Adder"}.items()
        },
        edges=["gateway.x -> giver.x", "giver.y -> spoiler.x", "giver.y -> adder.a", "spoiler.y -> adder.b",
               "adder.y -> gateway.y"],
    )  # fmt: skip
    graph = ranvier.load(path, allow_code=True)

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:

            async def one(value: float, count: int) -> None:
                x = torch.full((count, 64), value)
                assert torch.equal((await run.call(x=x))["y"], 2 * x + 1)

            async with trio.open_nursery() as nursery:
                for value in range(20):
                    nursery.start_soon(one, float(value), 1 + 97 * (value % 7))  # up to 150 kB

    trio.run(main)


def test_a_shared_process_ends_by_itself(four: Four, runs: Path) -> None:
    """End without waiting for acknowledgements that only the same thread could give: no host must be killed."""
    graph = four(actors=hosts(**dict.fromkeys(ALL, "main")), supervision={"stop_deadline_s": 5.0})

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            await tokens(run, 5)
            return run.dir

    log = (trio.run(main) / "logs" / "supervisor.jsonl").read_text()
    assert log.count('"exited"') == 4
    assert "killed" not in log


def test_show_marks_shared_processes(four: Four) -> None:
    plan = ranvier.plan(four(actors=hosts(embed="main", blocks0="main", blocks1="main")))
    text = show.text(plan)
    assert "2 processes" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith(("embed ", "head "))] == ["main", "-"]
    assert "subgraph main" in show.mermaid(plan)
    assert 'label="main"' in show.dot(plan)
    assert [edge.wire for edge in plan.edges[:4]] == ["memory", "memory", "ipc", "ipc"]


@pytest.mark.parametrize(
    ("actors", "message"),
    [
        ({"embed": {"host": "main", "threads": 2}, "head": {"host": "main"}},
         "actor head: threads belongs to the process 'main', which it shares: expected 2 as in embed, got the default"),
        ({"embed": {"host": "main"}, "head": {"host": "main", "spares": 1}}, "spares belongs to the process 'main'"),
        ({"embed": {"host": "main", "cpus": [0]}, "head": {"host": "main"}}, "cpus belongs to the process 'main'"),
        ({"embed": {"host": "main", "restart": "never"}, "head": {"host": "main"}}, "restart belongs to the process"),
        ({"embed": {"host": "main"}, "blocks0": {"host": "main", "replicas": 2}}, "its 2 replicas cannot share host 'main'"),
        ({"embed": {"host": "head"}}, "host 'head' has the name of an actor"),
    ],
)  # fmt: skip
def test_what_belongs_to_a_process_must_agree(actors: dict[str, Any], message: str, four: Four) -> None:
    with pytest.raises(ranvier.GraphError, match=message):
        four(actors=actors)


def test_a_shared_actor_cannot_be_scaled(four: Four, runs: Path) -> None:
    async def main() -> None:
        async with ranvier.launch(four(actors=hosts(embed="main", head="main")), runs=runs) as run:
            with pytest.raises(ranvier.RequestError, match="scale head: it shares the process 'main'"):
                await run.scale("head", 2)

    trio.run(main)
