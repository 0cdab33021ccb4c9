"""A plain `torch.nn.Module` as an actor: its ports are what its `forward` takes and gives, nothing else is to be written.

Parameters of `forward` are the inputs. A dict that it returns names the outputs; a tensor alone is called `output`, those
of a tuple `output0`, `output1`, … What shapes they have is found out without weights, on torch's meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import dtype_name, torch_dtype

from ..errors import CheckpointError
from .actor import Actor, Batch, Context


def inputs_of(module: type[nn.Module]) -> list[str]:
    """The names of the tensors that `forward` takes.

    Raises:
        ValueError: it takes an open list of them.
    """
    names = []
    for parameter in list(inspect.signature(module.forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"forward takes *{parameter.name}; name each tensor it takes")
        if parameter.default is parameter.empty:
            names.append(parameter.name)
    return names


def outputs_of(
    module: type[nn.Module], args: Mapping[str, Any], inputs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """What `forward` gives for such inputs: run twice without data, with another size for each name each time.

    Raises:
        ValueError: it fails, or gives something else than tensors.
    """
    names = sorted({dim for spec in inputs.values() for dim in spec.shape if isinstance(dim, str)})
    trials = []
    with torch.device("meta"), torch.inference_mode():
        try:
            made = module(**args).train(False)
        except Exception as error:
            raise ValueError(f"cannot be made with args {dict(args)}: {type(error).__name__}: {error}") from None
        for sizes in _trials(names):
            given = {
                name: torch.empty(
                    [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape], dtype=torch_dtype(spec.dtype)
                )
                for name, spec in inputs.items()
            }
            try:
                trials.append((sizes, _named(made(**given))))
            except Exception as error:
                shapes = ", ".join(f"{name}: {spec}" for name, spec in inputs.items())
                raise ValueError(f"forward fails for {shapes}: {type(error).__name__}: {error}") from None
    (first_sizes, first), (second_sizes, second) = trials
    if [(port, made.dim()) for port, made in first.items()] != [(port, made.dim()) for port, made in second.items()]:
        raise ValueError("forward gives other outputs for other sizes of its inputs; each must be there in any case")
    return {port: _spec(port, first[port], second[port], first_sizes, second_sizes) for port in first}


def _trials(names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sizes for each open dimension: what of an output changes with it is open, too. From the first to the second each
    grows by an amount of its own, so that one that is made of another by adding is not taken for a third."""
    first = {name: 11 + 4 * index for index, name in enumerate(names)}
    return first, {name: size + 2 + index * (index + 1) for index, (name, size) in enumerate(first.items())}


def state_bytes(module: type[nn.Module], args: Mapping[str, Any]) -> int:
    """Bytes of the module's parameters and buffers."""
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in module(**args).state_dict().values())


def _named(made: Any) -> dict[str, torch.Tensor]:
    if isinstance(made, torch.Tensor):
        named = {"output": made}
    elif isinstance(made, tuple | list):
        named = {f"output{index}": value for index, value in enumerate(made)}
    elif isinstance(made, Mapping):
        named = dict(made)
    else:
        raise ValueError(f"forward gives {type(made).__name__}, expected a tensor, a tuple or a dict of tensors")
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"forward gives {type(value).__name__} for {name!r}, expected a tensor")
    return named


def _spec(
    port: str,
    first: torch.Tensor,
    second: torch.Tensor,
    first_sizes: Mapping[str, int],
    second_sizes: Mapping[str, int],
) -> TensorSpec:
    shape: list[int | str] = []
    for index, (one, two) in enumerate(zip(first.shape, second.shape, strict=True)):
        named = next((n for n in first_sizes if (first_sizes[n], second_sizes[n]) == (one, two)), f"{port}_{index}")
        shape.append(one if one == two else named)
    return TensorSpec(dtype_name(first.dtype), tuple(shape))


class ModuleActor(Actor):
    """Runs one module."""

    stateless = True

    def __init__(self, module: type[nn.Module]) -> None:
        self._class = module
        self._inputs = inputs_of(module)

    def load(self, context: Context) -> None:
        self.module = self._class(**context.args).train(False)
        context.progress(1.0)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        return dict(_named(self.module(**{name: batch[name] for name in self._inputs})))

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.module.state_dict().values())


def held(actor: Actor) -> nn.Module:
    """The modules that an actor holds, as one: the one that it is made of, or all by the names that it has for them."""
    own = {name: value for name, value in vars(actor).items() if isinstance(value, nn.Module)}
    return own["module"] if own.keys() == {"module"} else nn.ModuleDict(own)


def read_state(module: nn.Module, file: Path, actor: str) -> None:
    """Fill a module from a safetensors file: from tensors called `actor.…` where there are any, else from all.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not the module's.
    """
    from ..checkpoint.checkpoint import open_tensors

    found = open_tensors(file)
    own = {name.removeprefix(f"{actor}."): name for name in found.tensors if name.startswith(f"{actor}.")}
    names = own or {name: name for name in found.tensors}
    state = tensors_of(module)
    beside = {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in state}
    given = {_place(name, tensor) for name, tensor in state.items() if name in names}
    missing = sorted(name for name, tensor in state.items() if _place(name, tensor) not in given)
    extra = sorted(names.keys() - state.keys() - beside.keys())
    if missing or extra:
        raise CheckpointError(f"{file}: actor {actor}: missing {missing}, not the module's {extra}")
    filled: dict[Any, str] = {}
    for name, tensor in {**state, **beside}.items():
        if name in names:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            found.read_into(names[name], made)
            other = filled.setdefault(_place(name, tensor), name)
            if other != name and not torch.equal(tensor.detach().to(made), made):
                raise CheckpointError(
                    f"{file}: actor {actor}: {other} and {name} are one tensor of the module, two in the file"
                )
            fill(tensor, made)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `state_dict` has, by every name; what a module adds that is no tensor is left out."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` into a tensor of that shape, whatever its strides; what was expanded has one place for many."""
    for dim, stride in enumerate(tensor.stride()):
        if not stride and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    with torch.no_grad():
        tensor.copy_(values)


def _place(name: str, tensor: torch.Tensor) -> Any:
    """The same for two names of one tensor."""
    storage = tensor.untyped_storage().data_ptr()
    return (storage, tensor.storage_offset(), tensor.shape, tensor.stride()) if storage else name
