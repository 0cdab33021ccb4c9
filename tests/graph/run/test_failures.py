"""Check failures in real processes: the error names actor and reason, nothing else is affected, and nothing is left."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import zmq
from linux import only_linux

import ranvier
from ranvier.graph.trace import summary, table
from ranvier.transport.format.header import Header, Row

CUSTOM = Path(__file__).parents[1] / "custom"
Make = Callable[..., ranvier.Graph]


@pytest.fixture
def faulty(graph_file: Callable[..., Path], tmp_path: Path) -> Make:
    """Provide a function that returns a graph of two actors, of which the second fails as its arguments say."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def make(supervision: dict[str, float] | None = None, restart: Any = "never", **args: Any) -> ranvier.Graph:
        path = graph_file(
            actors={"good": {"kind": "./faulty.py:Faulty"}, "bad": {"kind": "./faulty.py:Faulty", "args": args}},
            edges=["gateway.x -> good.x", "good.y -> bad.x", "bad.y -> gateway.y"],
            supervision=supervision or {}, restart=restart,
        )  # fmt: skip
        return ranvier.load(path, allow_code=True)

    return make


async def call(run: ranvier.Run, value: float) -> float:
    """Return the answer to one call."""
    outputs = await run.call(x=torch.tensor([value]))
    return float(outputs["y"][0])


def start(graph: ranvier.Graph, runs: Path, *values: float) -> list[float | Exception]:
    """Return the answers or errors of calls that are made one after the other in one run."""
    answers: list[float | Exception] = []

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            for value in values:
                try:
                    answers.append(await call(run, value))
                except ranvier.RanvierError as error:
                    answers.append(error)

    with Deadline(60):
        trio.run(main)
    return answers


