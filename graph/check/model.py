"""Check the model of a graph: that its checkpoint can be read, and that dtype, weights and products fit it and this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ranvier.actors.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from ranvier.actors.component.kinds import Kind
from ranvier.actors.errors import CheckpointError
from ranvier.actors.model import weights
from ranvier.actors.model.kernels import native

from ..file import source
from ..file.errors import Problem
from ..file.load import Document
from ..file.schema import GraphFile
from .findings import Findings


class ModelCheck(Findings):
    """Check the section `model` of a graph. `warnings` hold what is strange in the checkpoint, but does no harm."""

    def __init__(self, document: Document, file: GraphFile, problems: list[Problem], folder: Path) -> None:
        super().__init__(document, file, problems)
        self.folder = folder
        self.warnings: list[str] = []

    def checkpoint(self, found: Mapping[str, Kind]) -> Checkpoint | None:
        using = [name for name, kind in found.items() if kind.uses_model]
        if self.file.model is None:
            for name in using:
                self._wrong(
                    f"actor {name}: kind {found[name].name!r} needs a model; add model: {{source: …}}", "actors", name
                )
            return None
        trusted = ("model", "source") in self.document.trusted
        try:
            found_there = open_checkpoint(source.resolve(self.file.model.source, self.folder, trusted))
            self.warnings += weights.check_whole(found_there)
            self._precision(found_there.config)
            return found_there
        except (source.SourceError, CheckpointError) as error:
            self._wrong(f"model: {error}", "model", "source")
            return None

    def _precision(self, config: ModelConfig) -> None:
        """Report a dtype or a weight format that the model, or this machine, does not support."""
        assert self.file.model is not None
        wanted, why = self.file.model.weights, None
        if config.family in ("t5", "mt5") and self.file.model.dtype == "float16":
            self._wrong(
                f"model: {config.family} exceeds the range of float16; use bfloat16 or float32", "model", "dtype"
            )
        if self.file.model.products == "repeatable" and self.file.model.dtype != "float32":
            self._repeatable(config)
        if wanted == "dtype":
            return
        if self.file.model.dtype != "bfloat16":
            why = f"needs dtype bfloat16, got {self.file.model.dtype}"
        elif not config.native:
            why = f"needs a family that Ranvier's built-in blocks run, got {config.family}"
        elif native.library() is None:
            why = "needs a processor with AVX2, and a C compiler when the package is installed"
        if why is not None:
            self._wrong(f"model: weights {wanted} {why}; remove the key", "model", "weights")

    def _repeatable(self, config: ModelConfig) -> None:
        """Report that products cannot be repeated here, whatever the number of tokens: only the kernels can."""
        assert self.file.model is not None
        dtype = self.file.model.dtype
        if dtype != "bfloat16":
            why = f"need dtype bfloat16 or float32, got {dtype}"
        elif not weights.by_kernels(config):
            why = f"need a family that the kernels run, got {config.family}"
        elif config.experts:
            why = "need a model without a mixture of experts, whose router torch computes"
        elif not weights.repeats(config):
            why = f"need a vocabulary that is a multiple of 16, got {config.vocab}"
        elif native.library() is None:
            why = "need a processor with AVX2, and a C compiler when the package is installed"
        else:
            return
        self._wrong(f"model: products repeatable {why}; remove the key", "model", "products")
