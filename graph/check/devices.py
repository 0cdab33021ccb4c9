"""Check that the GPUs which actors name are there, and that their weights fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component import devices
from ranvier.actors.component.devices import Gpu, NoDevice

from .checked import CheckedActor
from .findings import Findings

GIB = 1 << 30


class DeviceCheck(Findings):
    """Check the keys `device`."""

    def devices(self, actors: Mapping[str, CheckedActor], checkpoint: Checkpoint | None) -> list[str]:
        """Report what cannot be, and return warnings about what the user may want otherwise."""
        placed: dict[int, list[CheckedActor]] = {}
        for actor in actors.values():
            number = devices.number_of(actor.section.device)
            if number is not None:
                placed.setdefault(number, []).append(actor)
        warnings: list[str] = []
        for together in placed.values():
            gpu = self._there(together)
            if gpu is not None:
                self._fits(together, gpu, checkpoint)
                self._keys(together)
                warnings += self._shares(together)
        return warnings

    def _there(self, actors: list[CheckedActor]) -> Gpu | None:
        try:
            return devices.gpu(actors[0].section.device)
        except NoDevice as error:
            for actor in actors:
                self._no(actor, f"{error}, or remove the key")
            return None

    def _keys(self, actors: list[CheckedActor]) -> None:
        """Report what is not computed on a GPU."""
        model = self.file.model
        uses_model = [actor for actor in actors if actor.kind.uses_model]
        if uses_model and model is not None and model.products == "repeatable" and model.dtype != "float32":
            self._no(
                uses_model[0], "products repeatable needs the processor's kernels; remove model.products, or this key"
            )

    def _fits(self, actors: list[CheckedActor], gpu: Gpu, checkpoint: Checkpoint | None) -> None:
        """Report weights that need more memory than the GPU has in all. What others use now is not counted."""
        weights = sum(
            actor.weight_bytes(self.file.model, checkpoint) * (actor.section.replicas + actor.section.spares)
            for actor in actors
        )
        needed = weights + len(_processes(actors)) * devices.CONTEXT_BYTES
        if needed > gpu.total_bytes:
            names = ", ".join(actor.name for actor in actors)
            self._no(
                actors[0],
                f"{names} need at least {needed / GIB:.1f} GiB on {gpu.name}, which has {gpu.total_bytes / GIB:.1f} GiB; "
                "move layers to another device",
            )

    def _shares(self, actors: list[CheckedActor]) -> Iterator[str]:
        """Advise to put the actors of one GPU into one process."""
        processes = _processes(actors)
        if len(processes) > 1 and self.file.training is None:
            yield (
                f"{len(processes)} processes share {actors[0].section.device} and take turns on it, each with "
                f"{devices.CONTEXT_BYTES >> 20} MiB of its own; give {', '.join(actor.name for actor in actors)} the same host"
            )

    def _no(self, actor: CheckedActor, what: str) -> None:
        self._wrong(f"actor {actor.name}: device {actor.section.device}: {what}", "actors", actor.name, "device")


def _processes(actors: list[CheckedActor]) -> set[tuple[str, int]]:
    return {
        (actor.section.host or actor.name, replica)
        for actor in actors
        for replica in range(actor.section.replicas + actor.section.spares)
    }
