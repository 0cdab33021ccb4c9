"""Read a recording (recording_format.py), for replays and comparisons. It may come from an untrusted source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ranvier.transport.files import read_bounded, regular
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import dtype_name

from ..component.actor import Batch
from ..component.session import SessionInfo
from ..errors import RecordingError
from ..protocol.host_spec import HostSpec
from .recording_format import (
    FOLDER,
    HOST,
    INDEX,
    MOST_HOST_BYTES,
    MOST_INDEX_BYTES,
    STATE,
    ClosedLine,
    EndedLine,
    FullLine,
    OpenedLine,
    RestoredLine,
    RewoundLine,
    StepLine,
    of_line,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Hold one recorded step. `inputs` and `outputs` contain the recorded ports. `error` is set if the step failed."""

    number: int
    rows: tuple[Row, ...]
    inputs: Mapping[str, Batch]
    outputs: Mapping[str, Batch]
    error: str | None

    @property
    def batch(self) -> Batch:
        """Return the batch that the actor was given."""
        own = {port: batch.rows for port, batch in self.inputs.items() if batch.rows != self.rows}
        return Batch(self.rows, {port: batch[port] for port, batch in self.inputs.items()}, own)


@dataclass(frozen=True, slots=True)
class Session:
    """Describe a session that opened, or that was `rewound` and continued in a later epoch."""

    info: SessionInfo
    rewound: bool


@dataclass(frozen=True, slots=True)
class Closed:
    session: int


@dataclass(frozen=True, slots=True)
class Restored:
    """Hold the snapshot that the actor was restored from."""

    state: Mapping[str, torch.Tensor]


Event = RecordedStep | Session | Closed | Restored


class Recorded:
    """Read a recording.

    Raises:
        RecordingError: the folder has no recording, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.host = msgspec.json.decode(read_bounded(folder / HOST, MOST_HOST_BYTES), type=HostSpec)
            data = read_bounded(folder / INDEX, MOST_INDEX_BYTES) if (folder / INDEX).exists() else b""
            self._lines = [of_line(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise RecordingError(f"{folder}: no recording of an actor, or a damaged one: {error}") from None
        if self.host.record is None:
            raise RecordingError(f"{folder / HOST}: expected the recorded ports in `record`, got null")
        self.ports = self.host.record

    @property
    def name(self) -> str:
        """Return the host's label, followed by its epoch if that is not the first."""
        return self.folder.name

    @property
    def ends_early(self) -> str:
        """Return why the recording ends before its host did; empty if it is complete."""
        for line in reversed(self._lines):
            if isinstance(line, FullLine):
                return line.why
            if isinstance(line, EndedLine):
                return ""
        return "its host was lost, or the run has not ended"

    @property
    def steps(self) -> int:
        return sum(isinstance(line, StepLine) for line in self._lines)

    @property
    def sessions(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return each session as often as it opened or was rewound, with the token ids known at that time."""
        infos = [line.info for line in self._lines if isinstance(line, OpenedLine | RewoundLine)]
        return [(info.session, info.log) for info in infos]

    def needs_inputs(self) -> None:
        """Check that every input was recorded.

        Raises:
            RecordingError: an input was not recorded, so no step can be run again.
        """
        missing = [port.name for port in self.host.inputs if port.name not in self.ports.inputs]
        if missing:
            raise RecordingError(
                f"{self.name}: expected all inputs to be recorded, missing {', '.join(missing)}; "
                f"run it with --record {self.host.actor}"
            )

    def events(self) -> Iterator[Event]:
        """Yield all events in order. A file of tensors is read when its first step is reached.

        Raises:
            RecordingError: a file is damaged, or a tensor is not what its port takes.
        """
        tensors: Mapping[str, torch.Tensor] = {}
        opened = ""
        for line in self._lines:
            match line:
                case OpenedLine() | RewoundLine():
                    yield Session(line.info, isinstance(line, RewoundLine))
                case ClosedLine():
                    yield Closed(line.session)
                case RestoredLine():
                    yield Restored(self._read(STATE))
                case StepLine():
                    if line.tensors and line.file != opened:
                        opened, tensors = line.file, self._read(line.file)
                    yield self._step(line, tensors)

    def _step(self, line: StepLine, tensors: Mapping[str, torch.Tensor]) -> RecordedStep:
        sides: dict[str, dict[str, Batch]] = {"in": {}, "out": {}}
        specs = {port.name: port.tensor for port in self.host.inputs}
        for side, rows_of in (("in", line.in_rows), ("out", line.out_rows)):
            for port, rows in rows_of.items():
                if f"{side}.{port}" in line.tensors:
                    name = f"{line.step}.{side}.{port}"
                    if name not in tensors:
                        raise RecordingError(f"{self.folder / line.file}: tensor {name} is missing")
                    tensor = tensors[name]
                    if side == "in":
                        self._check(specs, port, rows, tensor)
                    sides[side][port] = Batch(rows, {port: tensor})
        return RecordedStep(line.step, line.rows, sides["in"], sides["out"], line.error)

    def _check(self, specs: Mapping[str, TensorSpec], port: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> None:
        """Check an input as a link would. A recording may come from an untrusted source."""
        sizes = {"tokens": sum(row.tokens for row in rows), "rows": len(rows)}
        try:
            specs[port].check(port, dtype_name(tensor.dtype), tuple(tensor.shape), sizes)
        except (KeyError, ProtocolError) as error:
            raise RecordingError(f"{self.folder}: {error}") from None

    def _read(self, name: str) -> Mapping[str, torch.Tensor]:
        if Path(name).name != name:
            raise RecordingError(f"{self.folder / INDEX}: expected the name of a file in this folder, got {name!r:.80}")
        try:
            return load_file(regular(self.folder / name))
        except (OSError, SafetensorError) as error:
            raise RecordingError(f"{self.folder / name}: {error}") from None


def recordings(run_dir: Path) -> list[Recorded]:
    """Return all recordings of a run, sorted by name.

    Raises:
        RecordingError: the run has none.
    """
    found = sorted(path.parent for path in (run_dir / FOLDER).glob(f"*/{HOST}"))
    if not found:
        raise RecordingError(f"{run_dir}: nothing was recorded; run it with --record all")
    return [Recorded(path) for path in found]
