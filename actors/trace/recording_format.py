"""Define the files of a recording: the inputs and outputs of one actor, enough to run the same steps again elsewhere.

The folder `record/<actor>.<replica>/` of a run holds:

- `host.json`: how the actor is loaded.
- `index.jsonl`: one line for each session that opened, was rewound or closed, for each step, for a restored snapshot,
  and for the end, in their order.
- `00000.safetensors`, …: the tensors.

A step is written whole or not at all. The first event that would exceed the limit is left out, with everything after
it: a recording with a gap could not be replayed.
"""

from __future__ import annotations

import msgspec

from ranvier.transport.format.header import Row

from ..component.session import SessionInfo

FOLDER, INDEX, HOST, STATE = "record", "index.jsonl", "host.json", "state.safetensors"
MOST_HOST_BYTES, MOST_INDEX_BYTES = 16 << 20, 1 << 30


class Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """Represent one line of the index."""


class OpenedLine(Line, frozen=True, tag="open"):
    """Mark that a session opened."""

    info: SessionInfo


class RewoundLine(Line, frozen=True, tag="rewind"):
    """Mark that a session was rewound, and continues in a later epoch."""

    info: SessionInfo


class ClosedLine(Line, frozen=True, tag="close"):
    """Mark that a session closed."""

    session: int


class StepLine(Line, frozen=True, tag="step"):
    """Describe a step.

    `tensors` names the recorded tensors as `in.port` and `out.port`. In the file their names are `<step>.in.port` and
    so on.
    """

    step: int
    file: str
    rows: tuple[Row, ...]
    in_rows: dict[str, tuple[Row, ...]]
    out_rows: dict[str, tuple[Row, ...]]
    tensors: tuple[str, ...]
    error: str | None


class RestoredLine(Line, frozen=True, tag="restored"):
    """Mark that the actor was restored from the file `STATE`."""


class FullLine(Line, frozen=True, tag="full"):
    """Mark that nothing more is recorded, and why."""

    why: str


class EndedLine(Line, frozen=True, tag="ended"):
    """Mark that the host ended in order."""


AnyLine = OpenedLine | RewoundLine | ClosedLine | StepLine | RestoredLine | FullLine | EndedLine
to_line = msgspec.json.Encoder().encode
of_line = msgspec.json.Decoder(AnyLine).decode
