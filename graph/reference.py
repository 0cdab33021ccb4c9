"""What transformers computes where a run computed: the oracle for `ranvier diverge`, in float32, over the run's own tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ranvier.actors.errors import RecordingError
from ranvier.transport.header import Row

from .values import Place, RecordedRun, Values

if TYPE_CHECKING:
    from torch import nn

NAME = "transformers"


def values(run: RecordedRun, recorded: Values, model: Path | None) -> Values:
    """Each session's tokens through the whole model at once.

    Args:
        model: a checkpoint to take instead of the run's own.

    Raises:
        RecordingError: the run is of no language model, its tokens were not recorded, or there are no transformers.
    """
    path = model or next((Path(h.host.model) for hosts in run.hosts.values() for h in hosts if h.host.model), None)
    tokens = next((at for place, at in recorded.at.items() if place.name == "token" and not place.sent), None)
    if path is None or tokens is None:
        raise RecordingError(
            f"{run.folder}: expected a recorded run of a language model, with the edge into its embedding"
        )
    oracle = _read(path)
    made = Values(prompt=dict(recorded.prompt))
    for session in sorted({token.session for token in tokens}):
        by_position = {token.position: at for token, at in tokens.items() if token.session == session}
        ids = [int(by_position[position]) for position in range(len(by_position))]
        _session(oracle, made, session, ids)
    for place in list(made.at):  # nothing lies between its layers
        if place.name.startswith("hidden"):
            made.at[place._replace(sent=False)] = made.at[place]
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
    folder, named = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    return read(folder, dtype=torch.float32, local_files_only=True, **named).train(False)


def _session(oracle: Any, made: Values, session: int, ids: list[int]) -> None:
    layers = _layers(oracle)
    rows = (Row(session, 0, 0, len(ids)),)

    def put(place: Place, tensor_1tX: torch.Tensor) -> None:
        made.put(place, NAME, {}, rows, tensor_1tX[0])

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_seen(layer, index, put))
        with torch.inference_mode():
            logits = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits
    put(Place(len(layers) + 1, 1, "logits", True), logits)


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
            put(Place(0, 0, "hidden 0", True), given[0] if given else named["hidden_states"])

    def after(_: nn.Module, __: Any, made: Any) -> None:
        put(Place(index + 1, 0, f"hidden {index + 1}", True), made[0] if isinstance(made, tuple) else made)

    def between(_: nn.Module, given: tuple[Any, ...]) -> None:
        put(Place(index, 4, f"layer {index} attended", True), given[0])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    children = dict(layer.named_children())
    if "post_attention_layernorm" in children and "pre_feedforward_layernorm" not in children:
        handles.append(children["post_attention_layernorm"].register_forward_pre_hook(between))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
