"""Check what a client asks for, as far as it is known without a run: prompts, options of a chat, sampling."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ranvier.actors.component.session import MOST_LOGPROBS, Sampling
from ranvier.actors.protocol.host_spec import GATEWAY

from ..check.checked import Graph
from ..file.errors import RequestError, TooLong
from ..sessions.model_defaults import sampling_of
from ..sessions.text_codec import ChatOptions
from ..sessions.text_process import TextProcess

if TYPE_CHECKING:
    import torch


def ids_of(
    graph: Graph, text: TextProcess, prompt: str | list[dict[str, Any]], raw: bool, chat: ChatOptions, special: bool = True
) -> list[int]:  # fmt: skip
    """Return the token ids of a prompt: as it is if `raw` or for an encoder, else by the chat template.

    Raises:
        CheckpointError: see `TextProcess.chat_ids`.
    """
    raw = raw or (graph.checkpoint is not None and graph.checkpoint.config.encoder is not None)
    return (
        text.ids(prompt, special=special) if raw and isinstance(prompt, str) else text.chat_ids(as_chat(prompt), chat)
    )


def check_ids(graph: Graph, ids: Sequence[int], max_tokens: int, spare: int = 0) -> None:
    """Check that a prompt and `max_tokens` fit into the model. `spare` is added to its context.

    Raises:
        RequestError: they do not fit, or a token is not in the vocabulary.
    """
    assert graph.checkpoint is not None
    config = graph.checkpoint.config
    context = config.context + spare
    vocab = config.vocab if config.encoder is None else config.encoder.source_vocab
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    if config.encoder is not None:  # the encoder and the decoder have a context each
        if max(len(ids), max_tokens) > context:
            raise TooLong(
                f"the prompt has {len(ids)} tokens and {max_tokens} are asked for, but encoder and decoder hold "
                f"{context} each; shorten one of them"
            )
    elif len(ids) + max_tokens > context:
        raise TooLong(
            f"the prompt has {len(ids)} tokens and {max_tokens} are asked for, but the model's context is {context}; "
            "shorten one of them"
        )
    wrong = next((token for token in ids if not 0 <= token < vocab), None)
    if wrong is not None:
        raise RequestError(f"token {wrong} is not in the vocabulary of {vocab}")


def checked_answered(graph: Graph, tokens: Sequence[int], most: int) -> tuple[int, ...]:
    """Check the tokens that an answer has already.

    Raises:
        RequestError: they are not token ids, or too many.
    """
    made = tuple(whole("answered", token) for token in listed("answered", tokens))
    if made:
        check_ids(graph, made, 0)
    if len(made) > most:
        raise RequestError(f"answered: expected at most max_tokens of {most}, got {len(made)}")
    return made


def positions_of(graph: Graph, inputs: Mapping[str, torch.Tensor], capacity: int | None) -> int:
    """Return how many positions of KV caches a call needs: as many as its inputs have tokens. `capacity` is an actor's.

    Raises:
        TooLong: they do not fit.
    """
    if graph.checkpoint is None:
        return 0
    ports = {edge.out for edge in graph.edges if edge.source == GATEWAY and edge.spec.shape[:1] == ("tokens",)}
    tokens, context = max((len(inputs[port]) for port in ports), default=0), graph.checkpoint.config.context
    most = context if capacity is None else min(context, capacity)
    if tokens > most:
        raise TooLong(
            f"call: the inputs have {tokens} tokens, but the context and an actor's KV cache hold {most}; shorten them"
        )
    return tokens


def checked_chat(chat: ChatOptions) -> ChatOptions:
    """Return options of a chat whose lists are lists.

    Raises:
        RequestError: one of them has another form.
    """
    for name in ("tools", "documents"):
        value = getattr(chat, name)
        if value is not None and not all(isinstance(each, Mapping) for each in listed(name, value)):
            raise RequestError(f"{name}: expected a list of objects, as in JSON")
    if not isinstance(chat.template, str | None):
        raise RequestError(f"template: expected the name of a template, got {type(chat.template).__name__}")
    if not isinstance(chat.arguments, Mapping) or not all(isinstance(name, str) for name in chat.arguments):
        raise RequestError("template_arguments: expected values by name, such as {'enable_thinking': False}")
    return chat


def checked_sampling(graph: Graph, sampling: Sampling | str | None, max_tokens: int) -> Sampling:
    """Check how tokens are to be chosen; "model" means as the model's own files say.

    Raises:
        RequestError: it is something else, or does not fit the model or `max_tokens`.
        CheckpointError: the model's files ask for what is not built in.
    """
    checkpoint = graph.checkpoint
    assert checkpoint is not None
    if sampling == "model":
        return sampling_of(checkpoint)
    if sampling is not None and not isinstance(sampling, Sampling):
        raise RequestError(f'sampling: expected ranvier.Sampling or "model", got {sampling!r:.80}')
    made = sampling or Sampling()
    if made.min_tokens > max_tokens:
        raise RequestError(f"min_tokens: expected at most max_tokens of {max_tokens}, got {made.min_tokens}")
    vocab = checkpoint.config.vocab
    beyond = next((token for token, _ in cast(tuple[tuple[int, float], ...], made.logit_bias) if token >= vocab), None)
    if beyond is not None:
        raise RequestError(f"logit_bias: token {beyond} is not in the vocabulary of {vocab}")
    return made


def checked_logprobs(count: int | None) -> int | None:
    if count is None:
        return None
    most = whole("logprobs", count)
    if not 0 <= most <= MOST_LOGPROBS:
        raise RequestError(f"logprobs: expected 0 to {MOST_LOGPROBS} likeliest tokens, got {most}")
    return most


def no_tokenizer(graph: Graph) -> RequestError:
    """Return the error for text where the graph has no tokenizer."""
    return RequestError(f"graph {graph.name} has no tokenizer; give token ids and use `stop_tokens`")


def as_chat(messages: Sequence[dict[str, Any]] | str) -> Sequence[dict[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def checked_prompt(prompt: str | Sequence[dict[str, Any]] | Sequence[int]) -> str | list[dict[str, Any]] | list[int]:
    """Check that a prompt has one of its three forms.

    Raises:
        RequestError: it has another form.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray | Mapping) or not hasattr(prompt, "__len__"):
        raise RequestError(
            f"prompt: expected text, a list of chat messages, or a list of token ids, got {type(prompt).__name__}"
        )
    if len(prompt) and all(isinstance(item, dict) for item in prompt):
        return [item for item in prompt if isinstance(item, dict)]
    if any(isinstance(item, bool | str | dict) for item in prompt):
        kinds = ", ".join(sorted({type(item).__name__ for item in prompt}))
        raise RequestError(
            f"prompt: expected text, a list of chat messages, or a list of token ids, got a list of {kinds}"
        )
    return [whole("prompt", item) for item in prompt]


def listed(name: str, values: Any) -> list[Any]:
    """Return the entries of a list.

    Raises:
        RequestError: it is a single string, or not a list.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise RequestError(f"{name}: expected a list, got {type(values).__name__}; write [{values!r:.40}]")
    return list(values)


def positive(name: str, value: Any) -> float:
    """Return a finite number over 0.

    Raises:
        RequestError: the value is something else.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"{name}: expected a number, got {type(value).__name__}") from None
    if not 0 < number < math.inf:
        raise RequestError(f"{name}: expected a finite number over 0, got {value}")
    return number


def whole(name: str, value: Any) -> int:
    """Return a whole number as a Python `int`. Other types, such as numpy's, cannot be sent.

    Raises:
        RequestError: it is not a whole number, or has more than 63 bits.
    """
    try:
        whole = operator.index(value)
    except TypeError:
        raise RequestError(f"{name}: expected a whole number, got {type(value).__name__}") from None
    if not -(1 << 63) <= whole < 1 << 63:
        raise RequestError(f"{name}: expected at most 63 bits, got {whole.bit_length()}")
    return whole
