"""Make, parse and check schedules of pipelined training: for each stage, the ordered list of its actions.

An action is `F3` (forward of micro-batch 3), `B3` (backward), `I3` and `W3` (backward split into the gradients of inputs and of
weights) or `U` (update). A schedule prints as one line per stage, `name: F0 F1 B0 B1 U`; custom schedules are written in the
same form. Playing a schedule with given costs finds deadlocks and computes its bubble. `training/host.py` executes it.

GPipe: Huang et al. 2019. One forward, one backward, and the asynchronous form with stashed weights: PipeDream, Narayanan et al.
2019. Eager: Zhuang et al. 2022. Interleaved: Narayanan et al. 2021. Zero bubble (H1): Qi et al. 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD, INPUTS, WEIGHTS, UPDATE = "F", "B", "I", "W", "U"
NAMES = ("gpipe", "1f1b", "eager", "interleaved", "zero-bubble", "async")
COSTS = {FORWARD: 1.0, BACKWARD: 2.0, INPUTS: 1.0, WEIGHTS: 1.0, UPDATE: 0.0}
"""Costs of actions that were not measured: a backward costs twice a forward."""
_ACTION = re.compile(r"([FBIW])(\d{1,9})|U")


class ScheduleError(ValueError):
    """Report a schedule that cannot be executed. The message says where and why."""


class Action(NamedTuple):
    """Describe one action of a stage. `micro_batch` is -1 for an update."""

    kind: str
    micro_batch: int = -1

    def __str__(self) -> str:
        return self.kind if self.micro_batch < 0 else f"{self.kind}{self.micro_batch}"


Actions = tuple[Action, ...]


class Played(NamedTuple):
    """Record one action of a played schedule: its stage, and when it began and ended."""

    stage: str
    action: Action
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Stages:
    """Describe the stages of a pipeline, ordered so that each comes after the stages that send to it.

    `edges` are pairs of names, source and target. `workers` gives the same worker to stages that share a core and so do one
    action at a time. A stage that is not in `workers` has its own worker.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    workers: Mapping[str, str]

    def before(self, stage: str) -> list[str]:
        """Return the stages that send to `stage`."""
        return [source for source, target in self.edges if target == stage]

    def after(self, stage: str) -> list[str]:
        """Return the stages that `stage` sends to."""
        return [target for source, target in self.edges if source == stage]

    def worker(self, stage: str) -> str:
        """Return the worker of `stage`."""
        return self.workers.get(stage, stage)

    def distances(self) -> dict[str, int]:
        """Count, for each stage, the stages that follow it on the longest path to the end."""
        found: dict[str, int] = {}
        for stage in reversed(self.names):
            found[stage] = max((found[target] + 1 for target in self.after(stage)), default=0)
        return found


@dataclass(frozen=True, slots=True)
class Schedule:
    """Hold the actions of each stage for `micro_batches` micro-batches."""

    micro_batches: int
    stages: Mapping[str, Actions]

    def __str__(self) -> str:
        width = max(map(len, self.stages))
        return "\n".join(f"{stage:<{width}}: {' '.join(map(str, actions))}" for stage, actions in self.stages.items())

    @property
    def splits(self) -> bool:
        """Return whether backwards are split into the gradients of inputs and of weights."""
        return any(action.kind == WEIGHTS for actions in self.stages.values() for action in actions)


def make(name: str, stages: Stages, micro_batches: int, accumulate: int = 1) -> Schedule:
    """Make the schedule called `name`. Only `async` uses `accumulate`, the number of micro-batches per update.

    Raises:
        ScheduleError: the schedule does not exist, or these stages cannot have it.
    """
    far = stages.distances()
    if name == "gpipe":
        made = {stage: _gpipe(micro_batches) for stage in stages.names}
    elif name == "1f1b":
        made = {stage: _one_by_one(micro_batches, far[stage]) for stage in stages.names}
    elif name == "eager":  # no stage waits for a message on its way, or for an action that takes longer than usual
        made = {stage: _one_by_one(micro_batches, 2 * far[stage]) for stage in stages.names}
    elif name == "zero-bubble":
        made = {
            stage: _zero_bubble(micro_batches, far[stage], max(far.values()) - far[stage]) for stage in stages.names
        }
    elif name == "async":
        made = {stage: _asynchronous(micro_batches, far[stage], accumulate) for stage in stages.names}
    elif name == "interleaved":
        made = _interleaved(stages, micro_batches)
    else:
        raise ScheduleError(f"expected one of {', '.join(NAMES)}, got {name!r}")
    return Schedule(micro_batches, made)


