"""Check what Prometheus reads of a running training."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio
from prometheus_client.parser import text_string_to_metric_families

import ranvier
from ranvier.graph.training.trainer import train

LAYER = "./parts.py:Layer"
TRAINING = {
    "data": {"source": "./parts.py:Numbers", "args": {"batch": 24}}, "batch": 24, "micro_batches": 4, "steps": 100_000,
    "loss": [{"of": "two.output", "target": "label"}], "optimizer": {"kind": "adamw", "lr": 0.01, "clip": 0.1},
    "validate": {"every": 3, "batches": 2}, "save": {"every": 30},
}  # fmt: skip


def test_step_and_losses(graph: Callable[..., ranvier.Graph], runs: Path, tmp_path: Path) -> None:
    """Report a step's numbers on the page as the training reports them.

    The address of the page is in the log."""
    actors = {
        "one": {"kind": LAYER, "args": {"width": 8, "to": 12}, "inputs": {"x": "float32[pictures, 8]"}},
        "two": {"kind": LAYER, "args": {"width": 12, "to": 4, "last": True}},
    }
    edges = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> gateway.made"]
    made = graph(actors, edges, TRAINING, telemetry={"metrics": "127.0.0.1:0"})
    told: dict[tuple[int, bool], float] = {}
    found: dict[str, float] = {}
    up: dict[str, float] = {}

    def read(page: str) -> None:
        for family in text_string_to_metric_families(urllib.request.urlopen(page).read().decode()):
            for sample in family.samples:
                if sample.name == "ranvier_host_up":
                    up[sample.labels["host"]] = sample.value
                elif set(sample.labels) == {"graph"}:
                    found[sample.name] = sample.value

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(
                    train, made, tmp_path / "out", allow_code=True, runs=runs,
                    on_step=lambda step: told.update({(step.step, step.validation): step.loss}),
                )
            )  # fmt: skip
            with trio.fail_after(60):
                while len(told) < 8:
                    await trio.sleep(0.02)
                [log] = runs.glob("*/logs/supervisor.jsonl")
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                [page] = [line["page"] for line in lines if line["event"] == "metrics"]
                await trio.to_thread.run_sync(read, page)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert up == {"one.0": 1.0, "two.0": 1.0}
    step = int(found["ranvier_training_step"])
    assert step >= 5
    assert found["ranvier_training_loss"] == told[step, False]
    # A validation is reported after its step.
    validations = [told.get((at, True)) for at in (step - step % 3, step - step % 3 - 3)]
    assert found["ranvier_training_validation_loss"] in validations
    assert found["ranvier_training_norm"] > 0 and found["ranvier_training_seconds"] > 0
    assert found["ranvier_recoveries_total"] == 0
