"""What an actor keeps beyond its sessions, saved so that one in its place can go on with it.

A snapshot is a safetensors file of the run folder, replaced whole. It is taken on the step thread, before the outputs of the
step go out: with `snapshot_s: 0` whoever sees an output can rely on it that the state it came from is not lost.
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
    """Of one actor that offers them.

    Args:
        file: where they go.
        every_s: at most so often, in seconds; 0: after every step.
        failed: called with what went wrong: the actor's `snapshot`, or a full disk. The snapshot before stands, and the next
            one comes in its time.
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
        """None if the actor has nothing to save."""
        return cls(actor, file, every_s, failed) if type(actor).snapshot is not Actor.snapshot else None

    def on_step(self) -> None:
        """The actor has taken a step, or ended a session."""
        self._changed = True
        self.on_tick()

    def on_tick(self) -> None:
        """Save what has changed, if it is time."""
        if self._changed and time.monotonic() >= self._due_s:
            self.take()

    def take(self) -> None:
        """Save the present state, or say that it failed."""
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
        """Go on with what another one has saved, and save it as one's own. Nothing happens if there is no such file: that one
        was lost before its first.

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
