"""Compute a run's tokens with transformers, in float32: the reference of `ranvier diverge`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.errors import RecordingError
from ranvier.actors.model.hf_hooks import Report, layer_count, watched
from ranvier.transport.format.header import Row

from .tensor_places import LOGITS, RecordedRun, encoder_hidden, hidden, within
from .values import LAST, Order, Place, Values

NAME = "transformers"


def values(run: RecordedRun, recorded: Values, model: Path | None) -> Values:
    """Compute the tokens of each session with the whole model.

    Args:
        model: a checkpoint to use instead of the run's own.

    Raises:
        RecordingError: the run is not of a language model, its tokens were not recorded, or transformers is not
            installed or cannot open the checkpoint.
    """
    path = model or next((Path(recorded.host.model) for recorded in run.all() if recorded.host.model), None)
    if path is None or Place(None, "token", False) not in recorded.at:
        raise RecordingError(
            f"{run.folder}: expected a run of a language model with the edge into its embedding recorded; record all"
        )
    config = open_checkpoint(path).config
    oracle = _Oracle(_read(path, config.encoder is not None), config.layers, recorded.prompt)
    for session, log in recorded.logs.items():
        ids = _tokens(recorded, "token", session, log)
        if not ids:
            continue
        if config.encoder is not None:
            source = _tokens(recorded, "prompt", session)
            if not source:
                raise RecordingError(
                    f"{run.folder}: expected the source of session {session} to be recorded; record all"
                )
            oracle.translate(session, source, ids, config.encoder.layers)
        elif config.both_ways:
            oracle.generate(session, ids, recorded.prompt[session])
        else:
            oracle.forward(session, ids)
    made = oracle.made
    for place in list(made.at):  # no edge changes what one layer gives to the next
        if place.between:
            other = place._replace(sent=False)
            depth, part, _ = made.order[place]
            made.at[other], made.maker[other], made.order[other] = made.at[place], NAME, (depth, part, True)
    return made


def _tokens(recorded: Values, port: str, session: int, log: Sequence[int] = ()) -> list[int]:
    """Return the tokens that a session gave to a port, from position 0 to the first gap.

    `log` fills missing positions.
    """
    known = dict(enumerate(log)) | {
        token.position: int(at)
        for token, at in recorded.at.get(Place(None, port, False), {}).items()
        if token.session == session
    }
    return [known[position] for position in itertools.takewhile(known.__contains__, itertools.count())]


def _read(path: Path, encodes: bool) -> Any:
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.utils import logging
    except ImportError:
        raise RecordingError("the reference needs transformers; pip install 'ranvier[hf]'") from None
    quiet: Any = logging.disable_progress_bar
    quiet()
    read: Any = (AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM).from_pretrained
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    try:  # run no code of the checkpoint (transformers would ask on the terminal), and read no pickle
        if path.is_dir() and "auto_map" in json.loads((path / "config.json").read_text()):
            raise RecordingError(
                f"{path}: the checkpoint brings custom code, which is not run; there is no reference for it"
            )
        if path.is_dir():
            return read(path, use_safetensors=True, **options).train(False)
        return read(path.parent, gguf_file=path.name, **options).train(False)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path}: transformers cannot open it: {error}") from None


class _Oracle:
    """Run the transformers model, and keep the tensors that it makes."""

    def __init__(self, model: Any, layers: int, prompt: dict[int, int]) -> None:
        self._model, self._layers = model, layers
        self.made = Values(prompt=dict(prompt))

    def forward(self, session: int, ids: list[int]) -> None:
        with watched(self._model, layer_count(self._model), self._reporter(session, len(ids))), torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits
        self._put((LOGITS, (LAST, 1, False)), session, 0, logits[0])

    def generate(self, session: int, ids: list[int], prompt: int) -> None:
        """Take the steps of the library's `generate`, forced to the tokens of the run.

        This is for models whose result depends on where the prompt ends.
        """
        last = prompt - 1

        def report(layer: int | None, name: str, tensor_1tH: torch.Tensor) -> None:
            if tensor_1tH.dim() == 3 and len(tensor_1tH) == 1:
                self._put(_where(layer, name), session, last, tensor_1tH[0, -1:])

        def follow(_: int, so_far: torch.Tensor) -> list[int]:
            nonlocal last
            last = len(so_far)
            return ids[last : last + 1] or ids[-1:]

        with watched(self._model, layer_count(self._model), report), torch.inference_mode():
            made = self._model.generate(
                torch.tensor([ids[:prompt]]), max_new_tokens=len(ids) - prompt + 1, do_sample=False, eos_token_id=None,
                pad_token_id=0, prefix_allowed_tokens_fn=follow, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        self._put((LOGITS, (LAST, 1, False)), session, prompt - 1, torch.cat(made.logits))

    def translate(self, session: int, source: list[int], ids: list[int], encoder_layers: int) -> None:
        """Run an encoder–decoder model. The output of its encoder is taken after the encoder's last norm."""

        def report(layer: int | None, name: str, tensor_1mH: torch.Tensor) -> None:
            index = layer if layer is not None else -1
            if name != "attended" and index < encoder_layers - 1:
                self._put(encoder_hidden(index + 1), session, 0, tensor_1mH[0])

        with (
            watched(self._model.get_encoder(), encoder_layers, report),
            watched(self._model.get_decoder(), self._layers, self._reporter(session, len(ids))),
            torch.inference_mode(),
        ):
            made = self._model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids]), use_cache=False)
        self._put(encoder_hidden(encoder_layers), session, 0, made.encoder_last_hidden_state[0])
        self._put((LOGITS, (LAST, 1, False)), session, 0, made.logits[0])

    def _reporter(self, session: int, count: int) -> Report:
        def report(layer: int | None, name: str, tensor_1tH: torch.Tensor) -> None:
            if tensor_1tH.shape[:-1] == (1, count):  # other tensors do not have one vector per token
                self._put(_where(layer, name), session, 0, tensor_1tH[0])

        return report

    def _put(self, where: tuple[Place, Order], session: int, position: int, tensor_tX: torch.Tensor) -> None:
        self.made.put(where, NAME, {}, (Row(session, 0, position, len(tensor_tX)),), tensor_tX)


def _where(layer: int | None, name: str) -> tuple[Place, Order]:
    return hidden(0) if layer is None else within(layer, name)
