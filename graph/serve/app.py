"""Define the endpoints, as a Starlette application over the bridges of the models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from . import chat, completions, embeddings, metrics, responses, tool_prompts
from .answers import Answers
from .asking import asked_of
from .bodies import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, Sampled, TokenizeBody, parsed
from .bridge import Asked, Bridge, Ended, Reply
from .completions import Echo
from .guard import Door, Guard
from .problems import FAILED, Problem, problem_of, unknown
from .streams import Events, Kept, Stream, collected
from .tool_calls import Family, family_of
from .wording import Wording

JSON = "application/json"


@dataclass(slots=True)
class Served:
    """Hold one model of the server."""

    name: str
    bridge: Bridge
    wording: Wording
    family: Family
    """The model writes the calls of tools in this form."""
    created: int


class Endpoints:
    """Answer the requests of clients."""

    def __init__(self, models: Mapping[str, Bridge], kept: Kept) -> None:
        now = int(time.time())
        self.stopping = False
        self._kept = kept
        self._models = {
            name: Served(name, bridge, Wording(bridge.codec), family_of(bridge.template), now)
            for name, bridge in models.items()
        }

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with and without /v1."""
        posts = {
            "/chat/completions": self.chat, "/completions": self.completions, "/responses": self.responses,
            "/embeddings": self.embeddings, "/tokenize": self.tokenize, "/detokenize": self.detokenize,
        }  # fmt: skip
        gets = {
            "/models": self.models, "/models/{name:path}": self.model, "/health": self.health, "/metrics": self.metrics,
            "/streams/{request_id}": self.resume, "/tokenizer_info": self.tokenizer_info,
        }  # fmt: skip
        return [
            Route(before + path, _answering(endpoint), methods=[method])
            for method, those in (("POST", posts), ("GET", gets))
            for path, endpoint in those.items()
            for before in ("", "/v1")
        ]

    # -- text -------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        body = parsed(ChatBody, await request.body())
        model = self._writer(body.model)
        chat.check(body)
        tools = chat.tools_of(chat.functions_of(body), body.tool_choice)
        family = model.family if tools is not None else None
        prompt = await self._prompt(model, chat.messages_of(body.messages), tools, body.chat_template_kwargs)
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = asked_of(
            model.bridge, body, prompt, most, logprobs=logprobs, key=request.state.key,
            traceparent=request.headers.get("traceparent"), count=body.n or 1, grammar=chat.grammar_of(body, model.family),
        )  # fmt: skip
        maker = chat.Chat(
            model.name, model.wording, len(prompt), len(asked), logprobs=logprobs, with_usage=_with_usage(body),
            family=family,
        )  # fmt: skip
        return await self._answer(request, model, body, asked, maker)

    async def _prompt(
        self, model: Served, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None,
        arguments: dict[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Return the token ids of a chat. The model is told of the tools by its template, or else in words."""
        if not tool_prompts.knows_tools(model.bridge.template):
            messages, tools = tool_prompts.in_words(messages, tools), None
        return await model.bridge.tokens(messages, tools=tools, template_arguments=arguments)

    async def completions(self, request: Request) -> Any:
        body = parsed(CompletionBody, await request.body())
        model = self._writer(body.model)
        completions.check(body)
        prompts = completions.prompts_of(body)
        ids = [await model.bridge.tokens(each, raw=True) if isinstance(each, str) else each for each in prompts]
        most = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
        asked: list[Asked] = []
        echoes: list[Echo] = []
        for prompt, tokens in zip(prompts, ids, strict=True):
            if most:
                asked += asked_of(
                    model.bridge, body, tokens, most, logprobs=body.logprobs, key=request.state.key,
                    traceparent=request.headers.get("traceparent"), count=body.n or 1,
                )  # fmt: skip
            echoes += [await self._echo(model, body, prompt, tokens)] * (body.n or 1)
        maker = completions.Completions(
            model.name, model.wording, sum(map(len, ids)), echoes, logprobs=body.logprobs, with_usage=_with_usage(body)
        )
        return await self._answer(request, model, body, asked, maker)

    async def _echo(
        self, model: Served, body: CompletionBody, prompt: str | list[int], tokens: list[int]
    ) -> Echo:  # fmt: skip
        if not body.echo:
            return Echo()
        text = prompt if isinstance(prompt, str) else model.bridge.text(tokens)
        most = body.logprobs
        if most is None:
            return Echo(text)
        ranks = await model.bridge.call(lambda: model.bridge.run.ranked(tokens, most)) if len(tokens) > 1 else []
        return Echo(text, tokens, ranks)

    async def responses(self, request: Request) -> Any:
        body = parsed(responses.ResponseBody, await request.body())
        model = self._writer(body.model)
        responses.check(body)
        tools = chat.tools_of(body.tools or (), body.tool_choice)
        family = model.family if tools is not None else None
        prompt = await self._prompt(model, chat.messages_of(responses.messages_of(body)), tools)
        general = responses.sampled(body)
        asked = asked_of(
            model.bridge, general, prompt, body.max_output_tokens, logprobs=body.top_logprobs, key=request.state.key,
            traceparent=request.headers.get("traceparent"), grammar=responses.grammar_of(body, model.family),
        )  # fmt: skip
        maker = responses.Response(body, model.name, model.wording, len(prompt), family)
        return await self._answer(request, model, general, asked, maker)

    async def embeddings(self, request: Request) -> Any:
        body = parsed(EmbeddingBody, await request.body())
        model = self._model(body.model)
        return _json(await embeddings.answer(body, model.bridge, model.name))

    async def _answer(
        self, request: Request, model: Served, body: Sampled, asked: Sequence[Asked], maker: Answers
    ) -> Any:  # fmt: skip
        numbered = dict(enumerate(asked))
        for index in range(len(asked), maker.count):  # nothing to generate: only an echo
            maker.add(index, Ended("length"))
        if body.stream:
            stream = Stream(model.bridge, numbered, maker, request.state.request_id, request.state.key)
            stream.start()
            await stream.accepted()
            self._kept.add(stream)
            return Events(stream, {})
        if not await collected(Reply(model.bridge, numbered), maker, request.receive):
            return Response(status_code=499)  # nobody reads it
        return _json(maker.whole())

    async def resume(self, request: Request) -> Any:
        """Send the rest of a stream to a client that has lost its connection."""
        stream = self._kept.find(request.path_params["request_id"], request.state.key)
        last = request.headers.get("last-event-id", request.query_params.get("after", "-1"))
        try:
            after = int(last)
        except ValueError:
            raise Problem(400, f"Last-Event-ID: expected a number, got {last!r:.60}", code="invalid_value") from None
        return Events(stream, {}, after)

    # -- about the models -------------------------------------------------------------------------------------------

    async def models(self, _request: Request) -> Any:
        return _json({"object": "list", "data": [_described(model) for model in self._models.values()]})

    async def model(self, request: Request) -> Any:
        return _json(_described(self._model(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Any:
        body = parsed(TokenizeBody, await request.body())
        model = self._model(body.model)
        text = body.content if body.content is not None else body.prompt
        if (text is None) == (body.messages is None):
            raise Problem(400, "expected either content or messages", param="content", code="invalid_value")
        if text is None:
            ids = await self._prompt(model, chat.messages_of(body.messages or ()), None)
        else:
            ids = await model.bridge.tokens(text, raw=True)
        tokens = [{"id": each, "piece": model.wording.text(each)} for each in ids] if body.with_pieces else ids
        return _json({"tokens": tokens, "count": len(ids), "max_model_len": model.bridge.context})

    async def detokenize(self, request: Request) -> Any:
        body = parsed(DetokenizeBody, await request.body())
        model = self._model(body.model)
        text = model.bridge.text(body.tokens)
        return _json({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Any:
        """Tell what clients need to count and cut a chat with /tokenize and /detokenize, as lm-eval does."""
        codec = self._model(request.query_params.get("model")).bridge.codec
        if codec is None:
            raise unknown("the model has no tokenizer")
        return _json({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": codec.bos_token, "eos_token": codec.eos_token,
            "chat_template": codec.chat_template,
        })  # fmt: skip

    async def health(self, _request: Request) -> Any:
        """Answer 200 while every model can serve, else 503 with what is wrong."""
        wrong = {} if not self.stopping else {"server": "it is stopping"}
        for name, served in self._models.items():
            lost = await served.bridge.lost()
            if lost:
                wrong[name] = lost
        return _json({"status": "ok"} if not wrong else {"status": "unhealthy", "why": wrong}, 503 if wrong else 200)

    async def metrics(self, _request: Request) -> Any:
        bridges = {name: served.bridge for name, served in self._models.items()}
        return Response(await metrics.page(bridges), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _writer(self, name: str) -> Served:
        """Return a model that generates text.

        Raises:
            Problem: there is no such model, or it embeds only.
        """
        model = self._model(name)
        if not model.bridge.run.plan.graph.generates:
            raise Problem(
                400,
                f"the model {name!r} generates no text; ask /v1/embeddings",
                param="model",
                code="unsupported_model",
            )
        return model

    def _model(self, name: str | None) -> Served:
        """Return a model by its name; the only one if no name is given.

        Raises:
            Problem: there is no such model.
        """
        if self.stopping:
            raise Problem(503, "the server is stopping", FAILED, code="stopping", headers={"retry-after": "5"})
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        found = self._models.get(name or "")
        if found is None:
            there = ", ".join(self._models)
            raise unknown(
                f"The model {name!r:.200} does not exist; there are {there}", param="model", code="model_not_found"
            )
        return found


def application(models: Mapping[str, Bridge], door: Door, window_s: float) -> tuple[Any, Endpoints]:
    """Return the application, and its endpoints, which `stopping` closes."""
    endpoints = Endpoints(models, Kept(window_s))
    routes = endpoints.routes()
    app = Starlette(
        routes=routes,
        exception_handlers={Problem: _on_problem, HTTPException: _on_http, Exception: _on_problem},
    )
    posts = frozenset(route.path for route in routes if isinstance(route, Route) and "POST" in (route.methods or ()))
    return Guard(app, door, posts), endpoints


def _answering(endpoint: Any) -> Any:
    """Return an endpoint whose errors of all kinds become problems."""

    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except (asyncio.CancelledError, Problem):
            raise
        except Exception as error:
            raise problem_of(error) from error

    return answer


async def _on_problem(_request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return Response(problem.to_bytes(), problem.status, problem.headers, JSON)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path[:200]}"
    said = "there is no such endpoint" if error.status_code == 404 else error.detail
    problem = unknown(f"{path}: {said}") if error.status_code == 404 else Problem(error.status_code, f"{path}: {said}")
    return Response(problem.to_bytes(), problem.status, dict(error.headers or {}), JSON)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)


def _described(model: Served) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "ranvier",
        "max_model_len": model.bridge.context,
    }  # fmt: skip


def _with_usage(body: Sampled) -> bool:
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)
