"""Check what can be known of a request before a process starts: tokenizer, template, prompt, inputs of a call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.errors import ProtocolError

from ..check.checked import Graph
from ..file.errors import RequestError
from ..sessions import chat_template, tokenizer
from ..sessions.text_codec import ChatOptions, TextCodec
from ..sessions.text_process import TextProcess
from .request_checks import check_ids, ids_of, no_tokenizer

if TYPE_CHECKING:
    import torch

TEMPLATE_TOKENS = 4096
"""A prompt that fits with so many tokens to spare is not tokenized before the start: its template will not add more."""


def codec_of(graph: Graph) -> TextCodec | None:
    """Return the tokenizer of a graph that takes text; None if it has none, and takes token ids.

    Raises:
        CheckpointError: the tokenizer cannot be opened, or a chat template is wrong.
    """
    if not (graph.generates or graph.embeds) or graph.checkpoint is None or not tokenizer.brought_by(graph.checkpoint):
        return None
    if _last and _last[0][0] is graph.checkpoint:
        return _last[0][1]
    codec = tokenizer.of(graph.checkpoint)
    for template in (codec.chat_template, *codec.templates.values()):
        if template is not None:
            chat_template.check(template)
    _last[:] = [(graph.checkpoint, codec)]
    return codec


_last: list[tuple[Checkpoint, TextCodec]] = []
"""The checkpoint whose tokenizer was read last: it is read when a command checks the prompt, and again at the start."""


def check_prompt(
    graph: Graph,
    codec: TextCodec | None,
    prompt: str | list[dict[str, Any]],
    max_tokens: int,
    raw: bool,
    chat: ChatOptions,
) -> None:
    """Check that a prompt can be tokenized, and fits into the model beside the tokens asked for.

    Raises:
        RequestError: the graph has no tokenizer, the prompt is no text, or it does not fit.
        CheckpointError: the model has no such template, or the template refuses the prompt.
    """
    if codec is None:
        raise no_tokenizer(graph)
    assert graph.checkpoint is not None
    config = graph.checkpoint.config
    if isinstance(prompt, str):
        _check_text(prompt)
    by_template = config.encoder is None and not (raw and isinstance(prompt, str))
    if by_template:
        codec.template(chat)
    length = len(prompt.encode()) if isinstance(prompt, str) and not (chat.tools or chat.documents) else config.context
    if prompt and length + max_tokens + (TEMPLATE_TOKENS if by_template else 8) <= config.context:
        return  # a token stands for a byte or more
    with closing(TextProcess(codec)) as text:
        check_ids(graph, ids_of(graph, text, prompt, raw, chat), max_tokens)


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt: expected text, got bytes that are no UTF-8 (the first at character {error.start}); "
            "save it as UTF-8, or decode it first"
        ) from None


def check_inputs(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> None:
    """Check that tensors have the names, dtypes and shapes of a graph's inputs.

    Raises:
        RequestError: they have not.
    """
    from ranvier.transport.format.tensors import dtype_name

    ports = {edge.out for edge in graph.edges if edge.source == GATEWAY}
    if inputs.keys() != ports:
        raise RequestError(f"call: expected the inputs {sorted(ports)}, got {sorted(inputs)}")
    for edge in graph.edges:
        if edge.source != GATEWAY:
            continue
        tensor = inputs[edge.out]
        rows = {"tokens": tensor.shape[0] if tensor.dim() else 1, "rows": 1}
        try:
            edge.spec.check(edge.name, dtype_name(tensor.dtype), tuple(tensor.shape), rows)
        except ProtocolError as error:
            hint = "; a call has one row: name a dimension of any size `tokens`" if "rows" in edge.spec.shape else ""
            raise RequestError(f"{error}{hint}") from None
