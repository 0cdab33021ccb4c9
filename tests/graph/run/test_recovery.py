"""Kill and stop actors in real processes: the tokens are those of a run without the fault.

"Exact" is what transformers gives for the same checkpoint in float32. The case numbers are those of the faults in
docs/reliability.md."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph.trace import summary

CUSTOM = Path(__file__).parents[1] / "custom"
PROMPT = [1, 17, 40, 9, 300, 12, 77]
MANY = {"max": 100, "window_s": 60, "backoff_s": 0}


def pid_of(run: ranvier.Run, actor: str) -> int:
    """Return the process id of the newest process of an actor."""
    return next(pid for name, pid in reversed(run.pids.items()) if name.startswith(f"{actor}."))


@asynccontextmanager
async def launched(graph: ranvier.Graph, runs: Path, seconds: float = 60) -> AsyncIterator[ranvier.Run]:
    """Launch a run that must end within `seconds`."""
    with trio.fail_after(seconds):
        async with ranvier.launch(graph, runs=runs) as run:
            yield run


LONG = 100
"""A number of tokens so large that a kill after the first ones comes before the last.

A client sees tokens later than they are made."""


async def tokens(
    run: ranvier.Run,
    count: int,
    prompt: Sequence[int] = PROMPT,
    at: Callable[[int], None] = lambda _: None,
    **options: Any,
) -> list[int]:
    """Return the tokens of one stream.

    `at` is called with their number after each token, and with 0 before the first."""
    ids: list[int] = []
    at(0)
    async for token in run.generate(list(prompt), max_tokens=count, stop_tokens=(), **options):
        assert token.position == len(prompt) + len(ids), "a gap, or a repeat"
        ids.append(token.id)
        at(len(ids))
    return ids


def test_a_middle_actor_is_killed_at_every_token_case_1(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Give exact tokens when a middle actor is killed, at whatever token."""
    count = 8

    async def main() -> Path:
        async with launched(four(), runs) as run:
            expected = exact(PROMPT, count)
            for kill_at in range(count):

                def kill(there: int, kill_at: int = kill_at) -> None:
                    if there == kill_at:
                        os.kill(pid_of(run, "blocks0"), signal.SIGKILL)

                assert await tokens(run, count, at=kill) == expected, f"killed at token {kill_at}"
                while len(run.recoveries) <= kill_at:  # the last tokens may arrive without a replay
                    await trio.sleep(0.01)
            assert [recovered.actor for recovered in run.recoveries] == ["blocks0.0"] * count
            assert all("signal 9" in recovered.why for recovered in run.recoveries)
            return run.dir

    folder = trio.run(main)
    assert '"lost"' in (folder / "logs" / "supervisor.jsonl").read_text()
    read = summary.read(folder)
    assert {"blocks0.0", f"blocks0.0.{count + 1}"} <= {path.stem for path in (folder / "trace").iterdir()}
    assert summary.summary(read)["edges"], "the trace can be read"


