"""Replay a recorded actor alone, in this process: load it as its host did, and repeat its inputs in the same order."""

from __future__ import annotations

import math
import pdb
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ranvier.actors.component import devices
from ranvier.actors.component.actor import REWINDS, Actor, Batch, Look, RowsFailed, keeps
from ranvier.actors.errors import RecordingError, describe
from ranvier.actors.host import watch
from ranvier.actors.host.loading import load
from ranvier.actors.trace.recording_reader import Closed, Recorded, RecordedStep, Restored, Session
from ranvier.actors.trace.recording_writer import Outputs
from ranvier.transport.format.aligned import each_aligned

from .values import measure


@dataclass(frozen=True, slots=True)
class Taken:
    """Represent a step that was taken again: its outputs, or its error.

    `recorded` names the outputs that were recorded.
    """

    step: RecordedStep
    recorded: tuple[str, ...]
    outputs: Mapping[str, Batch]
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Describe how an output differs from the recorded one: `size` measures the difference, `what` describes it."""

    step: int
    port: str
    what: str
    size: float


@dataclass(frozen=True, slots=True)
class Replayed:
    """Summarise a replay.

    `compared` counts outputs. `mismatches` are those over the tolerance, and `largest` is the largest difference of
    all.
    """

    steps: int
    sessions: int
    compared: int
    largest: float
    mismatches: tuple[Mismatch, ...]
    seconds: float


def steps(
    recorded: Recorded, progress: Callable[[float], None], look: Look | None = None, stop_at: int | None = None
) -> Iterator[Taken]:
    """Take the steps of a recording again.

    Args:
        look: receives the tensors inside each step (watch.py).
        stop_at: the number of a step to take under Python's debugger.

    Raises:
        RecordingError: an input was not recorded, or a file is damaged.
    """
    recorded.needs_inputs()
    spec = recorded.host
    devices.enter(spec.device)
    torch.set_num_threads(spec.threads)
    with torch.inference_mode():
        actor = load(spec, progress)
        rewinds = keeps(actor) == REWINDS
        for event in recorded.events():
            if isinstance(event, Restored):
                actor.restore(each_aligned(event.state))
            elif isinstance(event, Closed):
                actor.close(event.session)
            elif isinstance(event, Session):
                (actor.rewind if event.rewound and rewinds else actor.open)(event.info)
            else:
                yield _taken(actor, event, recorded.ports.outputs, look, stop_at == event.number)


def _taken(actor: Actor, step: RecordedStep, outputs: tuple[str, ...], look: Look | None, debugged: bool) -> Taken:
    batch = step.batch.aligned()
    try:
        if debugged:
            made: Outputs = pdb.runcall(actor.step, batch) or {}
        else:
            made = actor.step(batch) if look is None else watch.step(actor, batch, look)
    except RowsFailed as some:
        made = some.outputs
    except Exception as error:
        return Taken(step, outputs, {}, error)
    return Taken(
        step,
        outputs,
        {port: out if isinstance(out, Batch) else Batch(batch.rows, {port: out}) for port, out in made.items()},
        None,
    )


def mismatches(taken: Taken) -> Iterator[Mismatch]:
    """Yield one comparison for each recorded output, or for the error.

    Its size is 0 if both are the same bit for bit.
    """
    step = taken.step
    failed = describe(taken.error) if taken.error is not None else None
    if failed is not None or step.error is not None:
        same = failed == step.error
        what = "" if same else f"expected {step.error or 'outputs'}, got {failed or 'outputs'}"
        yield Mismatch(step.number, "", what, 0.0 if same else math.inf)
        return
    for port in sorted((taken.outputs.keys() & set(taken.recorded)) - step.outputs.keys()):
        yield Mismatch(step.number, port, "expected no output, got one", math.inf)
    for port, expected in step.outputs.items():
        got = taken.outputs.get(port)
        if got is None:
            yield Mismatch(step.number, port, "expected an output, got none", math.inf)
        elif got.rows != expected.rows:
            yield Mismatch(step.number, port, f"expected the rows {_rows(expected)}, got {_rows(got)}", math.inf)
        else:
            yield _measured(step.number, port, expected, got)


def _measured(number: int, port: str, expected: Batch, got: Batch) -> Mismatch:
    one, other = expected[port], got[port]
    if one.dtype != other.dtype or one.shape != other.shape:
        return Mismatch(
            number, port, f"expected {one.dtype}{list(one.shape)}, got {other.dtype}{list(other.shape)}", math.inf
        )
    if torch.equal(_bits(one), _bits(other)):
        return Mismatch(number, port, "", 0.0)
    found = measure(one.flatten(), other.flatten())
    return Mismatch(number, port, f"element {found.index}: expected {found.one:.7g}, got {found.other:.7g}", found.size)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: compared as bytes, NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _rows(batch: Batch) -> str:
    return ", ".join(f"{row.session}:{row.position}+{row.tokens}" for row in batch.rows[:4])


def replay(
    recorded: Recorded, tolerance: float, progress: Callable[[float], None], stop_at: int | None = None
) -> Replayed:
    """Take all steps again, and compare their outputs with the recorded ones.

    Raises:
        RecordingError: an input was not recorded, a file is damaged, or there is no step with the number `stop_at`.
    """
    began = time.monotonic()
    count, compared, largest = 0, 0, 0.0
    found: list[Mismatch] = []
    sessions: set[int] = set()
    total = recorded.steps
    if stop_at is not None and not 0 <= stop_at < total:
        raise RecordingError(f"{recorded.name}: expected a step from 0 to {total - 1}, got {stop_at}")
    for taken in steps(recorded, lambda share: progress(share / 2), stop_at=stop_at):
        count += 1
        sessions.update(row.session for row in taken.step.rows)
        for mismatch in mismatches(taken):
            compared += 1
            largest = max(largest, mismatch.size)
            if mismatch.size > tolerance:
                found.append(mismatch)
        progress(0.5 + count / total / 2)
    return Replayed(count, len(sessions), compared, largest, tuple(found), time.monotonic() - began)
