"""Record the inputs and outputs of one actor: enough to run the same steps again, alone, elsewhere.

The folder `record/<actor>.<replica>/` of a run holds:

- `host.json`: how the actor is loaded.
- `index.jsonl`: one line for each session that opened, was rewound or closed, for each step, for a restored snapshot,
  and for the end, in their order.
- `00000.safetensors`, …: the tensors.

A step is written whole or not at all. The first event that would exceed the limit is left out, with everything after
it: a recording with a gap could not be replayed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ranvier.transport.files import read_bounded, regular
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import dtype_name

from ..component.actor import Batch
from ..component.session import SessionInfo
from ..errors import RecordingError, describe
from ..protocol.host_spec import HostSpec, RecordSpec

FOLDER, INDEX, HOST, STATE = "record", "index.jsonl", "host.json", "state.safetensors"
MOST_HOST_BYTES, MOST_INDEX_BYTES = 16 << 20, 1 << 30
FILE_BYTES = 8 << 20
"""Number of bytes in memory that triggers a write. Each tick of the host writes, too."""
Outputs = Mapping[str, "torch.Tensor | Batch"]


class _Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """Represent one line of the index."""


class _Opened(_Line, frozen=True, tag="open"):
    info: SessionInfo


class _Rewound(_Line, frozen=True, tag="rewind"):
    info: SessionInfo


class _Closed(_Line, frozen=True, tag="close"):
    session: int


class _Step(_Line, frozen=True, tag="step"):
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


class _Restored(_Line, frozen=True, tag="restored"):
    """Mark that the actor was restored from the file `STATE`."""


class _Full(_Line, frozen=True, tag="full"):
    why: str


class _Ended(_Line, frozen=True, tag="ended"):
    """Mark that the host ended in order."""


_Any = _Opened | _Rewound | _Closed | _Step | _Restored | _Full | _Ended
_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(_Any).decode


class Recording:
    """Write a recording, on the step thread.

    It copies what it keeps, because actors and links reuse their memory. An error ends the recording, never a step.
    """

    def __init__(self, spec: HostSpec, record: RecordSpec) -> None:
        self._folder = Path(spec.run_dir) / FOLDER / spec.file
        self._ports = record
        self._lines: list[bytes] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._held_bytes = self._written_bytes = 0
        self._steps = self._files = 0
        self.full = ""
        """The reason why nothing more is recorded; empty while the recording continues."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / HOST).write_bytes(msgspec.json.encode(spec))
        except OSError as error:
            self._stop(error)

    @property
    def _file(self) -> str:
        return f"{self._files:05d}.safetensors"

    def opened(self, info: SessionInfo, rewound: bool) -> None:
        self._put((_Rewound if rewound else _Opened)(info))

    def closed(self, session: int) -> None:
        self._put(_Closed(session))

    def restored(self, state: Path) -> None:
        """Record that the actor is restored from the snapshot `state` of a lost one."""
        try:
            if state.exists():
                shutil.copyfile(state, self._folder / STATE)
                self._put(_Restored())
        except OSError as error:
            self._stop(error)

    def ended(self) -> None:
        """Record that the host ends in order, so that nothing is missing."""
        self._put(_Ended())
        self.flush()

    def stepped(self, batch: Batch, made: Outputs | BaseException) -> None:
        """Record a step. `made` is its outputs, or the error that it raised."""
        if self.full:
            return
        try:
            self._keep(batch, made)
        except Exception as error:
            self._stop(error)

    def _keep(self, batch: Batch, made: Outputs | BaseException) -> None:
        kept = {f"in.{port}": batch[port] for port in batch.tensors if port in self._ports.inputs}
        out_rows: dict[str, tuple[Row, ...]] = {}
        for port, output in ({} if isinstance(made, BaseException) else made).items():
            own = output if isinstance(output, Batch) else Batch(batch.rows, {port: output})
            tensor = own.tensors.get(port)
            if not _is_sent(tensor):
                continue  # not a valid output: sending it will raise
            out_rows[port] = own.rows_of(port)
            if port in self._ports.outputs:
                kept[f"out.{port}"] = tensor
        number, self._steps = self._steps, self._steps + 1
        for name, tensor in kept.items():
            self._tensors[f"{number}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        error = describe(made) if isinstance(made, BaseException) else None
        in_rows = {port: batch.rows_of(port) for port in batch.tensors}
        line = _Step(number, self._file, batch.rows, in_rows, out_rows, tuple(sorted(kept)), error)
        self._put(line, sum(tensor.nbytes for tensor in kept.values()))

    def _put(self, line: _Any, nbytes: int = 0) -> None:
        """Add a line. `nbytes` is the size of its tensors. A line that would exceed the limit ends the recording."""
        if self.full:
            return
        data = _to_line(line) + b"\n"
        if self._written_bytes + self._held_bytes + len(data) + nbytes > self._ports.most_bytes:
            if isinstance(line, _Step):
                for name in line.tensors:
                    del self._tensors[f"{line.step}.{name}"]
            self.flush()
            if not self.full:
                self._stop(f"it reached the limit of {self._ports.most_bytes >> 20} MiB; raise record.megabytes")
            return
        self._lines.append(data)
        self._held_bytes += len(data) + nbytes

    def write_if_due(self) -> None:
        if self._held_bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory: the tensors first, then the lines that name them."""
        if self.full or not self._lines:
            return
        lines, tensors = self._lines, self._tensors
        self._lines, self._tensors = [], {}
        self._written_bytes, self._held_bytes = self._written_bytes + self._held_bytes, 0
        try:
            if tensors:
                save_file(tensors, self._folder / self._file)
            self._append(b"".join(lines))
            self._files += bool(tensors)
        except Exception as error:
            self._stop(error)

    def _stop(self, why: Exception | str) -> None:
        self.full = why if isinstance(why, str) else f"it cannot be written: {why}"
        with contextlib.suppress(OSError):
            (self._folder / self._file).unlink(missing_ok=True)  # no line names it
        with contextlib.suppress(OSError):  # if it cannot be written, the reader notices that the last line is missing
            self._append(_to_line(_Full(self.full)) + b"\n")

    def _append(self, data: bytes) -> None:
        """Append all of `data` to the index, or nothing: part of a line must not remain."""
        index = self._folder / INDEX
        before = index.stat().st_size if index.exists() else 0
        try:
            with index.open("ab") as file:
                file.write(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(index, before)
            raise


def _is_sent(tensor: object) -> TypeGuard[torch.Tensor]:
    if not isinstance(tensor, torch.Tensor) or dtype_name(tensor.dtype) not in BY_NAME:
        return False
    return tensor.is_cpu and tensor.layout is torch.strided


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
            self._lines = [_of_line(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
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
            if isinstance(line, _Full):
                return line.why
            if isinstance(line, _Ended):
                return ""
        return "its host was lost, or the run has not ended"

    @property
    def steps(self) -> int:
        return sum(isinstance(line, _Step) for line in self._lines)

    @property
    def sessions(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return each session as often as it opened or was rewound, with the token ids known at that time."""
        infos = [line.info for line in self._lines if isinstance(line, _Opened | _Rewound)]
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
                case _Opened() | _Rewound():
                    yield Session(line.info, isinstance(line, _Rewound))
                case _Closed():
                    yield Closed(line.session)
                case _Restored():
                    yield Restored(self._read(STATE))
                case _Step():
                    if line.tensors and line.file != opened:
                        opened, tensors = line.file, self._read(line.file)
                    yield self._step(line, tensors)

    def _step(self, line: _Step, tensors: Mapping[str, torch.Tensor]) -> RecordedStep:
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
