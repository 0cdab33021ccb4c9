"""Observe or change what an edge carries, at the sending end, before it is encoded.

The tap `statistics` records each message and raises an alarm at the first NaN or infinity. A custom function,
`./file.py:name`, is called with the tensor and its rows. It may return another tensor of the same shape and dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ranvier.transport.format.header import Row
from ranvier.transport.links.link import LinkSpec

from ..component.kinds import KindError, import_name
from ..protocol.host_spec import STATISTICS

Tap = Callable[[torch.Tensor, tuple[Row, ...]], torch.Tensor]
Put = Callable[[int, int, Mapping[str, float], tuple[Row, ...]], None]
"""A function that records statistics. It takes the edge, the time (ns), the statistics and the rows."""
Alarm = Callable[[str, Row, float, int], None]
"""A function that reports NaN or infinity. It takes the edge's name, the first row, their share, the time (ns)."""


@dataclass(slots=True)
class Statistics:
    """Record the `statistics` of each message. Raise the alarm once, at the first NaN or infinity."""

    link: LinkSpec
    put: Put
    alarm: Alarm
    alarmed: bool = False

    def __call__(self, tensor: torch.Tensor, rows: tuple[Row, ...]) -> torch.Tensor:
        now_ns = time.monotonic_ns()
        measured = statistics(tensor)
        self.put(self.link.edge, now_ns, measured, rows)
        if measured["not_finite"] and not self.alarmed:
            self.alarmed = True
            self.alarm(self.link.name, rows[0], measured["not_finite"], now_ns)
        return tensor


def statistics(tensor: torch.Tensor) -> dict[str, float]:
    """Return statistics of a tensor.

    `norm` (Euclidean), `mean` and `largest` (magnitude) are those of the finite elements. `not_finite` is the share of
    NaN and infinities.
    """
    wide = tensor.detach().flatten().to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    return {
        "norm": float(finite.norm()),
        "mean": float(finite.mean()) if len(finite) else 0.0,
        "largest": float(finite.abs().max()) if len(finite) else 0.0,
        "not_finite": 1 - len(finite) / len(wide) if len(wide) else 0.0,
    }


class Own:
    """Call a custom function as a tap.

    Raises:
        KindError: the file has no such function.
    """

    def __init__(self, name: str, folder: str | None, edge: str) -> None:
        self._edge = edge
        self._name = name
        self._function: Any = import_name(name, folder)
        if not callable(self._function):
            raise KindError(f"edge {edge}: tap {name}: expected a function of that name, got {self._function!r:.80}")

    def __call__(self, tensor: torch.Tensor, rows: tuple[Row, ...]) -> torch.Tensor:
        """Return the tensor that the function returns, or the given one if it returns None.

        Raises:
            ValueError: the function returned something other than a tensor of that shape and dtype.
        """
        made = self._function(tensor.clone(), rows)  # a copy: other edges carry the original
        if made is None:
            return tensor
        if not isinstance(made, torch.Tensor) or made.shape != tensor.shape or made.dtype != tensor.dtype:
            got = f"{made.dtype}{list(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
            raise ValueError(
                f"edge {self._edge}: tap {self._name}: expected {tensor.dtype}{list(tensor.shape)} or None, got {got}"
            )
        return made


def make(name: str, link: LinkSpec, folder: str | None, put: Put, alarm: Alarm) -> Tap:
    """Make the tap of an edge.

    Raises:
        KindError: there is no function of that name.
    """
    return Statistics(link, put, alarm) if name == STATISTICS else Own(name, folder, link.name)
