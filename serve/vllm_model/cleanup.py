"""Clean the captions of vLLM's own server as published, by `--middleware serve.vllm_model.cleanup.CleanCaptions`.

An ASGI middleware around vLLM's application. It changes the contents of /v1/chat/completions, streamed or not, unless
the request has `"raw": true`; and it refuses penalties, which vLLM would compute from the prompt's placeholder tokens.
"""

from __future__ import annotations

import json

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError
from serve.http.openai_api import Cleaner, error_body, require_neutral
from vlv.model.clean_up import clean_caption

PATH = "/v1/chat/completions"
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")


class CleanCaptions:
    """Pass everything on but penalties, and clean the captions of chat completions."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        fields = _fields(body)
        try:
            require_neutral({name: fields[name] for name in PENALTIES if fields.get(name) is not None})
        except ApiError as error:
            return await JSONResponse(error_body(error), error.status)(scope, replay, send)
        await self.app(scope, replay, send if fields.get("raw") is True else CleanedResponse(send))


def _fields(body: bytes) -> dict:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}  # vLLM refuses the request
    return fields if isinstance(fields, dict) else {}


class CleanedResponse:
    """Send one response: a JSON body is cleaned when it is complete, a stream event by event."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None
        self._streams = False
        self._buffer = b""
        self._cleaners: dict[int, Cleaner] = {}  # by the index of a choice

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self._streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
            body = b"".join(self._event(event) + b"\n\n" for event in events)
            if not message.get("more_body"):
                body, self._buffer = body + self._buffer, b""
            await self._send({**message, "body": body})
        else:
            self._buffer += message.get("body", b"")
            if not message.get("more_body"):
                await self._complete()

    async def _complete(self) -> None:
        body = _cleaned(self._buffer)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        content = json.loads(event[6:])
        for choice in content.get("choices", ()):
            cleaner, delta = self._cleaners.setdefault(choice["index"], Cleaner()), choice["delta"]
            text = cleaner.push(delta.get("content") or "")
            if choice.get("finish_reason"):
                text += cleaner.end()
            if text or delta.get("content"):
                delta["content"] = text
        return b"data: " + json.dumps(content, ensure_ascii=False).encode()


def _cleaned(body: bytes) -> bytes:
    """Return a chat.completion with cleaned contents; anything else unchanged."""
    try:
        content = json.loads(body)
        for choice in content["choices"]:
            choice["message"]["content"] = clean_caption(choice["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return body
    return json.dumps(content, ensure_ascii=False).encode()
