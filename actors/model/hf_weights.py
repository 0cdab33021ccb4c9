"""Make models of transformers without weights, and read an actor's part of a checkpoint into them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ..checkpoint import safetensors_file
from ..checkpoint.checkpoint import Checkpoint, same
from ..checkpoint.config import LAYER_OF
from ..checkpoint.tensors import WHOLE, Entry
from ..component.devices import CPU
from ..errors import CheckpointError


def model_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return a checkpoint's model, whose parameters were never written to and so take no memory."""
    # by the class of its type, which never runs code of a checkpoint
    config = CONFIG_MAPPING[str(checkpoint.hf["model_type"])].from_dict(dict(checkpoint.hf))
    if not checkpoint.config.tied:  # the file may have a head of its own where its config says otherwise
        config.tie_word_embeddings = False
    model = _empty(config, dtype)
    if _has_own_head(model, checkpoint):
        config.tie_word_embeddings = False
        model = _empty(config, dtype)
    model.requires_grad_(False)
    return model


def _empty(config: Any, dtype: torch.dtype) -> Any:
    """Return a model whose parameters were never written to."""
    with torch.inference_mode(False), no_init_weights():
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=dtype).train(False)
        model.tie_weights()  # no_init_weights skips this, too
    return model


def _has_own_head(model: Any, checkpoint: Checkpoint) -> bool:
    """Return whether the file has two matrices that differ where the config says that they are one."""

    def entry(name: str) -> Entry | None:
        return checkpoint.tensors.get(name) or checkpoint.tensors.get(name.removeprefix(model.base_model_prefix + "."))

    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    found = [(entry(one), entry(other)) for one, other in pairs]
    return any(one is not None and other is not None and not same(one, other) for one, other in found)


def read(
    model: Any,
    checkpoint: Checkpoint,
    wanted: set[str],
    layers: range,
    dtype: torch.dtype,
    progress: Callable[[float], None],
) -> int:
    """Read the wanted tensors of a model, by transformers if the checkpoint names them differently; return their bytes.

    `layers` are those that `wanted` has tensors of.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    own = tensors_of(model)
    prefix = model.base_model_prefix + "."
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    buffers = own.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {}
    for name in sorted(wanted):
        known = next((each for each in (name, name.removeprefix(prefix)) if each in checkpoint.tensors), None)
        if known is not None:
            names[name] = known
        elif name not in tied and name not in buffers:
            _read_converted(model, checkpoint, wanted, layers, dtype)
            break
    else:
        for count, (name, known) in enumerate(names.items(), 1):
            checkpoint.read_into(known, own[name])
            progress(count / len(names))
    return sum(tensor.nbytes for tensor in {own[name].data_ptr(): own[name] for name in wanted}.values())


def move(model: Any, wanted: set[str], device: str) -> None:
    """Move these tensors of a model, and all its buffers, to a device. Parameters that nobody has read stay where they are."""
    if device == CPU:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = {id(tensor) for name, tensor in parameters.items() if name not in wanted}
    left -= {id(parameters[name]) for name in wanted & parameters.keys()}  # a tied tensor has two names
    model._apply(lambda tensor: tensor if id(tensor) in left else tensor.to(device))


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that a checkpoint has: parameters, and buffers that are saved."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    saved = model.state_dict().keys() & buffers.keys()
    return dict(model.named_parameters(remove_duplicate=False)) | {name: buffers[name] for name in saved}


def _read_converted(model: Any, checkpoint: Checkpoint, wanted: set[str], layers: range, dtype: torch.dtype) -> None:
    """Let transformers load these layers, because it lays their tensors out differently from their file.

    Raises:
        CheckpointError: a wanted tensor is missing, or a tensor has another shape.
    """
    own, load = tensors_of(model), type(model).from_pretrained
    given: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with torch.inference_mode(False), no_init_weights():
        if checkpoint.renamed:
            state = _state(checkpoint, layers, dtype)
            whole, info = load(None, config=copy.deepcopy(model.config), state_dict=state, **given)
        else:
            whole, info = load(checkpoint.path.parent, gguf_file=checkpoint.path.name, **given)
    for name, theirs, expected in sorted(info["mismatched_keys"]):  # transformers would leave them random
        if name in wanted:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name}: expected shape {tuple(expected)}, got {tuple(theirs)}"
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(wanted & parameters & {str(name) for name in info["missing_keys"]})
    if missing:  # transformers would fill them with random numbers
        raise CheckpointError(f"{checkpoint.path}: tensor {missing[0]} is missing (missing tensors: {len(missing)})")
    theirs_by_name = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    for name in wanted & theirs_by_name.keys():
        tensor = theirs_by_name[name]
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
        own[name].copy_(tensor)


def _state(checkpoint: Checkpoint, layers: range, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors of some layers, and those that are in no layer."""
    state = {}
    for name, entry in checkpoint.tensors.items():
        found = LAYER_OF.search(name)
        if (found is None or int(found[1]) in layers) and not entry.stored.startswith(safetensors_file.UNKNOWN):
            if entry.stored in ("int8", "uint8") and len(entry.shape) > 1:  # transformers would take them as they are
                raise CheckpointError(
                    f"{entry.file}: tensor {name}: expected floating-point weights, got {entry.stored}"
                )
            kept = getattr(torch, entry.stored) if entry.stored in WHOLE else dtype
            state[name] = torch.empty(entry.shape, dtype=kept)
            checkpoint.read_into(name, state[name])
    return state