def _each(kind: str, numbers: Iterable[int]) -> Iterator[Action]:
    return (Action(kind, number) for number in numbers)


def _gpipe(count: int) -> Actions:
    return (*_each(FORWARD, range(count)), *_each(BACKWARD, range(count)), Action(UPDATE))


def _one_by_one(count: int, ahead: int) -> Actions:
    """Do `ahead` forwards first, then one forward and one backward in turn."""
    ahead = min(ahead, count)
    made = list(_each(FORWARD, range(ahead)))
    for number in range(count):
        if number + ahead < count:
            made.append(Action(FORWARD, number + ahead))
        made.append(Action(BACKWARD, number))
    return (*made, Action(UPDATE))


def _zero_bubble(count: int, ahead: int, put_off: int) -> Actions:
    """Do the same as `_one_by_one`, but delay gradients of weights, so that those of inputs go back sooner.

    At most `put_off` of them are delayed: then no stage keeps more micro-batches than the first stage does anyway.
    """
    made: list[Action] = []
    late = 0
    for action in _one_by_one(count, ahead)[:-1]:
        if action.kind == FORWARD:
            made.append(action)
            continue
        made.append(Action(INPUTS, action.micro_batch))
        if action.micro_batch - late >= put_off:
            made.append(Action(WEIGHTS, late))
            late += 1
    return (*made, *_each(WEIGHTS, range(late, count)), Action(UPDATE))


def _asynchronous(count: int, ahead: int, accumulate: int) -> Actions:
    """Do the same as `_one_by_one`, with an update after every `accumulate` backwards and after the last."""
    made: list[Action] = []
    for action in _one_by_one(count, ahead)[:-1]:
        made.append(action)
        done = action.micro_batch + 1
        if action.kind == BACKWARD and (done % accumulate == 0 or done == count):
            made.append(Action(UPDATE))
    return tuple(made)


def _interleaved(stages: Stages, count: int) -> dict[str, Actions]:
    """Give each of n workers every n-th stage of the pipeline; it takes its stages in turn."""
    workers = list(dict.fromkeys(map(stages.worker, stages.names)))
    chunks, rest = divmod(len(stages.names), len(workers))
    dealt = [workers[index % len(workers)] for index in range(len(stages.names))]
    if rest or dealt != [stages.worker(stage) for stage in stages.names] or chunks < 2:
        raise ScheduleError(
            "interleaved: expected the actors in turn on each set of cpus, at least two on each, such as cpus [0], [1], [0], "
            f"[1]; got {', '.join(f'{stage} on {stages.worker(stage)}' for stage in stages.names)}"
        )
    if count % len(workers):
        raise ScheduleError(f"interleaved: expected a multiple of {len(workers)} micro-batches, got {count}")
    made: dict[str, list[Action]] = {stage: [] for stage in stages.names}
    for worker in range(len(workers)):
        for chunk, action in _dealt(worker, len(workers), chunks, count):
            made[stages.names[chunk * len(workers) + worker]].append(action)
    return {stage: (*actions, Action(UPDATE)) for stage, actions in made.items()}


def _dealt(worker: int, workers: int, chunks: int, count: int) -> Iterator[tuple[int, Action]]:
    """Yield the actions of one worker in order, each with the index of its stage among the worker's stages."""

    def turn(index: int, kind: str) -> tuple[int, Action]:
        chunk = index // workers % chunks
        number = index // (workers * chunks) * workers + index % workers
        return chunk if kind == FORWARD else chunks - 1 - chunk, Action(kind, number)

    total = count * chunks
    ahead = min(total, (workers - worker - 1) * 2 + (chunks - 1) * workers)
    for index in range(ahead):
        yield turn(index, FORWARD)
    for index in range(total):
        if index + ahead < total:
            yield turn(index + ahead, FORWARD)
        yield turn(index, BACKWARD)


def parse(text: str, stages: Stages) -> Schedule:
    """Parse a schedule as it is printed. Empty lines, and text after a `#`, are ignored.

    Raises:
        ScheduleError: the text is wrong; the message gives the line's number.
    """
    made: dict[str, Actions] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        stage, _, actions = (part.strip() for part in line.partition(":"))
        if stage not in stages.names:
            raise ScheduleError(f"line {number}: expected one of {', '.join(stages.names)}, got {stage!r}")
        if stage in made:
            raise ScheduleError(f"line {number}: {stage} has a line already")
        found = []
        for word in actions.split():
            match = _ACTION.fullmatch(word)
            if match is None:
                raise ScheduleError(f"line {number}: expected an action such as F0, B0, I0, W0 or U, got {word!r}")
            found.append(Action(match[1], int(match[2])) if match[1] else Action(UPDATE))
        made[stage] = tuple(found)
    missing = [stage for stage in stages.names if stage not in made]
    if missing:
        raise ScheduleError(f"expected a line for each of {', '.join(stages.names)}, got none for {', '.join(missing)}")
    count = 1 + max((action.micro_batch for actions in made.values() for action in actions), default=-1)
    return Schedule(count, {stage: made[stage] for stage in stages.names})


