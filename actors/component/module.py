"""Run a plain `torch.nn.Module` as an actor, without further code: its ports follow from its `forward`.

The parameters of `forward` are the inputs. If it returns a dict, the keys name the outputs. A single tensor is called
`output`; the tensors of a tuple are called `output0`, `output1`, … Their shapes are found without weights, on torch's meta
device. A module that needs values there, such as one that calls `.item()`, is tried with zeros on the processor.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import dtype_name, torch_dtype

from ..errors import CheckpointError
from .actor import Actor, Batch, Context


def inputs_of(module: type[nn.Module]) -> list[str]:
    """Return the names of the tensors that `forward` takes.

    Raises:
        ValueError: `forward` has a parameter such as `*args` or `**kwargs`.
    """
    names = []
    for parameter in list(inspect.signature(module.forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"forward takes *{parameter.name}; name each tensor it takes")
        if parameter.default is parameter.empty:
            names.append(parameter.name)
    return names


class Probed(NamedTuple):
    """Hold what a trial of a module has found: its outputs, the bytes of its state, and whether `forward` takes gradients."""

    outputs: dict[str, TensorSpec]
    nbytes: int
    own_autograd: bool


def probe(module: type[nn.Module], args: Mapping[str, Any], inputs: Mapping[str, TensorSpec]) -> Probed:
    """Create a module and run its `forward`, with two different sizes for each named dimension, and with other values.

    Raises:
        ValueError: the module cannot be created, `forward` fails, or it returns something other than tensors.
    """
    for device in ("meta", "cpu"):
        for own_autograd in (False, True):
            try:
                with torch.random.fork_rng(devices=()), _mode(own_autograd), torch.device(device):
                    return Probed(*_tried(module, args, inputs), own_autograd)
            except ValueError as error:
                why = error
        if "meta" not in str(why).lower():  # the module is wrong on every device
            break
    raise why


@contextlib.contextmanager
def _mode(own_autograd: bool) -> Iterator[None]:
    """Run torch in inference mode, or as it is by default, for a module that takes gradients itself."""
    with torch.inference_mode(not own_autograd), torch.set_grad_enabled(own_autograd):
        yield


def _tried(
    module: type[nn.Module], args: Mapping[str, Any], inputs: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], int]:
    """Return the outputs of a module, and the bytes of its state, by a trial on torch's current device."""
    names = sorted({dim for spec in inputs.values() for dim in spec.shape if isinstance(dim, str)})
    trials = []
    try:
        made = module(**args).train(False)
    except Exception as error:
        raise ValueError(f"cannot be created with args {dict(args)}: {type(error).__name__}: {error}") from None
    first_sizes, second_sizes = _trials(names)
    for sizes, value in ((first_sizes, 0), (second_sizes, 0), (first_sizes, 1)):
        given = {
            name: torch.full(
                [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape],
                value,
                dtype=torch_dtype(spec.dtype),
            )
            for name, spec in inputs.items()
        }
        try:
            trials.append((sizes, _named(made(**given))))
        except Exception as error:
            shapes = ", ".join(f"{name}: {spec}" for name, spec in inputs.items())
            raise ValueError(f"forward fails for {shapes}: {type(error).__name__}: {error}") from None
    (first_sizes, first), (second_sizes, second), (_, other) = trials
    for each in (second, other):
        if [(port, made.dim()) for port, made in first.items()] != [(port, made.dim()) for port, made in each.items()]:
            raise ValueError(
                "forward returns different outputs for different inputs; return the same outputs for all sizes and values"
            )
    outputs = {port: _spec(port, first[port], second[port], other[port], first_sizes, second_sizes) for port in first}
    return outputs, sum(tensor.nbytes for tensor in tensors_of(made).values())


