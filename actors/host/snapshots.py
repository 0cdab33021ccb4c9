"""Save what an actor keeps beyond its sessions, so that its replacement can continue from it.

A snapshot is a safetensors file in the run folder, replaced as a whole. The step thread takes it before the outputs of
the step go out. So with `snapshot_s: 0`, the state behind every output that anyone sees is saved.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ranvier.transport.files import regular
from ranvier.transport.format.aligned import each_aligned

from ..component.actor import Actor


class Snapshots:
    """Take the snapshots of one actor that offers them.

    Args:
        actor: the actor, which defines `snapshot`.
        file: the path of the snapshot.
        every_s: at least this many seconds lie between two snapshots; 0: one after every step.
        failed: called with the error if the actor's `snapshot` raises, or the file cannot be written. The previous
            snapshot remains, and the next one is taken after `every_s`.
    """

    def __init__(self, actor: Actor, file: Path, every_s: float, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._actor = actor
        self._file = file
        self._every_s = every_s
        self._due_s = 0.0
        self._changed = False

    @classmethod
    def of(cls, actor: Actor, file: Path, every_s: float, failed: Callable[[Exception], None]) -> Snapshots | None:
        """Return the snapshots of an actor, or None if it does not define `snapshot`."""
        return cls(actor, file, every_s, failed) if type(actor).snapshot is not Actor.snapshot else None

    def on_step(self) -> None:
        """Note that the actor has taken a step or closed a session. Save its state if a snapshot is due."""
        self._changed = True
        self.on_tick()

    def on_tick(self) -> None:
        """Save the state if it has changed and a snapshot is due."""
        if self._changed and time.monotonic() >= self._due_s:
            self.take()

    def take(self) -> None:
        """Save the present state. On an error, call `failed`."""
        self._due_s = time.monotonic() + self._every_s
        part = self._file.with_suffix(".part")
        try:
            state = {name: tensor.contiguous() for name, tensor in self._actor.snapshot().items()}
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            save_file(state, part)
            part.replace(self._file)
        except Exception as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self._failed(error)
            return
        self._changed = False

    def restore(self, file: Path) -> None:
        """Restore the actor from the snapshot of a lost one, and save it as this actor's own.

        Does nothing if there is no such file: the lost actor ended before its first snapshot.

        Raises:
            ValueError: the file cannot be read.
        """
        if not file.exists():
            return
        try:
            state = load_file(regular(file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"snapshot {file.name}: {error}") from error
        self._actor.restore(each_aligned(state))
        self.take()
