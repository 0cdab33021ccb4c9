"""What one actor was given and what it made, kept as it happened: enough to take the same steps again, alone, elsewhere.

`record/<actor>.<replica>/` of the run folder: `host.json` (how the actor is loaded), `index.jsonl` (a line for each session
that opened, went on or closed, and for each step, in their order), `00000.safetensors`, … (the tensors). A step is written
whole or not at all. What would go over the bound is left out, and everything after it: a hole could not be replayed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ranvier.transport.header import Row

from .actor import Batch
from .errors import RecordingError
from .session import SessionInfo
from .spec import HostSpec, RecordSpec

FOLDER, INDEX, HOST, STATE = "record", "index.jsonl", "host.json", "state.safetensors"
FILE_BYTES = 8 << 20
"""A file of tensors has about so many."""
OPENED, REWOUND, CLOSED, STEP, RESTORED, FULL = "open", "rewind", "close", "step", "restored", "full"
Outputs = Mapping[str, "torch.Tensor | Batch"]


class Recording:
    """The writing end, on the step thread: it copies what it keeps, since actors and links use their memory again."""

    def __init__(self, spec: HostSpec, record: RecordSpec) -> None:
        self._folder = Path(spec.run_dir) / FOLDER / spec.file
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / HOST).write_text(json.dumps(spec.to_plain()))
        self._ports = record
        self._lines: list[Mapping[str, Any]] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._held_bytes = self._written_bytes = 0
        self._steps = self._files = 0
        self.full = ""
        """Why nothing more is kept."""

    @property
    def _file(self) -> str:
        return f"{self._files:05d}.safetensors"

    def opened(self, info: SessionInfo, rewound: bool) -> None:
        self._put({"kind": REWOUND if rewound else OPENED, "info": info.to_plain()})

    def closed(self, session: int) -> None:
        self._put({"kind": CLOSED, "session": session})

    def restored(self, state: Path) -> None:
        """The actor has gone on with what another one saved."""
        if state.exists():
            shutil.copyfile(state, self._folder / STATE)
            self._put({"kind": RESTORED})

    def stepped(self, batch: Batch, made: Outputs | Exception) -> None:
        """A step was taken, or failed: then it has an error and no outputs."""
        if self.full:
            return
        number, self._steps = self._steps, self._steps + 1
        rows: dict[str, Sequence[Row]] = {port: batch.rows_of(port) for port in batch.tensors}
        kept = {f"in.{port}": batch[port] for port in batch.tensors if port in self._ports.inputs}
        outputs = {} if isinstance(made, Exception) else made
        out_rows: dict[str, Sequence[Row]] = {}
        for port, output in outputs.items():
            own = output if isinstance(output, Batch) else Batch(batch.rows, {port: output})
            out_rows[port] = own.rows_of(port)
            if port in self._ports.outputs:
                kept[f"out.{port}"] = own[port]
        size = sum(tensor.nbytes for tensor in kept.values())
        if self._written_bytes + self._held_bytes + size > self._ports.most_bytes:
            self._end(f"the bound of {self._ports.most_bytes >> 20} MiB is reached (record.megabytes)")
            return
        for name, tensor in kept.items():
            self._tensors[f"{number}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._held_bytes += size
        self._put({
            "kind": STEP, "step": number, "file": self._file, "rows": batch.rows, "in_rows": rows, "out_rows": out_rows,
            "tensors": sorted(kept), "error": f"{type(made).__name__}: {made}" if isinstance(made, Exception) else None,
        })  # fmt: skip
        if self._held_bytes >= FILE_BYTES:
            self.flush()

    def _put(self, line: Mapping[str, Any]) -> None:
        if not self.full:
            self._lines.append(line)

    def _end(self, why: str) -> None:
        self.flush()
        self.full = why
        self._append([{"kind": FULL, "why": why}])

    def flush(self) -> None:
        """Write what is held. A disk that is full ends the recording, never a step."""
        if self.full or not self._lines:
            return
        lines, tensors = self._lines, self._tensors
        self._lines, self._tensors = [], {}
        self._written_bytes, self._held_bytes = self._written_bytes + self._held_bytes, 0
        try:
            if tensors:
                save_file(tensors, self._folder / self._file)
                self._files += 1
        except (OSError, SafetensorError) as error:
            (self._folder / self._file).unlink(missing_ok=True)
            self.full = f"it cannot be written: {error}"
        if self.full:  # the tensors of these steps are not there
            self._append([{"kind": FULL, "why": self.full}])
        else:
            self._append(lines)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        index = self._folder / INDEX
        before = index.stat().st_size if index.exists() else 0
        try:
            with index.open("ab") as file:
                file.write(msgspec.json.Encoder().encode_lines(lines))
        except OSError as error:
            self.full = f"it cannot be written: {error}"
            with index.open("r+b") as file:
                file.truncate(before)


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
        RecordingError: there is none in that folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.host = HostSpec.from_plain(json.loads((folder / HOST).read_text()))
            lines = (folder / INDEX).read_bytes().splitlines() if (folder / INDEX).exists() else []
            self._lines: list[Mapping[str, Any]] = [msgspec.json.decode(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordingError(f"{folder}: no recording of an actor: {error}") from None
        assert self.host.record is not None
        self.ports = self.host.record

    @property
    def name(self) -> str:
        """The host's label and, if it is not the first there, its epoch."""
        return self.folder.name

    @property
    def ends_early(self) -> str:
        """Why it ends before the run did; empty if it does not."""
        return next((str(line["why"]) for line in self._lines if line["kind"] == FULL), "")

    @property
    def steps(self) -> int:
        return sum(line["kind"] == STEP for line in self._lines)

    def sessions(self) -> list[SessionInfo]:
        """Those that opened, each as often as it did."""
        return [SessionInfo.from_plain(line["info"]) for line in self._lines if line["kind"] in (OPENED, REWOUND)]

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
            RecordingError: a file is damaged.
        """
        try:
            yield from self._events()
        except (KeyError, TypeError, ValueError) as error:
            raise RecordingError(f"{self.folder / INDEX}: a line is damaged: {type(error).__name__}: {error}") from None

    def _events(self) -> Iterator[Event]:
        tensors: Mapping[str, torch.Tensor] = {}
        opened = ""
        for line in self._lines:
            kind = line["kind"]
            if kind in (OPENED, REWOUND):
                yield Session(SessionInfo.from_plain(line["info"]), kind == REWOUND)
            elif kind == RESTORED:
                yield Restored(self._read(STATE))
            elif kind == CLOSED:
                yield Closed(line["session"])
            elif kind == STEP:
                if line["tensors"] and line["file"] != opened:
                    opened, tensors = line["file"], self._read(line["file"])
                yield self._step(line, tensors)

    def _step(self, line: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Step:
        number = line["step"]
        sides: dict[str, dict[str, Batch]] = {"in": {}, "out": {}}
        for side, rows_of in (("in", line["in_rows"]), ("out", line["out_rows"])):
            for port, rows in rows_of.items():
                if f"{side}.{port}" in line["tensors"]:
                    name = f"{number}.{side}.{port}"
                    if name not in tensors:
                        raise RecordingError(f"{self.folder / line['file']}: tensor {name} is missing")
                    sides[side][port] = Batch(_rows(rows), {port: tensors[name]})
        return Step(number, _rows(line["rows"]), sides["in"], sides["out"], line["error"])

    def _read(self, name: str) -> Mapping[str, torch.Tensor]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError) as error:
            raise RecordingError(f"{self.folder / name}: {error}") from None


def _rows(plain: Sequence[Sequence[int]]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in plain)


def recordings(run_dir: Path) -> list[Recorded]:
    """All of a run, in no order that means anything.

    Raises:
        RecordingError: it has none.
    """
    found = sorted(path.parent for path in (run_dir / FOLDER).glob(f"*/{HOST}"))
    if not found:
        raise RecordingError(f"{run_dir}: nothing was recorded; run it with --record all")
    return [Recorded(path) for path in found]