def check(schedule: Schedule, stages: Stages) -> None:
    """Check that a schedule can be executed: each stage does everything once, in a possible order, without a deadlock.

    Raises:
        ScheduleError: it cannot be executed; the message names the stage and the action.
    """
    for stage, actions in schedule.stages.items():
        _check_stage(stage, actions, schedule.micro_batches)
    play(schedule, stages)


def _check_stage(stage: str, actions: Sequence[Action], count: int) -> None:
    done: set[Action] = set()
    for index, action in enumerate(actions):
        kind, number = action
        if kind == UPDATE:
            continue
        if action in done:
            raise ScheduleError(f"{stage}: {action} comes twice")
        needs = {BACKWARD: FORWARD, INPUTS: FORWARD, WEIGHTS: INPUTS}.get(kind)
        if needs is not None and Action(needs, number) not in done:
            raise ScheduleError(f"{stage}: {action} comes before {needs}{number}")
        if (kind == BACKWARD and Action(INPUTS, number) in done) or (
            kind == INPUTS and Action(BACKWARD, number) in done
        ):
            raise ScheduleError(f"{stage}: micro-batch {number} has a backward both whole and split")
        done.add(action)
        if kind in (BACKWARD, WEIGHTS) and not any(later.kind == UPDATE for later in actions[index:]):
            raise ScheduleError(f"{stage}: no U follows {action}: its gradients would never be used")
    for number in range(count):
        if Action(FORWARD, number) not in done:
            raise ScheduleError(f"{stage}: F{number} is missing")
        if Action(BACKWARD, number) not in done and Action(WEIGHTS, number) not in done:
            raise ScheduleError(f"{stage}: B{number}, or I{number} and W{number}, is missing")


def play(schedule: Schedule, stages: Stages, costs: Mapping[tuple[str, str], float] | None = None) -> list[Played]:
    """Return when each action begins and ends.

    `costs` are by stage and kind of action; `COSTS` replaces missing ones. Messages take no time here.

    Raises:
        ScheduleError: there is a deadlock; the message names each waiting stage and its action.
    """
    costs = costs or {}
    ended: dict[tuple[str, Action], float] = {}
    free: dict[str, float] = {}
    at = dict.fromkeys(stages.names, 0)
    played: list[Played] = []

    def ready(stage: str) -> float | None:
        """Return when other stages have sent what the next action of `stage` needs, or None if that is not known yet."""
        kind, number = schedule.stages[stage][at[stage]]
        if kind == FORWARD:
            needs = [(other, Action(FORWARD, number)) for other in stages.before(stage)]
        elif kind in (BACKWARD, INPUTS):
            needs = []
            for other in stages.after(stage):
                whole = (other, Action(BACKWARD, number))
                needs.append(whole if whole in ended else (other, Action(INPUTS, number)))
        else:
            needs = []
        times = [ended.get(need) for need in needs]
        return None if None in times else max((time for time in times if time is not None), default=0.0)

    while any(at[stage] < len(schedule.stages[stage]) for stage in stages.names):
        open_ = [stage for stage in stages.names if at[stage] < len(schedule.stages[stage])]
        able = [
            (max(when, free.get(stages.worker(stage), 0.0)), stage)
            for stage in open_
            if (when := ready(stage)) is not None
        ]
        if not able:
            stuck = "; ".join(f"{stage} waits at {schedule.stages[stage][at[stage]]}" for stage in open_)
            raise ScheduleError(f"a deadlock: {stuck}")
        began, stage = min(able, key=lambda each: (each[0], schedule.stages[each[1]][at[each[1]]].kind == FORWARD))
        action = schedule.stages[stage][at[stage]]
        over = began + costs.get((stage, action.kind), COSTS[action.kind])
        ended[stage, action] = free[stages.worker(stage)] = over
        at[stage] += 1
        played.append(Played(stage, action, began, over))
    return played


def bubble(played: Sequence[Played], stages: Stages) -> float:
    """Return the share of all workers' time in which they wait, 0 to 1."""
    span = max(each.ended for each in played) - min(each.began for each in played)
    workers = {stages.worker(stage) for stage in stages.names}
    busy = sum(each.ended - each.began for each in played)
    return 1 - busy / (span * len(workers)) if span > 0 else 0.0
