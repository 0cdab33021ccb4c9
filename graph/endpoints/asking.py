"""Turn the fields of a request into the options of a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranvier.actors.component.session import Sampling

from ..bridge.bridge import Asked, Bridge
from ..bridge.problems import Problem
from ..bridge.stream_log import Origin
from ..file.errors import TooLong
from ..sessions.model_defaults import sampling_of
from .bodies import MOST_STOPS, Sampled


def asked_of(
    bridge: Bridge, origin: Origin, body: Sampled, prompt: Sequence[int], most: int | None, *, logprobs: int | None,
    count: int = 1, grammar: Mapping[str, Any] | None = None,
) -> list[Asked]:  # fmt: skip
    """Return the generations that a body asks for from a prompt: `count`, each with a seed of its own.

    A field that is left out is as the model's own files say. Without a maximum of tokens, an answer ends where the model's
    context or a KV cache ends. A prompt is never cut.

    Raises:
        Problem: a field is wrong.
    """
    left = bridge.run.most_after(len(prompt))
    if left < 1 or (most is not None and most > left):
        raise _too_long(bridge.context, len(prompt), most)
    seed = body.seed & ((1 << 62) - 1) if body.seed is not None else origin.seed
    return [
        Asked(
            prompt, most or left, sampling(bridge, body, (seed + index) & ((1 << 62) - 1)), stops(body), logprobs,
            stop_tokens=() if body.ignore_eos else None, grammar=grammar, traceparent=origin.traceparent, key=origin.owner,
            request_id=origin.request_id,
        )
        for index in range(count)
    ]  # fmt: skip


def _too_long(context: int, prompt: int, most: int | None) -> TooLong:
    """Return an error in OpenAI's words: clients look for them, then cut the chat or take a model with a larger context."""
    if most is None or prompt >= context:
        return TooLong(
            f"The prompt is too long: this model's maximum context length is {context} tokens. However, "
            f"your messages resulted in {prompt} tokens. Please reduce the length of the messages."
        )
    return TooLong(
        f"The prompt is too long: this model's maximum context length is {context} tokens. However, you "
        f"requested {prompt + most} tokens "
        f"({prompt} in the messages, {most} in the completion). Please reduce the length of the messages or completion."
    )


def sampling(bridge: Bridge, body: Sampled, seed: int) -> Sampling:
    """Return how tokens are chosen.

    Raises:
        Problem: a value is out of its range.
    """
    checkpoint = bridge.run.plan.graph.checkpoint
    assert checkpoint is not None
    own = sampling_of(checkpoint, seed)
    given = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": max(0, body.top_k) if body.top_k is not None else None,
        "min_p": body.min_p, "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty, "min_tokens": body.min_tokens,
    }  # fmt: skip
    if body.temperature is None and own.greedy and "do_sample" not in checkpoint.generation:
        given["temperature"] = 1.0  # OpenAI's default, where the model's files say nothing
    values = {name: getattr(own, name) for name in given} | {name: v for name, v in given.items() if v is not None}
    try:
        return Sampling(**values, logit_bias=_biases(body), seed=seed)
    except ValueError as error:
        raise Problem(400, str(error), param=str(error).partition(":")[0], code="invalid_value") from None


def _biases(body: Sampled) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    except ValueError:
        raise Problem(
            400,
            'logit_bias: expected numbers by token id, such as {"50256": -100}',
            param="logit_bias",
            code="invalid_value",
        ) from None


def stops(body: Sampled) -> list[str]:
    """Return the strings that end an answer.

    Raises:
        Problem: there are too many.
    """
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(given) > MOST_STOPS:
        raise Problem(
            400, f"stop: expected at most {MOST_STOPS} strings, got {len(given)}", param="stop", code="invalid_value"
        )
    return [each for each in given if each]
