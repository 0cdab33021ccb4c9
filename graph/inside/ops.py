"""Describe changes inside a model as data: `ops.add("hidden 12", vector, scale=8, at="answer")`.

A place has the name that `ranvier diverge` gives it. `at` says at which positions: `all`, `prompt`, `answer`, `last` (the last
token of the prompt), a position, or several; a negative one counts from the prompt's end. It means the same in prompts that
are cut into chunks, in answers, in batches, and after a recovery.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..file.errors import RequestError

MOST_SPANS = 4096
"""The most pieces that positions may have; positions that follow each other are one."""
MOST = 3.4028234663852886e38
"""The largest float32; it stands for infinity, which JSON has not."""
Heads = int | Sequence[int]
"""One head of a place that has heads, or several; none: all of them. Each gets the same vector."""
Where = Literal["all", "prompt", "answer", "last"] | int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Op:
    """Hold one change, before the prompt's length is known. The functions of this module make it."""

    place: str
    operation: str
    at: Where = "all"
    values: bytes = field(default=b"", repr=False)
    rows: int = 0
    width: int = 0
    number: float = 1.0
    least: float = 0.0
    most: float = 0.0
    heads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """Ask to read some places, before the prompt's length is known. `read` makes it."""

    places: str
    at: Where = "all"


def read(places: str, at: Where = "all") -> Wish:
    """Read places at some positions only: `ops.read("hidden 1-30", at="last")`."""
    return Wish(places, at)


def add(place: str, vector: Any, *, scale: float = 1.0, at: Where = "all", heads: Heads = ()) -> Op:
    """Add `scale` times a vector [W]; of several [positions, W], each at the next position."""
    return Op(place, "add", at, *_vectors("add", vector), number=_number("scale", scale), heads=_listed(heads))


def scale(place: str, factor: float, *, at: Where = "all", heads: Heads = ()) -> Op:
    """Multiply by a number."""
    return Op(place, "scale", at, number=_number("factor", factor), heads=_listed(heads))


def set(place: str, vector: Any, *, at: Where = "all", heads: Heads = ()) -> Op:
    """Replace by a vector [W]; by one of several [positions, W] at each position."""
    return Op(place, "set", at, *_vectors("set", vector), heads=_listed(heads))


def zero(place: str, *, at: Where = "all", heads: Heads = ()) -> Op:
    """Replace by zeros."""
    return Op(place, "zero", at, heads=_listed(heads))


def project_out(place: str, direction: Any, *, at: Where = "all") -> Op:
    """Remove the part along a direction [W] (Arditi et al. 2024)."""
    return Op(place, "project_out", at, *_direction("project_out", direction))


def clamp(place: str, direction: Any, *, least: float = -math.inf, most: float = math.inf, at: Where = "all") -> Op:
    """Keep the part along a direction [W], in units of its length, between two numbers."""
    low, high = float(least), float(most)
    if not low <= high:
        raise RequestError(f"clamp: expected least up to most, got {low} and {high}")
    return Op(
        place, "clamp", at, *_direction("clamp", direction), least=min(MOST, max(-MOST, low)), most=min(MOST, max(-MOST, high))
    )  # fmt: skip


def mean_ablate(place: str, mean: Any, *, at: Where = "all", heads: Heads = ()) -> Op:
    """Replace by the mean of other activations: `mean` is [W], or [positions, W], of which the mean is taken."""
    values, rows, width = _vectors("mean_ablate", mean)
    if rows > 1:
        numbers = memoryview(values).cast("f")
        mean = [math.fsum(numbers[column::width]) / rows for column in range(width)]
    return set(place, mean, at=at, heads=heads)


def _vectors(what: str, given: Any) -> tuple[bytes, int, int]:
    """Return vectors as float32 bytes, their number, and their width.

    Raises:
        RequestError: they are no finite numbers in one or two dimensions.
    """
    import torch

    try:
        made = torch.as_tensor(given).detach()
        if made.is_complex():
            raise TypeError("complex numbers have no place here")
        made = made.to("cpu", torch.float32).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"{what}: expected a vector of numbers, got {given!r:.80}: {error}") from None
    if made.dim() not in (1, 2) or not made.numel():
        raise RequestError(f"{what}: expected a vector [W] or vectors [positions, W], got the shape {list(made.shape)}")
    if not bool(made.isfinite().all()):
        raise RequestError(f"{what}: expected finite numbers, got NaN or infinity")
    rows = made.shape[0] if made.dim() == 2 else 1
    return made.numpy().tobytes(), rows, made.shape[-1]


def _direction(what: str, given: Any) -> tuple[bytes, int, int]:
    values, rows, width = _vectors(what, given)
    if rows != 1:
        raise RequestError(f"{what}: expected one direction, got {rows}")
    if not any(memoryview(values).cast("f")):
        raise RequestError(f"{what}: expected a direction, got zeros")
    return values, rows, width


def _listed(heads: Heads) -> tuple[int, ...]:
    try:
        return (operator.index(heads),) if not isinstance(heads, Iterable) else tuple(map(operator.index, heads))
    except TypeError:
        raise RequestError(f"heads: expected a number or several, got {heads!r:.80}") from None


def _number(name: str, given: Any) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise RequestError(f"{name}: expected a number, got {given!r:.80}") from None
    if not math.isfinite(number):
        raise RequestError(f"{name}: expected a finite number, got {number}")
    return number


def positions(at: Where, prompt: int, most: int) -> tuple[tuple[int, int | None], ...]:
    """Return positions as spans. `prompt` is the prompt's length, `most` the number of positions that the request may have.

    Raises:
        RequestError: `at` is none of the known forms, or a position does not exist.
    """
    named = {"all": (0, None), "prompt": (0, prompt), "answer": (prompt, None), "last": (prompt - 1, prompt)}
    if isinstance(at, str):
        if at not in named:
            raise RequestError(f"at: expected {', '.join(named)} or positions, got {at!r:.80}")
        return (named[at],)
    try:
        given = [operator.index(at)] if not isinstance(at, Iterable) else [operator.index(each) for each in at]
    except TypeError:
        raise RequestError(f"at: expected {', '.join(named)} or positions, got {at!r:.80}") from None
    found = [each + prompt if each < 0 else each for each in given]
    wrong = next((each for each, place in zip(given, found, strict=True) if not 0 <= place < most), None)
    if wrong is not None:
        raise RequestError(f"at: expected positions from {-prompt} to {most - 1}, got {wrong}")
    if len({*found}) < len(found):
        raise RequestError(f"at: expected each position once, got {given!r:.80}")
    spans: list[tuple[int, int]] = []
    for place in found:  # positions in a row become one span
        if spans and spans[-1][1] == place:
            spans[-1] = spans[-1][0], place + 1
        else:
            spans.append((place, place + 1))
    if len(spans) > MOST_SPANS:
        raise RequestError(f"at: expected at most {MOST_SPANS} pieces of positions in a row, got {len(spans)}")
    return tuple(spans)
