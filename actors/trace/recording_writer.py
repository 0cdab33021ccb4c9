"""Write a recording while its actor works (recording_format.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import msgspec
import torch
from safetensors.torch import save_file

from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensors import dtype_name

from ..component.actor import Batch
from ..component.devices import here
from ..component.session import SessionInfo
from ..errors import describe
from ..protocol.host_spec import HostSpec, RecordSpec
from .recording_format import (
    FOLDER,
    HOST,
    INDEX,
    STATE,
    AnyLine,
    ClosedLine,
    EndedLine,
    FullLine,
    OpenedLine,
    RestoredLine,
    RewoundLine,
    StepLine,
    to_line,
)  # fmt: skip

FILE_BYTES = 8 << 20
"""Number of bytes in memory that triggers a write. Each tick of the host writes, too."""
Outputs = Mapping[str, "torch.Tensor | Batch"]


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
        self._put((RewoundLine if rewound else OpenedLine)(info))

    def closed(self, session: int) -> None:
        self._put(ClosedLine(session))

    def restored(self, state: Path) -> None:
        """Record that the actor is restored from the snapshot `state` of a lost one."""
        try:
            if state.exists():
                shutil.copyfile(state, self._folder / STATE)
                self._put(RestoredLine())
        except OSError as error:
            self._stop(error)

    def ended(self) -> None:
        """Record that the host ends in order, so that nothing is missing."""
        self._put(EndedLine())
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
            self._tensors[f"{number}.{name}"] = here(tensor.detach()).clone(memory_format=torch.contiguous_format)
        error = describe(made) if isinstance(made, BaseException) else None
        in_rows = {port: batch.rows_of(port) for port in batch.tensors}
        line = StepLine(number, self._file, batch.rows, in_rows, out_rows, tuple(sorted(kept)), error)
        self._put(line, sum(tensor.nbytes for tensor in kept.values()))

    def _put(self, line: AnyLine, nbytes: int = 0) -> None:
        """Add a line. `nbytes` is the size of its tensors. A line that would exceed the limit ends the recording."""
        if self.full:
            return
        data = to_line(line) + b"\n"
        if self._written_bytes + self._held_bytes + len(data) + nbytes > self._ports.most_bytes:
            if isinstance(line, StepLine):
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
            self._append(to_line(FullLine(self.full)) + b"\n")

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
    return not tensor.is_meta and tensor.layout is torch.strided
