"""Write and read training checkpoints, one shard per actor: its weights and the state of its optimiser.

The weights have the names of the model's checkpoint. A shard is written under another name and then renamed. The
trainer writes the index last (graph/training/checkpoints.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ranvier.transport.files import regular
from ranvier.transport.format.aligned import aligned

from ..component.module import fill
from ..protocol.training_spec import folder_of
from .stage import TrainedStage

STATE = ".state"


def write(
    root: Path, done: int, actor: str, stage: TrainedStage, optimizer: torch.optim.Optimizer | None, update: int
) -> None:
    """Write the weights as `ACTOR.safetensors`, and what training resumes from as `ACTOR.state.safetensors`.

    The second file has the weights as the stage holds them, and the optimiser's state.
    """
    folder = folder_of(root, done)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: weight.detach() for name, weight in stage.module.named_parameters()}
    exported = stage.exported(held)
    if "." not in actor:  # the first replica only: all hold the same weights
        _replace(folder / f"{actor}.safetensors", {name: tensor.contiguous() for name, tensor in exported.items()}, {})
    state = {f"weight/{name}": tensor.contiguous() for name, tensor in stage.state().items()}
    for index, weight in enumerate(stage.weights.values()):
        for key, value in (optimizer.state.get(weight, {}) if optimizer is not None else {}).items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer/{index}/{key}"] = value.detach().contiguous()
    _replace(folder / f"{actor}{STATE}.safetensors", state, {"update": str(update), "version": str(stage.version)})


def _replace(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    part, seen = file.with_suffix(".part"), set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        tensor = tensors[name] = tensor.cpu()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensors[name] = tensor.clone()
        seen.add(address)
    save_file(tensors, part, {"format": "pt", **metadata})
    part.replace(file)


def read(folder: Path, actor: str, stage: TrainedStage, optimizer: torch.optim.Optimizer | None) -> int:
    """Restore a stage and its optimiser from a shard; return the number of updates so far.

    Raises:
        ValueError: the shard cannot be read, or has other weights.
    """
    file = folder / f"{actor}{STATE}.safetensors"
    try:
        with safe_open(regular(file), "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error
    held = {f"weight/{name}": tensor for name, tensor in stage.state().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith("optimizer/")}
    ours = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if theirs != ours:
        odd = sorted(set(theirs.items()) ^ set(ours.items()))[0]
        raise ValueError(
            f"{file}: belongs to another graph or actor: only the file or only the actor has {odd[0]} with shape "
            f"{odd[1]}; resume with the graph that wrote the file"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            fill(tensor, state[name])
    if optimizer is not None:
        for index, weight in enumerate(stage.weights.values()):
            prefix = f"optimizer/{index}/"
            kept = {
                name.removeprefix(prefix): aligned(value).to(weight.device)
                for name, value in state.items()
                if name.startswith(prefix)
            }
            if kept:
                optimizer.state[weight] = kept
    stage.refresh()
    stage.version = int(metadata.get("version", 0))
    return int(metadata.get("update", 0))