class Deadline:
    """Limit the time of a test by an alarm, so that a hang ends it."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._over)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    @staticmethod
    def _over(*_: object) -> None:
        raise TimeoutError("the run hung")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "actor bad.0: ValueError while LOADING: thirteen is not a number I like\n\nTraceback of bad.0:"),
        ("exit", "exit code 7 while LOADING\n\nTraceback of bad.0:\nlast words"),
        ("kill", "actor bad.0: its process was ended by signal 9 while LOADING"),
    ],
)
def test_an_actor_that_dies_while_loading(how: str, words: str, faulty: Make, runs: Path) -> None:
    """Name the actor that dies while it loads, and the reason."""
    with pytest.raises(ranvier.ActorFailed) as caught:
        start(faulty(at_load=how), runs)
    # A process that ends abruptly may not have reported that it was loading.
    assert words in str(caught.value).replace("while starting", "while LOADING").replace(
        "while loading", "while LOADING"
    )
    assert caught.value.actor == "bad.0"
    if how == "raise":
        assert "faulty.py" in caught.value.remote_traceback


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow) for how in ("sleep", "hold the interpreter")]
)
def test_an_actor_that_never_finishes_loading(how: str, faulty: Make, runs: Path) -> None:
    """End the run at the deadline for starting.

    A host that holds its interpreter is killed like any other."""
    with pytest.raises(
        ranvier.ActorFailed, match=r"actor bad.0: not running .* after its start .* still (starting|loading)"
    ):
        start(faulty({"start_deadline_s": 10.0}, at_load=how), runs)


def test_an_error_in_a_step_ends_that_session_alone_case_7(faulty: Make, runs: Path) -> None:
    """End only the session whose step raises, with the traceback (case 7).

    Sessions before and after it get their answers."""
    answers = start(faulty(at_step="raise"), runs, 1.0, 13.0 - 1.0, 5.0)
    assert answers[0] == 3.0
    assert answers[2] == 7.0
    error = answers[1]
    assert isinstance(error, ranvier.ActorFailed)
    assert error.actor == "bad.0"
    assert error.session == 2
    assert "session 2, epoch 1, position 0: ValueError: thirteen is not a number I like" in str(error)
    assert "in step" in error.remote_traceback


def test_a_failing_session_in_a_batch_leaves_the_others(faulty: Make, runs: Path) -> None:
    """Give each of many sessions at once its own outcome, if some of them fail."""
    answers: dict[int, float | str] = {}

    async def one(run: ranvier.Run, key: int, value: float) -> None:
        try:
            answers[key] = await call(run, value)
        except ranvier.ActorFailed as error:
            answers[key] = error.actor

    async def main() -> None:
        async with ranvier.launch(faulty(at_step="raise"), runs=runs) as run, trio.open_nursery() as nursery:
            for key in range(30):
                nursery.start_soon(one, run, key, 12.0 if key % 7 == 3 else float(key + 20))

    trio.run(main)
    assert answers == {key: "bad.0" if key % 7 == 3 else key + 22.0 for key in range(30)}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "wrong shape",
            r"edge bad.y -> gateway.y: expected float32\[tokens\] with tokens=1, rows=1, got float32\[1, 1\]",
        ),
        pytest.param("wrong port", "step returned the port 'z'; the actor's outputs are y", marks=pytest.mark.slow),
        pytest.param(
            "no tensor", "step returned int for the port 'y', expected a torch.Tensor", marks=pytest.mark.slow
        ),
    ],
)
def test_outputs_that_do_not_fit(how: str, words: str, faulty: Make, runs: Path) -> None:
    """Fail the call whose output does not fit, and answer the next."""
    error, after = start(faulty(at_step=how), runs, 12.0, 1.0)
    with pytest.raises(ranvier.ActorFailed, match=words):
        raise error if isinstance(error, Exception) else AssertionError(error)
    assert after == 3.0


def test_a_session_that_an_actor_refuses_to_open(faulty: Make, runs: Path) -> None:
    """Report the error of an actor that refuses to open a session."""
    [error] = start(faulty(at_step="raise at open"), runs, 1.0)
    assert isinstance(error, ranvier.ActorFailed)
    assert "RuntimeError: refuses to open" in str(error)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "actor bad.0: its process was ended by signal 9 while running"),
        pytest.param("exit", "actor bad.0: its process ended with exit code 7 while running", marks=pytest.mark.slow),
        ("stop", r"actor bad.0: no heartbeat for \d"),
        pytest.param("hold the interpreter", r"actor bad.0: no heartbeat for \d", marks=pytest.mark.slow),
        ("sleep", r"actor bad.0: in one step for \d"),
    ],
)
def test_an_actor_that_is_lost_ends_a_run_that_restarts_none(how: str, words: str, faulty: Make, runs: Path) -> None:
    """Name the lost actor in the error of the current call and of later ones.

    The actor is killed, exits, is stopped, or is stuck, and the run restarts none."""
    limits = {"heartbeat_interval_s": 0.1, "heartbeat_deadline_s": 3.0, "progress_deadline_s": 2.0}
    if how in ("stop", "hold the interpreter"):
        limits["progress_deadline_s"] = 100.0
    before, error, after = start(faulty(limits, at_step=how), runs, 1.0, 12.0, 1.0)
    assert before == 3.0
    for each in (error, after):
        with pytest.raises(ranvier.ActorFailed, match=words):
            raise each if isinstance(each, Exception) else AssertionError(each)


def test_strangers_and_rubbish_are_refused_and_the_host_goes_on_case_41(faulty: Make, runs: Path) -> None:
    """Refuse and log invalid messages, and answer the next call (case 41).

    They are a pickle, random bytes, a wrong version, an unknown edge and too many frames. They come from an unknown
    name, and from a name that is no text."""
    canary = runs / "canary"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {canary}",))

    rubbish = [
        [pickle.dumps(Touch())],
        [b"\xff" * 100],
        [b"x" * 70_000],
        [Header(1, 0, 1, 1, (Row(1, 1, 0, 1),), (), 0, 0, 0).encode(), pickle.dumps(Touch())],
        [Header(1, 0, 99, 1, (), (), 0, 0, 0).encode()],
        [b"\x99" + Header(1, 0, 1, 1, (), (), 0, 0, 0).encode()[1:]],
        [b"", b"", b""],
        [Header(1, 0, 1, 1, (), (), 0, 0, 0).encode(), *[b"x"] * 500],
    ]

    async def main() -> None:
        async with ranvier.launch(faulty(), runs=runs) as run:
            assert await call(run, 1.0) == 3.0
            context: zmq.Context[Any] = zmq.Context()
            for name in (b"stranger.0.1", b"\xff\xfe"):
                socket = context.socket(zmq.DEALER)
                socket.setsockopt(zmq.IDENTITY, name)
                socket.connect(f"ipc://{run.folder.sockets}/bad.0")
                for frames in 5 * rubbish:
                    socket.send_multipart(frames)
                socket.close(linger=500)
            context.term()
            log = run.dir / "logs" / "supervisor.jsonl"
            with trio.fail_after(40):  # the first ten per second are logged, all are counted
                while run.counters.get("bad.0", {}).get("refused", 0) < 10 * len(rubbish):
                    assert await call(run, 2.0) == 4.0
            assert 10 <= log.read_text().count('"refused"') < 10 * len(rubbish)
            assert await call(run, 3.0) == 5.0

    trio.run(main)
    assert not canary.exists()


def test_killing_the_supervisor_leaves_no_process_case_9(faulty: Make, runs: Path, tmp_path: Path) -> None:
    """Leave no process and no socket after SIGKILL of the process that runs the graph (case 9).

    A host that holds its interpreter ends, too. The `runs` fixture checks it."""
    graph = faulty(at_step="hold the interpreter")
    script = tmp_path / "victim.py"
    script.write_text(
        textwrap.dedent(f"""
            import torch, trio, ranvier
            graph = ranvier.load({str(graph.path)!r}, allow_code=True)
            async def main():
                async with ranvier.launch(graph, runs={str(runs)!r}) as run:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(lambda: run.call(x=torch.tensor([12.0])))
                        await trio.sleep(0.5)
                        print("ready", flush=True)
                        await trio.sleep(60)
            trio.run(main)
        """)
    )
    victim = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    victim.kill()
    victim.wait()
    victim.stdout.close()


def test_a_join_waits_for_both_inputs(graph_file: Callable[..., Path], runs: Path, tmp_path: Path) -> None:
    """Compute (x + 1) + x over three processes, with a join of both inputs."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = graph_file(
        actors={"one": {"kind": "./faulty.py:Faulty"}, "sum": {"kind": "./faulty.py:Sum"}},
        edges=["gateway.x -> one.x", "one.y -> sum.a", "gateway.x -> sum.b", "sum.y -> gateway.y"],
    )
    assert start(ranvier.load(path, allow_code=True), runs, 1.0, 5.0) == [3.0, 11.0]


