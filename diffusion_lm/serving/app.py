"""The HTTP server: OpenAI's completions and chats over an `Engine`, and the page at /."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from diffusion_lm.samplers.base import DIFFUSION
from diffusion_lm.serving import ask
from diffusion_lm.serving.ask import RequestError
from diffusion_lm.serving.engine import Engine, Event, QueueFull, Ticket

MAX_BODY = 4_000_000  # bytes of a request
_POLL_S = 0.2  # how soon a client that left is noticed
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(engine: Engine, name: str, *, api_key: str | None = None, hosts: tuple[str, ...] = ()) -> Starlette:
    """The application.

    Args:
      engine: what generates.
      name: the model's.
      api_key: what requests must carry as a bearer token; None: nothing.
      hosts: names of this server that a request may use, so that no other site's page can reach a server on localhost;
        none: any.
    """
    server = _Server(engine, name, api_key, hosts)
    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.models),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    errors = {
        HTTPException: server.http_error,
        RequestError: server.request_error,
        QueueFull: server.full,
        ClientDisconnect: server.gone,
        ValueError: server.failed,
        ConnectionAbortedError: server.failed,
        Exception: server.failed,
    }
    return Starlette(routes=routes, exception_handlers=errors)


class _Server:
    def __init__(self, engine: Engine, name: str, api_key: str | None, hosts: tuple[str, ...]):
        self.engine, self.name, self.api_key, self.hosts = engine, name, api_key, hosts
        self.created = int(time.time())
        self.html = resources.files("diffusion_lm.serving").joinpath("page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        self.check(request, key=False)
        return HTMLResponse(self.html, headers={"Content-Security-Policy": _POLICY})

    async def health(self, request: Request) -> Response:
        self.check(request, key=False)
        return _json({"status": "ok", **self.engine.load()})

    async def models(self, request: Request) -> Response:
        self.check(request)
        asked, model = request.path_params.get("name"), self.engine.model
        if asked not in (None, self.name):
            raise RequestError(f"there is no model {asked[:80]!a} here", status=404, code="model_not_found")
        one = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "diffusion_lm",
            "context": model.config.data.seq_len,
            "samplers": self.engine.samplers,
            "infills": model.config.objective.layout.denoises,
            "chats": bool(getattr(model.tokenizer, "chat_template", "")),
            "canvas_length": model.config.objective.layout.canvas_length(model.config.data.seq_len),
        }
        return _json(one if asked else {"object": "list", "data": [one]})

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, chat=True)

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens, in the shape that vLLM and SGLang give."""
        body, model = await self.body(request), self.engine.model
        ids = (await asyncio.to_thread(ask.read_text, body, name=self.name, model=model)).tolist()
        shape = {"count": len(ids), "max_model_len": model.config.data.seq_len}
        return _json({"tokens": ids, "token_strs": model.tokenizer.pieces(ids), **shape})

    async def body(self, request: Request) -> bytes:
        """What a client sent that may send something."""
        self.check(request)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise RequestError(f"a request has at most {MAX_BODY} bytes", status=413)
        return body

    async def answer(self, request: Request, *, chat: bool) -> Response:
        body = await self.body(request)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        send = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)  # noqa: E731
        asked = await asyncio.to_thread(ask.read, body, chat=chat, name=self.name, model=self.engine.model)
        ticket = await asyncio.to_thread(self.engine.submit, asked, send)
        replies = _Replies(ticket, self)
        if asked.stream:
            chunks = replies.chunks(self.events(request, ticket, events))
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with contextlib.aclosing(self.events(request, ticket, events)) as coming:
            async for _ in coming:
                pass
        return _json(replies.whole())

    async def events(self, request: Request, ticket: Ticket, events: asyncio.Queue) -> AsyncIterator[Event]:
        """What the engine sends, until the texts are complete; the ticket is cancelled if the client leaves first."""
        waiting = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(events.get())
                done, _ = await asyncio.wait([waiting], timeout=_POLL_S)
                if not done:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    continue
                event, waiting = waiting.result(), None
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if waiting:
                waiting.cancel()
            self.engine.cancel(ticket)

    def check(self, request: Request, key: bool = True) -> None:
        """Raises RequestError for a request from another site's page, or without the key."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.hosts and host.rsplit(":", 1)[0] not in self.hosts:
            raise RequestError(f"this server is not called {host[:80]!a}", status=403)
        if origin and origin.partition("://")[2] != host:
            raise RequestError("pages of other sites may not use this server", status=403)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")

    async def request_error(self, request: Request, error: RequestError) -> Response:
        return _json(error_of(error), error.status)

    async def http_error(self, request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"[:200]
        message = {404: f"there is no {what}", 405: f"{what} is not possible"}.get(error.status_code, error.detail)
        return _json(error_of(RequestError(message)), error.status_code)

    async def full(self, request: Request, error: QueueFull) -> Response:
        return _json(error_of(RequestError(str(error), code="queue_full"), "overloaded"), 429, {"Retry-After": "1"})

    async def gone(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    async def failed(self, request: Request, error: Exception) -> Response:
        return _json(_failure(error), 503 if isinstance(error, ConnectionAbortedError) else 500)


def error_of(error: RequestError, kind: str = "invalid_request_error") -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _failure(error: Exception) -> dict:
    told = isinstance(error, ValueError | ConnectionAbortedError)
    return error_of(RequestError(str(error) if told else "the server failed: see its log"), "server_error")


def _json(value: Any, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json.dumps(value).encode(), status, headers, media_type="application/json")


class _Replies:
    """A ticket's answer in OpenAI's shapes, whole or in chunks."""

    def __init__(self, ticket: Ticket, server: _Server):
        self.ticket, self.ask, self.tokenizer = ticket, ticket.ask, server.engine.model.tokenizer
        kind = "chat.completion" if self.ask.chat else "text_completion"
        chunk = ".chunk" if self.ask.chat and self.ask.stream else ""
        identity = f"{'chatcmpl' if self.ask.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": identity, "object": kind + chunk, "created": int(time.time()), "model": server.name}
        self.head |= {"seed": self.ask.seed}
        self.sent = [0] * len(ticket.answers)  # tokens of each text whose log probabilities were sent
        self.shown: dict[int, list] = {}  # of each text, the ids that the page has

    def whole(self) -> dict:
        """The response without streaming."""
        choices = []
        for i, answer in enumerate(self.ticket.answers):
            logprobs = self.logprobs(i, len(answer.ids), self.ticket.written[i])
            text = (
                {"message": {"role": "assistant", "content": answer.text}} if self.ask.chat else {"text": answer.text}
            )
            choices.append({"index": i, **text, "logprobs": logprobs, "finish_reason": answer.finish_reason})
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Server-sent events: a chunk wherever there is something new, usage if asked for, and [DONE]."""
        try:
            if self.ask.chat:
                for i in range(len(self.ticket.answers)):
                    yield self.event({"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            async with contextlib.aclosing(events) as coming:
                async for event in coming:
                    yield self.event(self.choice(event))
            if self.ask.include_usage:
                yield _event({**self.head, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        except Exception as error:  # the status has been sent: what is left is to say it
            yield _event(_failure(error))

    def choice(self, event: Event) -> dict:
        """One chunk's choice."""
        delta = {"content": event.piece} if event.piece else {}
        text = {"delta": delta} if self.ask.chat else {"text": event.piece}
        logprobs = (
            self.logprobs(event.text, event.num_tokens, event.written) if event.piece or event.finish_reason else None
        )
        more = {"pass": self.a_pass(event)} if self.ask.passes else {}
        return {"index": event.text, **text, "logprobs": logprobs, "finish_reason": event.finish_reason, **more}

    def event(self, choice: dict) -> str:
        return _event({**self.head, "choices": [choice]})

    def a_pass(self, event: Event) -> dict:
        """What a pass wrote, from the first token on that it changed: [text, confidence, writer, id] each, null for a
        mask. The first has the prompt's ids, too."""
        written, mask = event.written, self.tokenizer.mask
        width = self.ask.max_tokens if self.ask.infill else len(written.tokens)
        there = np.flatnonzero(written.tokens[:width] != mask)
        until = int(there[-1]) + 1 if len(there) else 0
        if self.ticket.canvas and written.writer[min(event.num_tokens, width - 1)] == DIFFUSION:
            until = max(until, min(width, event.num_tokens + self.ticket.canvas))  # the masks of the canvas at hand
        if event.finish_reason:
            until = min(until, event.num_tokens)
        pieces = self.tokenizer.pieces(written.tokens[:until])
        new = [
            None if token == mask else [piece, round(float(p), 3), int(writer), token]
            for token, piece, p, writer in zip(
                written.tokens[:until].tolist(), pieces, written.confidence, written.writer, strict=False
            )
        ]
        first = {} if event.text in self.shown else {"prompt": self.ticket.ids[event.text].tolist()}
        old = self.shown.get(event.text, [])
        same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        self.shown[event.text] = new
        return {"at": same, "tokens": new[same:], "final": event.num_tokens, "nfe": written.nfe, **first}

    def logprobs(self, text: int, count: int, written: Any) -> dict | None:
        """Of the tokens since the last call, up to `count`."""
        if not self.ask.logprobs:
            return None
        first, self.sent[text] = self.sent[text], count
        ids = written.tokens[first:count]
        nats = np.log(np.maximum(written.confidence[first:count], 1e-38)).astype(float).round(6).tolist()
        pieces = self.tokenizer.pieces(ids)
        if not self.ask.chat:
            return {"tokens": pieces, "token_logprobs": nats, "top_logprobs": None, "text_offset": None}
        return {
            "content": [
                {"token": piece, "logprob": p, "bytes": None, "top_logprobs": []}
                for piece, p in zip(pieces, nats, strict=True)
            ],
            "refusal": None,
        }

    def usage(self) -> dict:
        prompt = sum(map(len, self.ask.prompts))
        new = sum(len(answer.ids) for answer in self.ticket.answers)
        nfe = max((written.nfe for written in self.ticket.written if written), default=0)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "nfe": nfe}


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def is_loopback(host: str) -> bool:
    """Whether a server at this address is reached from its own machine only."""
    return host in ("127.0.0.1", "localhost", "::1")