def test_an_actor_without_state_costs_one_step_not_a_prefill(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Repeat one step, and no prefill, when an actor without state is killed.

    The embedding and the head are killed at every token. The blocks continue with what they have."""
    count = 4

    async def main() -> Path:
        async with launched(four(), runs) as run:
            expected = exact(PROMPT, LONG)
            for victim in ("embed", "head"):
                for kill_at in range(1, count):

                    def kill(there: int, victim: str = victim, kill_at: int = kill_at) -> None:
                        if there == kill_at:
                            os.kill(pid_of(run, victim), signal.SIGKILL)

                    before = len(run.recoveries)
                    options = {"logits": True} if kill_at % 2 else {}
                    assert await tokens(run, LONG, at=kill, **options) == expected, (victim, kill_at)
                    while len(run.recoveries) <= before:
                        await trio.sleep(0.01)
            assert run.counters["gateway.0"].get("sessions_replayed", 0) == 0
            assert run.counters["gateway.0"]["sessions_resumed"] == 2 * (count - 1)
            return run.dir

    folder = trio.run(main)
    for record in summary.read(folder).done["blocks0.0"]:
        for session, epoch, position, size in record.rows:
            assert size == 1 or (position, size) == (0, len(PROMPT)), f"a prefill again: {session} in epoch {epoch}"


def test_a_session_that_cannot_go_on_where_it_was_is_replayed(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Replay a session that cannot continue from its position.

    The embedding is killed and, before it is replaced, a blocks actor. What was held is dropped for a replay."""

    async def main() -> None:
        async with launched(four(restart={**MANY, "backoff_s": 0.3}), runs) as run:

            def kill(there: int) -> None:
                if there == 3:
                    os.kill(pid_of(run, "embed"), signal.SIGKILL)

            async def second() -> None:
                while not any(stream.held for stream in run._gateway.streams.values()):
                    await trio.sleep(0.001)
                os.kill(pid_of(run, "blocks1"), signal.SIGKILL)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(second)
                assert await tokens(run, LONG, at=kill) == exact(PROMPT, LONG)
            assert {recovered.actor for recovered in run.recoveries} == {"embed.0", "blocks1.0"}
            assert run.counters["gateway.0"]["sessions_replayed"] == 1

    trio.run(main)


def test_killed_during_a_prefill_case_2(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Give exact tokens when an actor is killed during a prefill, and again during the replay.

    The prompt has 480 tokens in as many steps. The first kill comes after the first steps."""
    prompt = [3 + index * 7 % 300 for index in range(480)]
    slow = {"prefill_chunk": 1, "supervision": {"heartbeat_interval_s": 0.005}}

    async def main() -> None:
        async with launched(four(actors={"blocks1": {"batch_tokens": 1}}, **slow), runs) as run:

            async def kill() -> None:
                for _ in range(2):
                    victim = pid_of(run, "blocks1")
                    while steps(run, "blocks1") < 2:
                        assert not got, "all parts were through"
                        await trio.sleep(0.001)
                    killed_at.append(steps(run, "blocks1"))
                    os.kill(victim, signal.SIGKILL)
                    while pid_of(run, "blocks1") == victim:
                        await trio.sleep(0.001)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill)
                got.extend(await tokens(run, 4, prompt))
            assert got == exact(prompt, 4)
            await recovered(run, 2)
            assert max(killed_at) < 480, "all parts were through"

    killed_at: list[int] = []
    got: list[int] = []
    trio.run(main)


def steps(run: ranvier.Run, actor: str) -> int:
    """Return the number of steps of an actor so far."""
    host = run._supervisor.supervision.host(f"{actor}.0")
    return host.steps if host is not None else 0


async def recovered(run: ranvier.Run, times: int) -> None:
    """Wait until `times` lost hosts have been replaced."""
    while len(run.recoveries) < times:
        await trio.sleep(0.01)


def test_two_actors_are_killed_at_once_case_4(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Give exact tokens when any two of four actors are killed at once, with three streams running."""
    actors = ["embed", "blocks0", "blocks1", "head"]
    prompts = [PROMPT, PROMPT[::-1], PROMPT[2:]]

    async def main() -> None:
        async with launched(four(), runs) as run:
            got: dict[int, list[int]] = {}

            async def one(index: int, kill: Callable[[int], None]) -> None:
                got[index] = await tokens(run, 6, prompts[index], kill)

            pairs = [(a, b) for a in actors for b in actors if a < b]
            for pair in pairs:

                def kill(there: int, pair: tuple[str, str] = pair) -> None:
                    if there == 3:
                        for actor in pair:
                            os.kill(pid_of(run, actor), signal.SIGKILL)

                async with trio.open_nursery() as nursery:
                    for index in range(3):
                        nursery.start_soon(one, index, kill if index == 0 else lambda _: None)
                assert got == {index: exact(prompt, 6) for index, prompt in enumerate(prompts)}, pair
                await recovered(run, 2 * (pairs.index(pair) + 1))  # the streams may have ended before
            assert len(run.recoveries) == 12

    trio.run(main)


def test_stopped_past_the_deadline_is_fenced_and_replaced_case_5(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Kill a stopped process before it is replaced, so that it never sends anything late."""
    limits = {"heartbeat_interval_s": 0.1, "heartbeat_deadline_s": 3.0}

    async def main() -> None:
        async with launched(four(supervision=limits), runs) as run:
            victim = pid_of(run, "blocks0")
            assert await tokens(
                run, LONG, at=lambda there: os.kill(victim, signal.SIGSTOP) if there == 2 else None
            ) == exact(PROMPT, LONG)
            [recovered] = run.recoveries
            assert "no heartbeat for" in recovered.why
            with pytest.raises(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)

    trio.run(main)


def test_killed_while_it_is_being_replaced_case_10(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Give exact tokens when a replacement is killed, and when another actor is killed during a recovery.

    The replacement is killed as soon as it has a process, three times."""

    async def main() -> None:
        async with launched(four(), runs) as run:
            expected = exact(PROMPT, 24)

            async def kill_successors() -> None:
                for _ in range(3):
                    victim = pid_of(run, "blocks1")
                    while (newer := pid_of(run, "blocks1")) == victim:
                        await trio.sleep(0.001)
                    os.kill(newer, signal.SIGKILL)

            async def kill_another() -> None:
                victim = pid_of(run, "blocks1")
                while pid_of(run, "blocks1") == victim:
                    await trio.sleep(0.001)
                os.kill(pid_of(run, "head"), signal.SIGKILL)

            for disturb in (kill_successors, kill_another):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(disturb)
                    got = await tokens(
                        run,
                        24,
                        at=lambda there: os.kill(pid_of(run, "blocks1"), signal.SIGKILL) if there == 3 else None,
                    )
                assert got == expected
            while len(run.recoveries) < 3:  # a slow client may have had all its tokens before
                await trio.sleep(0.01)
            assert sorted(recovered.actor for recovered in run.recoveries) == ["blocks1.0", "blocks1.0", "head.0"]

    trio.run(main)


@pytest.mark.slow
def test_random_kills_under_load(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Give exact tokens in twelve streams, whose actors are killed at random.

    A seed gives the numbers of tokens at which streams begin and actors are killed. No actor is killed more than twice,
    because four losses in a row would end a stream that made no progress."""
    seed, count = int(os.environ.get("RANVIER_SEED", "5")), 40
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, 320) for _ in range(chance.randrange(1, 30))] for _ in range(12)]
    expected = [exact(prompt, count) for prompt in prompts]
    # The streams before it give that many tokens.
    begins = [chance.randrange(count * index // 2 + 1) for index in range(12)]
    kills = sorted(chance.sample(range(1, 11 * count), 5))
    victims = chance.sample(["embed", "blocks0", "blocks1", "head"] * 2, len(kills))

    async def main() -> None:
        async with launched(four(), runs, seconds=110) as run:
            got: dict[int, list[int]] = {}
            there = 0
            more = trio.Event()

            def another(of_stream: int) -> None:
                nonlocal there, more
                there += of_stream > 0
                while kills and there >= kills[0]:
                    del kills[0]
                    with contextlib.suppress(ProcessLookupError):  # it was killed just before
                        os.kill(pid_of(run, victims.pop()), signal.SIGKILL)
                more.set()
                more = trio.Event()

            async def one(index: int) -> None:
                while there < begins[index]:
                    await more.wait()
                got[index] = await tokens(run, count, prompts[index], another)

            async with trio.open_nursery() as nursery:
                for index in range(12):
                    nursery.start_soon(one, index)
            assert not victims
            await recovered(run, 1)
            for index in range(12):
                assert got[index] == expected[index], f"stream {index}, RANVIER_SEED={seed}"

    trio.run(main)


def test_sampling_logits_and_scores_go_on_as_they_would_have(four: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Give the same sampled tokens, logits and scores, with and without kills."""
    sampling = ranvier.Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=11)

    async def both(run: ranvier.Run, kill: bool) -> tuple[list[int], list[list[float]], list[float]]:
        def at(there: int) -> None:
            if kill and there == 3:
                os.kill(pid_of(run, "head"), signal.SIGKILL)

        ids = await tokens(run, LONG, at=at, sampling=sampling)
        logits = []
        async for token in run.generate(PROMPT, max_tokens=LONG, logits=True, stop_tokens=()):
            assert token.logits is not None
            logits.append(token.logits.tolist())
            if kill and len(logits) == 3:
                os.kill(pid_of(run, "blocks0"), signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            if kill:
                nursery.start_soon(trio.to_thread.run_sync, os.kill, pid_of(run, "embed"), signal.SIGKILL)
            scores = await run.score([5 + index % 200 for index in range(400)])
        return ids, logits, scores

    async def main() -> None:
        async with launched(four(), runs) as run:
            without, with_kills = await both(run, False), await both(run, True)
            assert without[0] == with_kills[0]
            torch.testing.assert_close(torch.tensor(without[1]), torch.tensor(with_kills[1]), atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.tensor(without[2]), torch.tensor(with_kills[2]), atol=1e-4, rtol=0)
            assert len(run.recoveries) >= 2

    trio.run(main)


def test_a_spare_takes_over_and_another_one_is_made(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Replace a killed actor by its spare, and start another spare."""

    async def main() -> None:
        async with launched(four(actors={"blocks0": {"spares": 1}}), runs) as run:
            for round_ in (1, 2):
                while not run._recovery._spares[("blocks0",)]:
                    await trio.sleep(0.01)
                victim = run.pids[f"blocks0.{round_ - 1}.1"]
                assert await tokens(
                    run, 6, at=lambda there, victim=victim: os.kill(victim, signal.SIGKILL) if there == 2 else None
                ) == exact(PROMPT, 6)
                await recovered(run, round_)
                assert run.recoveries[-1].by == f"blocks0.{round_}"

    trio.run(main)


@pytest.mark.slow
def test_a_replica_that_is_lost_leaves_its_sessions_to_another(
    four: Callable[..., ranvier.Graph], exact: Callable[..., list[int]], runs: Path
) -> None:
    """Move the sessions of a lost replica to another one, with every policy that a stream may have.

    The lost replica comes back and takes sessions again."""

    async def main() -> None:
        for policy in ("sticky", {"hedge": 2}):
            async with launched(four(actors={"blocks1": {"replicas": 2, "policy": policy}}), runs) as run:
                got: dict[int, list[int]] = {}

                async def one(index: int, run: ranvier.Run = run, got: Any = got) -> None:
                    def kill(there: int) -> None:
                        if index == 0 and there == 3:
                            os.kill(run.pids["blocks1.1.1"], signal.SIGKILL)

                    got[index] = await tokens(run, 8, PROMPT[index:], kill)

                async with trio.open_nursery() as nursery:
                    for index in range(4):
                        nursery.start_soon(one, index)
                assert got == {index: exact(PROMPT[index:], 8) for index in range(4)}, policy
                while not run.recoveries:
                    await trio.sleep(0.01)
                assert run.recoveries[0].by == "blocks1.1"
                assert await tokens(run, 8) == exact(PROMPT, 8)

    trio.run(main)


# -- custom actors ----------------------------------------------------------------------------------------------------


async def call(run: ranvier.Run, value: float) -> float:
    """Return the answer to one call."""
    return float((await run.call(x=torch.tensor([value])))["y"][0])


@pytest.mark.parametrize(
    "policy",
    [
        "round_robin",
        pytest.param("least_queued", marks=pytest.mark.slow),
        pytest.param("lowest_latency", marks=pytest.mark.slow),
        {"hedge": 2, "after": "p90"},
    ],
)
def test_a_replica_without_state_is_killed_under_load(
    policy: Any, graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """Answer every call once and correctly when a replica without state is killed under load."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = graph_file(
        actors={"good": {"kind": "./faulty.py:Faulty"},
                "many": {"kind": "./faulty.py:Faulty", "replicas": 2, "policy": policy}},
        edges=["gateway.x -> good.x", "good.y -> many.x", "many.y -> gateway.y"], restart=MANY,
    )  # fmt: skip

    async def main() -> None:
        async with launched(ranvier.load(path, allow_code=True), runs) as run:
            got: dict[int, float] = {}

            async def some(first: int) -> None:
                for value in range(first, 300, 6):
                    got[value] = await call(run, float(value + 100))
                    if value == 120:
                        os.kill(run.pids["many.0.1"], signal.SIGKILL)

            async with trio.open_nursery() as nursery:
                for first in range(6):
                    nursery.start_soon(some, first)
            assert got == {value: value + 102.0 for value in range(300)}
            while not run.recoveries:
                await trio.sleep(0.01)
            assert [await call(run, float(value)) for value in range(20, 30)] == [
                value + 2.0 for value in range(20, 30)
            ]

    trio.run(main)


def test_killed_after_the_compute_and_before_the_send_case_3(
    own: Callable[..., ranvier.Graph], runs: Path, tmp_path: Path
) -> None:
    """Count a step once that was computed but never sent, because the session's state is rebuilt."""
    gate = tmp_path / "died"

    async def main() -> None:
        async with launched(own(kind="DiesOnce", gate=str(gate)), runs) as run:
            assert await call(run, 1.0) == 1.0, "one step of the session, not two"
            assert gate.exists()
            [recovered] = run.recoveries
            assert recovered.actor == "bad.0"

    trio.run(main)


@pytest.mark.parametrize("spares", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_an_actor_has_saved_outlives_it(
    spares: int, graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """Restore what an actor has saved.

    It is killed after every second call. Its sum over all calls continues, and counts each call once."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = graph_file(
        actors={"sum": {"kind": "./faulty.py:Remembering", "spares": spares, "restart": {**MANY, "snapshot_s": 0}}},
        edges=["gateway.x -> sum.x", "sum.y -> gateway.y"],
    )  # fmt: skip

    async def main() -> Path:
        async with launched(ranvier.load(path, allow_code=True), runs) as run:
            expected = 0.0
            for number in range(1, 9):
                expected += number
                assert await call(run, float(number)) == expected
                if number % 2:
                    before = len(run.recoveries)
                    os.kill(pid_of(run, run.recoveries[-1].by if run.recoveries else "sum.0"), signal.SIGKILL)
                    while len(run.recoveries) == before:
                        await trio.sleep(0.01)
            return run.dir

    folder = trio.run(main)
    assert stat.S_IMODE((folder / "state").stat().st_mode) == 0o700


def test_a_snapshot_that_cannot_be_read_is_an_error_that_names_it(
    graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """Name the snapshot that cannot be read."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    restart = {"max": 2, "window_s": 60, "backoff_s": 0, "snapshot_s": 0}
    path = graph_file(
        actors={"sum": {"kind": "./faulty.py:Remembering", "restart": restart}},
        edges=["gateway.x -> sum.x", "sum.y -> gateway.y"],
    )

    async def main() -> None:
        async with launched(ranvier.load(path, allow_code=True), runs) as run:
            assert await call(run, 1.0) == 1.0
            os.kill(pid_of(run, "sum"), signal.SIGSTOP)  # so that it does not save once more
            (run.dir / "state" / "sum.0.safetensors").write_bytes(b"not what was saved")
            os.kill(pid_of(run, "sum"), signal.SIGKILL)
            await call(run, 2.0)

    with pytest.raises(ranvier.ActorFailed, match=r"sum\.0.*snapshot sum\.0\.safetensors"):
        trio.run(main)


def test_an_actor_that_dies_at_every_start_uses_up_its_budget_case_6(
    own: Callable[..., ranvier.Graph], runs: Path, tmp_path: Path
) -> None:
    """End the run when an actor dies at every restart that its budget allows."""
    gate = tmp_path / "loaded"
    restart = {"max": 3, "window_s": 60, "backoff_s": 0.05}

    async def main() -> None:
        async with launched(own(restart, kind="LoadsOnce", gate=str(gate)), runs) as run:
            os.kill(pid_of(run, "bad"), signal.SIGKILL)
            with pytest.raises(ranvier.ActorFailed) as caught:
                await call(run, 1.0)
            assert "RuntimeError while loading: loads only once; it was restarted 3 times within 60 s" in str(
                caught.value
            )
            assert "faulty.py" in caught.value.remote_traceback
            with pytest.raises(ranvier.ActorFailed):
                await call(run, 1.0)

    trio.run(main)
    assert len(gate.read_text()) == 1 + 3


def test_an_actor_that_dies_at_its_first_start_ends_the_run(own: Callable[..., ranvier.Graph], runs: Path) -> None:
    """End the run when an actor dies at its first start."""

    async def main() -> None:
        async with launched(own(at_load="kill"), runs):
            raise AssertionError("not reached")

    with pytest.raises(ranvier.ActorFailed, match=r"actor bad.0: its process was ended by signal 9 while"):
        trio.run(main)


def test_a_call_that_kills_its_actor_each_time_ends_and_the_run_goes_on(
    own: Callable[..., ranvier.Graph], runs: Path
) -> None:
    """End a call that kills its actor each time, and continue the run."""

    async def main() -> None:
        async with launched(own(at_step="kill"), runs) as run:
            assert await call(run, 1.0) == 3.0
            with pytest.raises(ranvier.ActorFailed, match="signal 9 while running; that happened 4 times in a row"):
                await call(run, 12.0)
            assert await call(run, 2.0) == 4.0

    trio.run(main)


def test_ten_times_slower_is_not_lost_case_8(own: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Keep an actor whose calls, all together, take longer than it may be silent.

    The senders wait for credit."""

    async def main() -> None:
        limits = {"heartbeat_interval_s": 0.1, "heartbeat_deadline_s": 3.0, "progress_deadline_s": 30.0}
        async with launched(own(kind="Slow", supervision=limits), runs) as run:
            got: dict[int, float] = {}

            async def one(value: int) -> None:
                got[value] = await call(run, float(value))

            async with trio.open_nursery() as nursery:
                for value in range(200):
                    nursery.start_soon(one, value)
            assert got == {value: value + 2.0 for value in range(200)}
            assert not run.recoveries
            assert run.counters["good.0"]["credit_waits"] > 0

    trio.run(main)


def test_a_run_that_ends_in_the_middle_of_a_recovery_leaves_nothing(
    own: Callable[..., ranvier.Graph], runs: Path
) -> None:
    """Leave nothing when a run ends in the middle of a recovery.

    The `runs` fixture checks it."""

    async def main() -> None:
        async with launched(own({"max": 5, "window_s": 60, "backoff_s": 30}), runs) as run:
            os.kill(pid_of(run, "bad"), signal.SIGKILL)
            with trio.move_on_after(0.3):
                await call(run, 1.0)

    trio.run(main)


def test_who_was_only_nearby_is_not_blamed_case_74(own: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Blame only the call that kills its actor in every step.

    Twelve other calls are open there and share its steps, and all of them get their answers."""

    async def main() -> None:
        async with launched(own(kind="SlowKilled"), runs, seconds=100) as run:
            got: dict[int, float] = {}
            guilty: list[str] = []

            async def innocent(index: int) -> None:
                for turn in range(3):
                    got[3 * index + turn] = await call(run, 100.0 * index + turn)

            async def kills() -> None:
                with pytest.raises(ranvier.ActorFailed) as caught:
                    await call(run, 12.0)
                guilty.append(str(caught.value))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kills)
                for index in range(12):
                    nursery.start_soon(innocent, index)
            assert got == {3 * index + turn: 100.0 * index + turn + 2 for index in range(12) for turn in range(3)}
            assert "that happened 4 times in a row" in guilty[0]
            assert len(run.recoveries) >= 3

    trio.run(main)
