"""Define the endpoints, as a Starlette application over the bridges of the models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..bridge.bridge import Bridge, Reply
from ..bridge.problems import FAILED, STOPPING, Problem, problem_of, unknown
from ..bridge.stream_log import Endpoint, Origin, Record
from ..endpoints import chat, embeddings
from ..endpoints.bodies import DetokenizeBody, EmbeddingBody, TokenizeBody, parsed
from ..endpoints.tool_calls import family_of
from ..endpoints.wording import Wording
from ..endpoints.writing import ENDPOINTS, Served, prompt_of
from ..page.pages import Pages
from . import metrics
from .guard import Door, Guard
from .streams import Events, Kept, Stream, collected

JSON = "application/json"


class Endpoints:
    """Answer the requests of clients."""

    def __init__(self, models: Mapping[str, Bridge], kept: Kept) -> None:
        now = int(time.time())
        self.stopping = False
        self._kept = kept
        self._taking_up: dict[str, asyncio.Lock] = {}
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
            Route(before + path, answering(endpoint), methods=[method])
            for method, those in (("POST", posts), ("GET", gets))
            for path, endpoint in those.items()
            for before in ("", "/v1")
        ]

    # -- text -------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Any:
        return await self._answer(request, "completions")

    async def responses(self, request: Request) -> Any:
        return await self._answer(request, "responses")

    async def embeddings(self, request: Request) -> Any:
        body = parsed(EmbeddingBody, await request.body())
        model = self._model(body.model)
        return _json(await embeddings.answer(body, model.bridge, model.name))

    async def _answer(self, request: Request, endpoint: Endpoint) -> Any:
        data = await request.body()
        origin = Origin(
            request_id=request.state.request_id, owner=request.state.key, seed=secrets.randbits(62),
            traceparent=request.headers.get("traceparent"),
        )  # fmt: skip
        made = await ENDPOINTS[endpoint](self._writer, origin, data)
        bridge = made.model.bridge
        if not made.streams:
            if not await collected(Reply(bridge, made.asked), made.maker, request.receive):
                return Response(status_code=499)  # nobody reads it
            return _json(made.maker.whole())
        stream = Stream(bridge, made.asked, made.maker, origin)
        stream.start()
        await stream.accepted()
        self._kept.add(stream)
        stream.write_down(endpoint, data)
        return Events(stream)

    async def resume(self, request: Request) -> Any:
        """Send the rest of a stream to a client that has lost its connection, or whose server was killed."""
        last = request.headers.get("last-event-id", request.query_params.get("after", "-1"))
        try:
            after = int(last)
        except ValueError:
            raise Problem(400, f"Last-Event-ID: expected a number, got {last!r:.60}", code="invalid_value") from None
        self._check_open()
        name, owner = request.path_params["request_id"], request.state.key
        if self._kept.left(name, owner) is not None:
            try:
                async with self._taking_up.setdefault(name, asyncio.Lock()):
                    record = self._kept.left(name, owner)
                    if record is not None:
                        await self._take_up(record)
            finally:
                self._taking_up.pop(name, None)
        stream = self._kept.find(name, owner)
        request.state.request_id = name
        return Events(stream, after)

    async def _take_up(self, record: Record) -> None:
        """Make the stream of an earlier server again, up to what is known of it."""
        opened = record.opened
        made = await ENDPOINTS[opened.endpoint](self._writer, opened.origin, opened.body.encode())
        stream = Stream(made.model.bridge, made.asked, made.maker, opened.origin)
        stream.take_up(record)
        self._kept.add(stream)

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
            ids = await prompt_of(model, chat.messages_of(body.messages or ()), None)
        else:
            asked = [each for each in (body.add_special, body.add_special_tokens) if each is not None]
            ids = await model.bridge.tokens(text, raw=True, special=all(asked))
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

    def _check_open(self) -> None:
        if self.stopping:
            raise Problem(503, "the server is stopping", FAILED, code=STOPPING, headers={"retry-after": "5"})

    def _model(self, name: str | None) -> Served:
        """Return a model by its name; the only one if no name is given.

        Raises:
            Problem: there is no such model.
        """
        self._check_open()
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        found = self._models.get(name or "")
        if found is None:
            there = ", ".join(self._models)
            raise unknown(
                f"The model {name!r:.200} does not exist; there are {there}", param="model", code="model_not_found"
            )
        return found


def application(models: Mapping[str, Bridge], door: Door, kept: Kept, pages: Pages) -> tuple[Any, Endpoints]:
    """Return the application, and its endpoints, which `stopping` closes."""
    endpoints = Endpoints(models, kept)
    gets, posts_of_page = pages.routes()
    routes = [
        *endpoints.routes(),
        *(Route(path, answering(endpoint)) for path, endpoint in gets.items()),
        *(Route(path, answering(endpoint), methods=["POST"]) for path, endpoint in posts_of_page.items()),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={Problem: on_problem, HTTPException: _on_http, Exception: on_problem},
    )
    posts = frozenset(route.path for route in routes if isinstance(route, Route) and "POST" in (route.methods or ()))
    return Guard(app, door, posts), endpoints


def answering(endpoint: Any) -> Any:
    """Return an endpoint whose errors of all kinds become problems."""

    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except (asyncio.CancelledError, Problem):
            raise
        except Exception as error:
            raise problem_of(error) from error

    return answer


async def on_problem(_request: Request, error: Exception) -> Response:
    """Answer with an error in OpenAI's form."""
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