def test_a_join_that_never_completes_names_what_is_missing(
    graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """End a call whose join lacks an input, and name that input.

    One branch sends nothing for 13, and the other calls keep the host busy."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = graph_file(
        actors={"mute": {"kind": "./faulty.py:Faulty", "batch_tokens": 1, "args": {"at_step": "say nothing"}},
                "sum": {"kind": "./faulty.py:Sum"}},
        edges=["gateway.x -> mute.x", "mute.y -> sum.a", "gateway.x -> sum.b", "sum.y -> gateway.y"],
        supervision={"join_deadline_s": 2},
    )  # fmt: skip
    errors: list[ranvier.ActorFailed] = []
    answers: list[float] = []

    async def lose(run: ranvier.Run) -> None:
        try:
            await call(run, 13.0)
        except ranvier.ActorFailed as error:
            errors.append(error)

    async def main() -> None:
        async with (
            ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(lose, run)
            while not errors or len(answers) < 2:  # the host is never idle meanwhile
                answers.append(await call(run, 1.0))

    with Deadline(60):
        trio.run(main)
    [lost] = errors
    assert set(answers) == {3.0}
    assert lost.actor == "sum.0"
    assert "epoch 1, position 0: JoinTimeout: the join waited over 2 s" in str(lost)
    assert "expected a, got only b" in str(lost)


@pytest.mark.parametrize("how", ["leaves all out", pytest.param("leaves one of two out", marks=pytest.mark.slow)])
def test_an_output_that_never_comes_ends_the_call(
    how: str, faulty: Make, graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """End a call whose output was left out, and name that output, once every actor is idle."""
    limits = {"join_deadline_s": 1.5, "heartbeat_interval_s": 0.1}
    graph, got = faulty(limits, at_step="say nothing"), "nothing"
    if how == "leaves one of two out":
        path = graph_file(
            actors={"good": {"kind": "./faulty.py:Faulty"}, "bad": {"kind": "./faulty.py:Faulty", "args": {"at_step": "say nothing"}}},
            edges=["gateway.x -> good.x", "good.y -> gateway.z", "gateway.x -> bad.x", "bad.y -> gateway.y"], supervision=limits,
        )  # fmt: skip
        graph, got = ranvier.load(path, allow_code=True), "z"
    silent = 12.0 if got == "nothing" else 13.0
    error, after = start(graph, runs, silent, 1.0)
    assert isinstance(error, ranvier.ActorFailed)
    assert f"session 1: every actor has been idle for 1.5 s: expected y, got {got}" in str(error)
    assert after == (3.0 if got == "nothing" else 2.0)


def test_a_router_with_an_index_out_of_range(graph_file: Callable[..., Path], runs: Path, tmp_path: Path) -> None:
    """Name actor, ports, expected and actual indices, and answer the next call."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = graph_file(
        actors={"route": {"kind": "./faulty.py:Router"}, "count": {"kind": "./faulty.py:Experts"}},
        edges=["gateway.x -> route.x", "route.e0 -> count.e0", "route.e1 -> count.e1", "count.y -> gateway.y"],
    )

    async def main() -> None:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            with pytest.raises(ranvier.ActorFailed) as caught:
                await run.call(x=torch.tensor([0.0, 5.0]))
            assert caught.value.actor == "route.0"
            assert "expected indices from 0 to 1 for e0, e1, got 0 to 5" in str(caught.value)
            assert (await run.call(x=torch.tensor([0.0, 1.0, 1.0])))["y"].tolist() == [12]

    with Deadline(60):
        trio.run(main)


