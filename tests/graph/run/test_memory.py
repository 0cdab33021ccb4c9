"""Send the values that a tensor has at that moment, whatever its actor or its caller does next.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from typer.testing import CliRunner

import ranvier
from ranvier.actors.component import ownership
from ranvier.actors.component.actor import Batch
from ranvier.graph.commands import cli

CUSTOM = Path(__file__).parents[1] / "custom"
Make = Callable[..., ranvier.Graph]


@pytest.fixture
def borrowing(graph_file: Callable[..., Path], tmp_path: Path) -> Make:
    """Provide a function that returns a graph of actors of borrowing.py."""
    shutil.copy(CUSTOM / "borrowing.py", tmp_path / "borrowing.py")

    def make(actors: dict[str, dict[str, Any]], edges: list[Any], **settings: Any) -> ranvier.Graph:
        own = {name: {**section, "kind": f"./borrowing.py:{section['kind']}"} for name, section in actors.items()}
        return ranvier.load(graph_file(actors=own, edges=edges, **settings), allow_code=True)

    return make


def called(
    graph: ranvier.Graph, runs: Path, inputs: list[torch.Tensor], port: str, gate: Path | None = None
) -> list[Any]:
    """Return the answers to calls that are made at once, or their errors.

    Create the file `gate` once all of them are sent."""
    got: dict[int, Any] = {}

    async def one(run: ranvier.Run, index: int) -> None:
        try:
            got[index] = (await run.call(x=inputs[index]))[port].tolist()
        except ranvier.RanvierError as error:
            got[index] = error

    async def main() -> None:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run:
                async with trio.open_nursery() as nursery:
                    for index in range(len(inputs)):
                        nursery.start_soon(one, run, index)
                    if gate is not None:
                        while run.status()["requests"] < len(inputs):
                            await trio.sleep(0.01)
                        gate.touch()
                assert not run.recoveries

    trio.run(main)
    return [got[index] for index in range(len(inputs))]


@pytest.mark.parametrize("views", [False, True], ids=["the buffer", "a view of it"])
@pytest.mark.parametrize(("elements", "transport"), [
    (1000, "ipc"), (200_000, "ipc"), (200_000, "tcp://127.0.0.1"), (1000, "local"), (200_000, "local"),
    *(pytest.param(25_600, wire, marks=pytest.mark.slow) for wire in ("ipc", "tcp://127.0.0.1", "local")),
])  # fmt: skip
def test_an_actor_that_returns_the_same_buffer_case_63(
    elements: int, transport: str, views: bool, borrowing: Make, runs: Path
) -> None:
    """Give each of 24 calls its own numbers, if an actor returns the same buffer.

    The calls are made at once, and the edge has credit for fewer."""
    graph = borrowing(
        {"fills": {"kind": "Fills", "args": {"k": elements, "views": views}}, "slow": {"kind": "Slow"}},
        ["gateway.x -> fills.x", {"from": "fills.y", "to": "slow.y", "credits": 2}, "slow.z -> gateway.z"],
        transport=transport,
    )
    made = called(graph, runs, [torch.tensor([float(index)]) for index in range(24)], "z")
    assert made == [[float(index)] * 2 for index in range(24)]


@pytest.mark.parametrize("elements", [4, 100_000])
def test_a_caller_that_refills_its_tensor_case_63(elements: int, borrowing: Make, runs: Path) -> None:
    """Send the values that a tensor had when the call was made.

    One tensor is used for twenty calls."""
    graph = borrowing(
        {"slow": {"kind": "Slow"}}, [{"from": "gateway.x", "to": "slow.y", "credits": 2}, "slow.z -> gateway.z"]
    )
    tensor, got = torch.zeros(2, elements), {}

    async def one(run: ranvier.Run, index: int) -> None:
        tensor.fill_(index)
        got[index] = (await run.call(x=tensor))["z"].tolist()

    async def main() -> None:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
                for index in range(20):
                    nursery.start_soon(one, run, index)

    trio.run(main)
    assert got == {index: [float(index)] * 2 for index in range(20)}


@pytest.mark.parametrize("transport", ["ipc", "tcp://127.0.0.1", "local"])
def test_one_buffer_for_rows_that_are_taken_alone_case_63(
    transport: str, borrowing: Make, runs: Path, tmp_path: Path
) -> None:
    """Give each row its own values when the rows of a failed step run alone.

    The step fails for one row, and the actor returns the same memory for all."""
    gate = tmp_path / "gate"
    graph = borrowing(
        {"bad": {"kind": "FillsRows", "args": {"gate": str(gate)}}}, ["gateway.x -> bad.x", "bad.y -> gateway.y"],
        transport=transport, **({"shared_from_bytes": 0} if transport == "local" else {}),
    )  # fmt: skip
    values = (1.0, 2.0, 13.0, 3.0, 4.0)
    made = called(graph, runs, [torch.tensor([value]) for value in values], "y", gate)
    assert "thirteen among 1" in str(made[2])
    assert [made[index] for index in (0, 1, 3, 4)] == [[[value] * 50_000] for value in (1.0, 2.0, 3.0, 4.0)]


@pytest.mark.parametrize("hidden", [False, True], ids=["seen by torch", "past torch"])
def test_a_step_that_changes_its_input_and_fails_for_one_row_case_64(
    hidden: bool, borrowing: Make, runs: Path, tmp_path: Path
) -> None:
    """Run the other rows of a failed step again, with the inputs that were sent."""
    gate, rows = tmp_path / "gate", tmp_path / "rows"
    graph = borrowing(
        {
            "good": {"kind": "InPlace", "args": {"gate": str(gate)}},
            "bad": {"kind": "InPlace", "args": {"hidden": hidden, "rows": str(rows)}},
        },
        ["gateway.x -> good.x", "good.y -> bad.x", "bad.y -> gateway.y"],
    )
    inputs = [torch.tensor([float(index)]) for index in (1, 2, 6.5, 3, 4, 5, 7)]
    made = called(graph, runs, inputs, "y", gate)
    assert int(rows.read_text()) > 1, "no two calls came together"
    assert isinstance(made[2], ranvier.ActorFailed)
    assert "thirteen" in str(made[2])
    assert [made[index] for index in (0, 1, 3, 4, 5, 6)] == [[4.0 * value] for value in (1, 2, 3, 4, 5, 7)]


def test_a_step_that_changes_its_input_is_recorded_as_it_was_case_64(borrowing: Make, runs: Path) -> None:
    """Record the input as it was before the step changed it, so that a replay gives the same output."""
    graph = borrowing(
        {"bad": {"kind": "InPlace"}}, ["gateway.x -> bad.x", "bad.y -> gateway.y"], record={"edges": "all"}
    )
    assert called(graph, runs, [torch.tensor([1.0, 2.0])], "y") == [[2.0, 4.0]]
    [folder] = runs.glob("test-*")
    done = CliRunner().invoke(cli.app, ["replay", str(folder), "bad", "--allow-code"])
    assert done.exit_code == 0, done.output
    assert "all 1 outputs are the same bit for bit" in done.output


def test_outputs_that_are_no_memory_of_this_machine_case_65(borrowing: Make, runs: Path) -> None:
    """Send the values of unusual tensors, or raise an error that names actor and port.

    An imaginary part keeps its sign."""
    graph = borrowing({"odd": {"kind": "Odd"}}, ["gateway.x -> odd.x", "odd.y -> gateway.y"])
    inputs = []
    for which in range(9):
        tensor = torch.arange(12.0).view(3, 4)
        tensor[0, 0] = which
        inputs.append(tensor)
    made = called(graph, runs, inputs, "y")
    assert made[0] == inputs[0].t().tolist()
    assert made[1] == inputs[1][:1].expand(3, 4).tolist()
    assert made[2] == (-inputs[2]).tolist()
    for which, words in (
        (3, "on meta"),
        (4, "torch.sparse_coo"),
        (5, "ndarray"),
        (6, "float8_e4m3fn"),
        (7, "tensor y"),
        (8, "allocated host memory"),
    ):
        assert isinstance(made[which], ranvier.ActorFailed), made[which]
        assert "actor odd.0" in str(made[which])
        assert words in str(made[which]), made[which]


def test_what_cannot_be_recorded_ends_no_host(borrowing: Make, runs: Path) -> None:
    """Fail only the call whose output cannot be recorded: one on the meta device, or a sparse one."""
    graph = borrowing({"odd": {"kind": "Odd"}}, ["gateway.x -> odd.x", "odd.y -> gateway.y"], record={"edges": "all"})
    inputs = [torch.full((3, 4), float(which)) for which in (3, 4, 0)]
    made = called(graph, runs, inputs, "y")
    assert all("actor odd.0" in str(error) for error in made[:2])
    assert made[2] == [[0.0] * 3] * 4


def test_calls_of_different_widths_at_once(borrowing: Make, runs: Path, tmp_path: Path) -> None:
    """Answer calls that wait together, but whose widths differ so that they cannot share a step."""
    gate = tmp_path / "gate"
    graph = borrowing(
        {"wide": {"kind": "Wide", "args": {"gate": str(gate)}}}, ["gateway.x -> wide.x", "wide.y -> gateway.y"]
    )
    inputs = [torch.full((1, width), float(width)) for width in (1, 3, 3, 5, 3)]
    assert called(graph, runs, inputs, "y", gate) == [(tensor * 2).tolist() for tensor in inputs]


def test_memory_that_nobody_else_holds_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy only outputs that the actor still holds in some way.

    An output that the step made, or passed on from its input, is not copied."""
    monkeypatch.setattr(ownership, "COPY_BELOW_BYTES", 0)
    kept: list[Any] = []

    def step(how: str, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        if how == "made":
            return {"y": torch.ones(4)}
        if how == "in a batch":
            return {"y": Batch((), {"y": torch.ones(4)})}
        if how == "passed on":
            return {"y": batch["x"]}
        tensor = torch.ones(4)
        holders = {
            "kept": lambda: tensor, "a view": lambda: tensor[1:], "detached": lambda: tensor.detach(), "an array": lambda: tensor.numpy(),
            "its storage": lambda: tensor.untyped_storage(), "by dlpack": lambda: torch.utils.dlpack.to_dlpack(tensor),
        }  # fmt: skip
        kept.append(holders[how]())
        return {"y": tensor}

    def taken(how: str) -> frozenset[str]:
        batch = Batch((), {"x": torch.frombuffer(bytearray(16), dtype=torch.float32)})
        outputs = step(how, batch)
        return ownership.soles(outputs, batch)

    with torch.inference_mode():
        for how in ("made", "in a batch", "passed on"):
            assert taken(how) == {"y"}, how
        for how in ("kept", "a view", "detached", "an array", "its storage", "by dlpack"):
            assert taken(how) == frozenset(), how


# -- errors in steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Raises", "BadAtClose"])
def test_errors_that_cannot_be_told_end_one_session_at_once_case_66(kind: str, borrowing: Make, runs: Path) -> None:
    """End one session at once with the error of its step, even if the error cannot be printed.

    The errors have 30 MB of text, no text, or letters that cannot be encoded, or are no subclass of Exception. One
    actor also fails when a session closes."""
    graph = borrowing({"bad": {"kind": kind}}, ["gateway.x -> bad.x", "bad.y -> gateway.y"])

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            kinds = ("ValueError", "Unspeakable", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "ValueError")
            for which, name in enumerate(kinds, 1):
                with trio.fail_after(30), pytest.raises(ranvier.ActorFailed) as caught:
                    await run.call(x=torch.tensor([float(which)]))
                assert len(str(caught.value)) < 100_000
                assert name in str(caught.value), "the step's own error is the one that is told"
                caught.value.args[0].encode()
                with trio.fail_after(30):
                    assert (await run.call(x=torch.tensor([7.0])))["y"].tolist() == [8.0]
            assert not run.recoveries

    trio.run(main)
