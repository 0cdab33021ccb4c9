"""Turn the bodies of the endpoints for text into generations, and into what makes their answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bridge.bridge import Asked, Bridge, Ended
from ..bridge.stream_log import Endpoint, Origin
from . import chat, completions, responses, tool_prompts
from .answers import Answers
from .asking import asked_of
from .bodies import ChatBody, CompletionBody, Sampled, parsed
from .completions import Echo
from .tool_calls import Family
from .wording import Wording


@dataclass(frozen=True, slots=True)
class Served:
    """Hold one model of the server."""

    name: str
    bridge: Bridge
    wording: Wording
    family: Family
    """The model writes the calls of tools in this form."""
    created: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Hold the generations that a body asks for, by number, and what makes the answer of them."""

    model: Served
    asked: Mapping[int, Asked]
    maker: Answers
    streams: bool


Find = Callable[[str], Served]
"""Returns a model that generates text, by its name."""


async def of_chat(find: Find, origin: Origin, data: bytes) -> Prepared:
    """Prepare the answer to a chat."""
    body = parsed(ChatBody, data)
    model = find(body.model)
    chat.check(body)
    tools = chat.tools_of(chat.functions_of(body), chat.choice_of(body))
    family = model.family if tools is not None else None
    if origin.prompt is None:
        origin.prompt = await prompt_of(model, chat.messages_of(body.messages), tools, body.chat_template_kwargs)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = asked_of(
        model.bridge, origin, body, origin.prompt, most, logprobs=logprobs, count=body.n or 1,
        grammar=chat.grammar_of(body, model.family),
    )  # fmt: skip
    maker = chat.Chat(
        origin, model.name, model.wording, len(origin.prompt), len(asked), body=body, logprobs=logprobs,
        with_usage=_with_usage(body), family=family,
    )  # fmt: skip
    return _prepared(model, asked, maker, body)


async def of_completions(find: Find, origin: Origin, data: bytes) -> Prepared:
    """Prepare the completions of prompts."""
    body = parsed(CompletionBody, data)
    model = find(body.model)
    completions.check(body)
    prompts = completions.prompts_of(body)
    ids = [await model.bridge.tokens(each, raw=True) if isinstance(each, str) else each for each in prompts]
    most = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    asked: list[Asked] = []
    echoes: list[Echo] = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        if most:
            asked += asked_of(model.bridge, origin, body, tokens, most, logprobs=body.logprobs, count=body.n or 1)
        echoes += [await _echo(model, body, prompt, tokens)] * (body.n or 1)
    maker = completions.Completions(
        origin, model.name, model.wording, sum(map(len, ids)), echoes, logprobs=body.logprobs,
        with_usage=_with_usage(body),
    )  # fmt: skip
    return _prepared(model, asked, maker, body)


async def of_response(find: Find, origin: Origin, data: bytes) -> Prepared:
    """Prepare a response."""
    body = parsed(responses.ResponseBody, data)
    model = find(body.model)
    responses.check(body)
    tools = chat.tools_of(body.tools or (), body.tool_choice)
    family = model.family if tools is not None else None
    if origin.prompt is None:
        origin.prompt = await prompt_of(model, chat.messages_of(responses.messages_of(body)), tools)
    general = responses.sampled(body)
    asked = asked_of(
        model.bridge, origin, general, origin.prompt, body.max_output_tokens, logprobs=body.top_logprobs,
        grammar=responses.grammar_of(body, model.family),
    )  # fmt: skip
    maker = responses.Response(origin, body, model.name, model.wording, len(origin.prompt), family)
    return _prepared(model, asked, maker, general)


ENDPOINTS: Mapping[Endpoint, Callable[[Find, Origin, bytes], Awaitable[Prepared]]] = {
    "chat": of_chat, "completions": of_completions, "responses": of_response,
}  # fmt: skip
"""They prepare the answers of the endpoints for text."""


async def prompt_of(
    model: Served, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None,
    arguments: dict[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """Return the token ids of a chat. The model is told of the tools by its template, or else in words."""
    if not tool_prompts.knows_tools(model.bridge.template):
        messages, tools = tool_prompts.in_words(messages, tools), None
    return await model.bridge.tokens(messages, tools=tools, template_arguments=arguments)


async def _echo(model: Served, body: CompletionBody, prompt: str | list[int], tokens: list[int]) -> Echo:
    if not body.echo:
        return Echo()
    text = prompt if isinstance(prompt, str) else model.bridge.text(tokens)
    most = body.logprobs
    if most is None:
        return Echo(text)
    ranks = await model.bridge.call(lambda: model.bridge.run.ranked(tokens, most)) if len(tokens) > 1 else []
    return Echo(text, tokens, ranks)


def _prepared(model: Served, asked: Sequence[Asked], maker: Answers, body: Sampled) -> Prepared:
    for index in range(len(asked), maker.count):  # nothing to generate: only an echo
        maker.add(index, Ended("length"))
    return Prepared(model, dict(enumerate(asked)), maker, bool(body.stream))


def _with_usage(body: Sampled) -> bool:
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)
