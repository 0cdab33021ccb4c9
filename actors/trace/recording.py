"""What one actor was given and what it made, kept as it happened: enough to take the same steps again, alone, elsewhere.

`record/<actor>.<replica>/` of the run folder: `host.json` (how the actor is loaded), `index.jsonl` (a line for each session
that opened, went on or closed, for each step, and for the end, in their order), `00000.safetensors`, … (the tensors). A
step is written whole or not at all. What would go over the bound is left out, with all that comes after it: a hole could not
be replayed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

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
from ..errors import RecordingError, told
from ..protocol.host_spec import HostSpec, RecordSpec

FOLDER, INDEX, HOST, STATE = "record", "index.jsonl", "host.json", "state.safetensors"
MOST_HOST_BYTES, MOST_INDEX_BYTES = 16 << 20, 1 << 30
FILE_BYTES = 8 << 20
"""What is held is written when it is so much, and with every tick."""
Outputs = Mapping[str, "torch.Tensor | Batch"]


class _Line(msgspec.Struct, frozen=True, tag_field="kind"):
    """One line of the index."""


class _Opened(_Line, frozen=True, tag="open"):
    info: dict[str, Any]


class _Rewound(_Line, frozen=True, tag="rewind"):
    info: dict[str, Any]


class _Closed(_Line, frozen=True, tag="close"):
    session: int


class _Step(_Line, frozen=True, tag="step"):
    """`tensors`: `in.port` and `out.port` of those that were kept, in the file as `<step>.in.port`."""

    step: int
    file: str
    rows: tuple[Row, ...]
    in_rows: dict[str, tuple[Row, ...]]
    out_rows: dict[str, tuple[Row, ...]]
    tensors: tuple[str, ...]
    error: str | None


class _Restored(_Line, frozen=True, tag="restored"):
    """The actor went on with what is in the file `STATE`."""


class _Full(_Line, frozen=True, tag="full"):
    why: str


class _Ended(_Line, frozen=True, tag="ended"):
    """The host ended in order."""


_Any = _Opened | _Rewound | _Closed | _Step | _Restored | _Full | _Ended
_to_line = msgspec.json.Encoder().encode
_of_line = msgspec.json.Decoder(_Any).decode


class Recording:
    """The writing end, on the step thread: it copies what it keeps, since actors and links use their memory again. Whatever
    goes wrong with it ends the recording, never a step."""

    def __init__(self, spec: HostSpec, record: RecordSpec) -> None:
        self._folder = Path(spec.run_dir) / FOLDER / spec.file
        self._ports = record
        self._lines: list[bytes] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._held_bytes = self._written_bytes = 0
        self._steps = self._files = 0
        self.full = ""
        """Why nothing more is kept."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / HOST).write_text(json.dumps(spec.to_plain()))
        except OSError as error:
            self._stop(error)

    @property
    def _file(self) -> str:
        return f"{self._files:05d}.safetensors"

    def opened(self, info: SessionInfo, rewound: bool) -> None:
        self._put((_Rewound if rewound else _Opened)(info.to_plain()))

    def closed(self, session: int) -> None:
        self._put(_Closed(session))

    def restored(self, state: Path) -> None:
        """The actor is to go on with what another one saved."""
        try:
            if state.exists():
                shutil.copyfile(state, self._folder / STATE)
                self._put(_Restored())
        except OSError as error:
            self._stop(error)

    def ended(self) -> None:
        """The host ends in order: nothing is missing."""
        self._put(_Ended())
        self.flush()

    def stepped(self, batch: Batch, made: Outputs | BaseException) -> None:
        """A step was taken, or failed: then it has an error and no outputs."""
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
                continue  # which is no output of a step: whoever sends it will say so
            out_rows[port] = own.rows_of(port)
            if port in self._ports.outputs:
                kept[f"out.{port}"] = tensor
        number, self._steps = self._steps, self._steps + 1
        for name, tensor in kept.items():
            self._tensors[f"{number}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        error = told(made) if isinstance(made, BaseException) else None
        in_rows = {port: batch.rows_of(port) for port in batch.tensors}
        line = _Step(number, self._file, batch.rows, in_rows, out_rows, tuple(sorted(kept)), error)
        self._put(line, sum(tensor.nbytes for tensor in kept.values()))

    def _put(self, line: _Any, nbytes: int = 0) -> None:
        """A line and the bytes of its tensors. What would go over the bound is left out, and all that would come after it."""
        if self.full:
            return
        data = _to_line(line) + b"\n"
        if self._written_bytes + self._held_bytes + len(data) + nbytes > self._ports.most_bytes:
            if isinstance(line, _Step):
                for name in line.tensors:
                    del self._tensors[f"{line.step}.{name}"]
            self.flush()
            if not self.full:
                self._stop(f"the bound of {self._ports.most_bytes >> 20} MiB is reached (record.megabytes)")
            return
        self._lines.append(data)
        self._held_bytes += len(data) + nbytes

    def write_if_due(self) -> None:
        if self._held_bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held: the tensors first, then the lines that name them."""
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
            (self._folder / self._file).unlink(missing_ok=True)  # of which no line tells
        with contextlib.suppress(OSError):  # then it just ends, which its reader sees by the line that is missing
            self._append(_to_line(_Full(self.full)) + b"\n")

    def _append(self, data: bytes) -> None:
        """All of it, or nothing: the beginning of a line must not stay."""
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
class Step:
    """One step of a recording. Tensors by port; ports that were not recorded have rows, but no tensor. `error`: it failed."""

    number: int
    rows: tuple[Row, ...]
    inputs: Mapping[str, Batch]
    outputs: Mapping[str, Batch]
    error: str | None

    @property
    def batch(self) -> Batch:
        """What the actor is given."""
        own = {port: batch.rows for port, batch in self.inputs.items() if batch.rows != self.rows}
        return Batch(self.rows, {port: batch[port] for port, batch in self.inputs.items()}, own)


@dataclass(frozen=True, slots=True)
class Session:
    """A session opened, or went on in a later epoch (`rewound`)."""

    info: SessionInfo
    rewound: bool


@dataclass(frozen=True, slots=True)
class Closed:
    session: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The actor was given what another one had saved."""

    state: Mapping[str, torch.Tensor]


Event = Step | Session | Closed | Restored


class Recorded:
    """The reading end.

    Raises:
        RecordingError: there is none in that folder, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.host = HostSpec.from_plain(json.loads(read_bounded(folder / HOST, MOST_HOST_BYTES)))
            data = read_bounded(folder / INDEX, MOST_INDEX_BYTES) if (folder / INDEX).exists() else b""
            self._lines = [_of_line(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecordingError(f"{folder}: no recording of an actor, or a damaged one: {error}") from None
        if self.host.record is None:
            raise RecordingError(f"{folder / HOST}: says nothing of what was recorded")
        self.ports = self.host.record

    @property
    def name(self) -> str:
        """The host's label and, if it is not the first there, its epoch."""
        return self.folder.name

    @property
    def ends_early(self) -> str:
        """Why it ends before its host did; empty if it does not."""
        for line in reversed(self._lines):
            if isinstance(line, _Full):
                return line.why
            if isinstance(line, _Ended):
                return ""
        return "its host was lost, or the run goes on"

    @property
    def steps(self) -> int:
        return sum(isinstance(line, _Step) for line in self._lines)

    @property
    def sessions(self) -> list[tuple[int, tuple[int, ...]]]:
        """Those that opened, each as often as it did, with what was known of their tokens."""
        infos = [self._info(line.info) for line in self._lines if isinstance(line, _Opened | _Rewound)]
        return [(info.session, info.log) for info in infos]

    def needs_inputs(self) -> None:
        """
        Raises:
            RecordingError: an input was not recorded, so no step can be taken again.
        """
        missing = [port.name for port in self.host.inputs if port.name not in self.ports.inputs]
        if missing:
            raise RecordingError(
                f"{self.name}: expected all inputs to be recorded, {', '.join(missing)} of it was not; "
                f"run it with --record {self.host.actor}"
            )

    def events(self) -> Iterator[Event]:
        """All that happened, in order; tensors are read as they are come to.

        Raises:
            RecordingError: a file is damaged, or a tensor is not what its port takes.
        """
        tensors: Mapping[str, torch.Tensor] = {}
        opened = ""
        for line in self._lines:
            match line:
                case _Opened() | _Rewound():
                    yield Session(self._info(line.info), isinstance(line, _Rewound))
                case _Closed():
                    yield Closed(line.session)
                case _Restored():
                    yield Restored(self._read(STATE))
                case _Step():
                    if line.tensors and line.file != opened:
                        opened, tensors = line.file, self._read(line.file)
                    yield self._step(line, tensors)

    def _info(self, plain: dict[str, Any]) -> SessionInfo:
        try:
            return SessionInfo.from_plain(plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordingError(f"{self.folder / INDEX}: a session is damaged: {error}") from None

    def _step(self, line: _Step, tensors: Mapping[str, torch.Tensor]) -> Step:
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
        return Step(line.step, line.rows, sides["in"], sides["out"], line.error)

    def _check(self, specs: Mapping[str, TensorSpec], port: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> None:
        """A folder may come from anybody: what is given to an actor is what a link would have let in."""
        sizes = {"tokens": sum(row.tokens for row in rows), "rows": len(rows)}
        try:
            specs[port].check(port, dtype_name(tensor.dtype), tuple(tensor.shape), sizes)
        except (KeyError, ProtocolError) as error:
            raise RecordingError(f"{self.folder}: {error}") from None

    def _read(self, name: str) -> Mapping[str, torch.Tensor]:
        if Path(name).name != name:
            raise RecordingError(f"{self.folder / INDEX}: expected a file of its own folder, got {name!r:.80}")
        try:
            return load_file(regular(self.folder / name))
        except (OSError, SafetensorError) as error:
            raise RecordingError(f"{self.folder / name}: {error}") from None


def recordings(run_dir: Path) -> list[Recorded]:
    """All of a run, in no order that means anything.

    Raises:
        RecordingError: it has none.
    """
    found = sorted(path.parent for path in (run_dir / FOLDER).glob(f"*/{HOST}"))
    if not found:
        raise RecordingError(f"{run_dir}: nothing was recorded; run it with --record all")
    return [Recorded(path) for path in found]
