"""What transformers computes where a run computed: the oracle for `ranvier diverge`, in float32, over the run's own tokens."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ranvier.actors.errors import RecordingError
from ranvier.transport.header import Row

from .places import LAST, LOGITS, RecordedRun, hidden, within
from .values import Order, Place, Values

if TYPE_CHECKING:
    from torch import nn

NAME = "transformers"


def values(run: RecordedRun, recorded: Values, model: Path | None) -> Values:
    """Each session's tokens through the whole model at once.

    Args:
        model: a checkpoint to take instead of the run's own.

    Raises:
        RecordingError: the run is of no causal language model, its tokens were not recorded, or there are no transformers.
    """
    path = model or next((Path(recorded.host.model) for recorded in run.all() if recorded.host.model), None)
    tokens = recorded.at.get(Place("token", False))
    if path is None or tokens is None:
        raise RecordingError(
            f"{run.folder}: expected a run of a language model with the edge into its embedding recorded; record all"
        )
    if any(kind.name.startswith("encoder") or kind.name == "decoder" for kind in run.kinds.values()):
        raise RecordingError(f"{run.folder}: the reference is for causal models, and this one has an encoder")
    oracle = _read(path)
    made = Values(prompt=dict(recorded.prompt))
    for session, log in recorded.logs.items():
        known = dict(enumerate(log)) | {
            token.position: int(at) for token, at in tokens.items() if token.session == session
        }
        ids = [known[position] for position in itertools.takewhile(known.__contains__, itertools.count())]
        if ids:
            _session(oracle, made, session, ids)
    for place in list(made.at):  # nothing lies between its layers
        if place.name.startswith("hidden"):
            layer = int(place.name.split()[1])
            other, made.order[place._replace(sent=False)] = hidden(layer, sent=False)
            made.at[other], made.maker[other] = made.at[place], NAME
    return made


def _read(path: Path) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise RecordingError("the reference needs transformers; pip install 'ranvier[hf]'") from None
    quiet: Any = logging.disable_progress_bar
    quiet()
    read: Any = AutoModelForCausalLM.from_pretrained
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    try:  # neither code that a checkpoint brings is run, which the library would ask about, nor a pickle read
        if path.is_dir() and "auto_map" in json.loads((path / "config.json").read_text()):
            raise RecordingError(f"{path}: brings code of its own, which is not run; there is no reference for it")
        if path.is_dir():
            return read(path, use_safetensors=True, **options).train(False)
        return read(path.parent, gguf_file=path.name, **options).train(False)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path}: transformers cannot open it: {error}") from None


def _session(oracle: Any, made: Values, session: int, ids: list[int]) -> None:
    layers = _layers(oracle)
    rows = (Row(session, 0, 0, len(ids)),)

    def put(where: tuple[Place, Order], tensor_1tX: torch.Tensor) -> None:
        made.put(where, NAME, {}, rows, tensor_1tX[0])

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_seen(layer, index, put))
        with torch.inference_mode():
            logits = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits
    put((LOGITS, (LAST, 1, False)), logits)


def _layers(oracle: Any) -> nn.ModuleList:
    count = oracle.config.get_text_config().num_hidden_layers
    return next(
        module for module in oracle.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


@contextlib.contextmanager
def _seen(layer: nn.Module, index: int, put: Any) -> Iterator[None]:
    """What enters the first layer, what leaves any, and in between what its feed-forward part is given, where that is plain."""

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if index == 0:
            put(hidden(0), given[0] if given else named["hidden_states"])

    def after(_: nn.Module, __: Any, made: Any) -> None:
        put(hidden(index + 1), made[0] if isinstance(made, tuple) else made)

    def between(_: nn.Module, given: tuple[Any, ...]) -> None:
        put(within(index, "attended"), given[0])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    children = dict(layer.named_children())
    if "post_attention_layernorm" in children and "pre_feedforward_layernorm" not in children:
        handles.append(children["post_attention_layernorm"].register_forward_pre_hook(between))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