@pytest.mark.parametrize("transport", ["ipc", "local"])
def test_a_branch_that_is_not_read_holds_up_its_senders_within_their_credits(
    transport: str, graph_file: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    """Limit what all hosts hold together by the declared credits.

    Messages of 64 MiB go to two branches, one of which is blocked. An actor that need not wait does all its steps
    meanwhile, and the trace says which actor waited for which."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    gate = tmp_path / "gate"
    credits = {"credits": 2, "credit_bytes": 1 << 27}
    path = graph_file(
        actors={"wide": {"kind": "./faulty.py:Wide", "batch_tokens": 1}, "slow": {"kind": "./faulty.py:Narrow", "args": {"gate": str(gate)}},
                "fast": {"kind": "./faulty.py:Narrow"}, "sum": {"kind": "./faulty.py:Sum"}, "other": {"kind": "./faulty.py:Faulty"}},
        edges=["gateway.x -> wide.x", {"from": "wide.y", "to": "slow.x", **credits}, {"from": "wide.y", "to": "fast.x", **credits},
               "slow.y -> sum.a", "fast.y -> sum.b", "sum.y -> gateway.y", "gateway.x -> other.x", "other.y -> gateway.z"],
        transport=transport,
    )  # fmt: skip
    answers: list[float] = []
    held_bytes: list[int] = []
    opened_ns: list[int] = []
    count = 12

    async def main() -> Path:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            # The sum is over all hosts, because pages of a segment move from one host's share to another's.
            idle = sum(map(pss, run.pids.values()))

            async def watch(task_status: trio.TaskStatus[None]) -> None:
                task_status.started()
                while True:
                    held_bytes.append(sum(map(pss, run.pids.values())) - idle)
                    await trio.sleep(0.05)

            async with trio.open_nursery() as nursery:
                await nursery.start(watch)
                async with trio.open_nursery() as calls:
                    for value in range(count):
                        calls.start_soon(collect, run, float(value), answers)
                    waited_for: list[str] = []
                    while waited_for != ["slow.0"]:  # once fast.0 has done all that it was sent
                        await trio.sleep(0.05)
                        seen = (await run._supervisor.situations(5.0))["wide.0.1"]
                        waited_for = [target for _, target, *_ in seen["credit"]] if seen is not None else []
                    assert not answers
                    opened_ns.append(time.monotonic_ns())
                    held.close()
                nursery.cancel_scope.cancel()
            return run.dir

    with Deadline(60), gate.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        read = summary.read(trio.run(main))
    assert sorted(answers) == [2.0 * value for value in range(count)]
    # Two edges hold two messages each, at both ends. Three hosts hold one each in a step, and one waits.
    wide = 64 << 20
    assert 2 * wide < max(held_bytes) < (2 * 2 * 2 + 3 + 1) * wide
    assert len(read.done["other.0"]) == count
    assert all(record.finished_ns < opened_ns[0] for record in read.done["other.0"])
    told = summary.summary(read)
    assert (told["counters"]["wide.0"].get("shared_sent", 0) > 8) == (transport == "local"), "through shared memory"
    waits = {(wait["waiting"], wait["for"]): wait for wait in told["waits"]}
    slow = waits["wide.0", "slow.0"]
    assert slow["edge"] == "wide.y -> slow.x"
    assert f"wide.0 waited {slow['total_ms']:.1f} ms for credit of slow.0 (wide.y -> slow.x)" in table.of_summary(told)
    assert waits["gateway.0", "wide.0"]["edge"] == "gateway.x -> wide.x", (
        "more calls than credits: they wait for wide in turn"
    )
    assert ("slow.0", "sum.0") not in waits


def pss(pid: int) -> int:
    """Return the proportional memory of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def collect(run: ranvier.Run, value: float, answers: list[float]) -> None:
    """Append the answer to a call to `answers`."""
    answers.append(await call(run, value))


@only_linux
def test_every_thread_stays_on_its_cores(graph_file: Callable[..., Path], runs: Path, tmp_path: Path) -> None:
    """Bind the step thread, the control thread and ZeroMQ's threads to `cpus`, for this actor only."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    core = max(os.sched_getaffinity(0))
    path = graph_file(
        actors={"free": {"kind": "./faulty.py:Faulty"}, "bound": {"kind": "./faulty.py:Faulty", "cpus": [core]}},
        edges=["gateway.x -> free.x", "free.y -> bound.x", "bound.y -> gateway.y"],
    )

    async def main() -> None:
        async with ranvier.launch(ranvier.load(path, allow_code=True), runs=runs) as run:
            assert await call(run, 1.0) == 3.0
            threads = {name: os.listdir(f"/proc/{pid}/task") for name, pid in run.pids.items()}
            cores = {name: {frozenset(os.sched_getaffinity(int(t))) for t in threads[name]} for name in threads}
            assert cores == {"free.0.1": {frozenset(os.sched_getaffinity(0))}, "bound.0.1": {frozenset({core})}}
            assert len(threads["bound.0.1"]) >= 4

    trio.run(main)