def _trials(names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of two trials, by named dimension. An output's dimension gets the name that has the same two sizes.

    From the first trial to the second, each size grows by a different amount. So a dimension that is, for example, `rows + 4`
    is not mistaken for the dimension of another name.
    """
    first = {name: 11 + 4 * index for index, name in enumerate(names)}
    return first, {name: size + 2 + index * (index + 1) for index, (name, size) in enumerate(first.items())}


def _named(made: Any) -> dict[str, torch.Tensor]:
    if isinstance(made, torch.Tensor):
        named = {"output": made}
    elif isinstance(made, tuple | list):
        named = {f"output{index}": value for index, value in enumerate(made)}
    elif isinstance(made, Mapping):
        named = dict(made)
    else:
        raise ValueError(f"forward: expected a tensor, a tuple or a dict of tensors, got {type(made).__name__}")
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"forward: expected a tensor for {name!r}, got {type(value).__name__}")
    return named


def _spec(
    port: str,
    first: torch.Tensor,
    second: torch.Tensor,
    other: torch.Tensor,
    first_sizes: Mapping[str, int],
    second_sizes: Mapping[str, int],
) -> TensorSpec:
    """Return the spec of an output that had these shapes. A size that depends on values gets a name of its own."""
    shape: list[int | str] = []
    for index, (one, two, three) in enumerate(zip(first.shape, second.shape, other.shape, strict=True)):
        named = next((n for n in first_sizes if (first_sizes[n], second_sizes[n]) == (one, two)), f"{port}_{index}")
        shape.append(f"{port}_{index}" if one != three else one if one == two else named)
    return TensorSpec(dtype_name(first.dtype), tuple(shape))


class ModuleActor(Actor):
    """Run one module as an actor."""

    stateless = True

    def __init__(self, module: type[nn.Module]) -> None:
        self._class = module
        self._inputs = inputs_of(module)

    def load(self, context: Context) -> None:
        self._own_autograd = context.own_autograd
        with _mode(own_autograd=True) if self._own_autograd else contextlib.nullcontext():
            self.module = self._class(**context.args).train(False)
        context.progress(1.0)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        given = {name: batch[name] for name in self._inputs}
        if not self._own_autograd:
            return dict(_named(self.module(**given)))
        with _mode(own_autograd=True):  # tensors of inference mode take no gradients, so the module gets copies
            made = _named(self.module(**{name: tensor.clone() for name, tensor in given.items()}))
            return {name: tensor.detach() for name, tensor in made.items()}

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.module.state_dict().values())


def held(actor: Actor) -> nn.Module:
    """Return the modules that an actor holds, as one module.

    It is the actor's `module` if there is no other; otherwise it contains all modules under their attribute names.
    """
    own = {name: value for name, value in vars(actor).items() if isinstance(value, nn.Module)}
    return own["module"] if own.keys() == {"module"} else nn.ModuleDict(own)


def read_state(module: nn.Module, file: Path, actor: str) -> None:
    """Fill a module from a safetensors file: from the tensors called `actor.…` if there are any, otherwise from all.

    Raises:
        CheckpointError: the file is damaged, or its tensors do not match the module's.
    """
    from ..checkpoint.tensors import open_tensors

    found = open_tensors(file)
    own = {name.removeprefix(f"{actor}."): name for name in found.tensors if name.startswith(f"{actor}.")}
    names = own or {name: name for name in found.tensors}
    state = tensors_of(module)
    beside = {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in state}
    given = {_place(name, tensor) for name, tensor in state.items() if name in names}
    missing = sorted(name for name, tensor in state.items() if _place(name, tensor) not in given)
    extra = sorted(names.keys() - state.keys() - beside.keys())
    if missing or extra:
        raise CheckpointError(f"{file}: actor {actor}: missing {missing}, unexpected {extra}")
    filled: dict[Any, str] = {}
    for name, tensor in {**state, **beside}.items():
        if name in names:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            found.read_into(names[name], made)
            other = filled.setdefault(_place(name, tensor), name)
            if other != name and not torch.equal(tensor.detach().to(made), made):
                raise CheckpointError(
                    f"{file}: actor {actor}: {other} and {name} are one tensor in the module, but differ in the file"
                )
            fill(tensor, made)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of `state_dict` by all their names. Entries that are not tensors are left out."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` into a tensor of the same shape, whatever its strides.

    All elements of an expanded dimension share memory, so only the first of them is written.
    """
    for dim, stride in enumerate(tensor.stride()):
        if not stride and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    with torch.no_grad():
        tensor.copy_(values)


def _place(name: str, tensor: torch.Tensor) -> Any:
    """Return a key for a tensor's memory, which is the same for all names of one tensor."""
    storage = tensor.untyped_storage().data_ptr()
    return (storage, tensor.storage_offset(), tensor.shape, tensor.stride()) if storage else name
