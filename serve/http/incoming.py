"""Receive requests: limit their size and time, and cancel the work if the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.http.errors import ApiError, invalid_request

TEXT_FIELDS = ("model", "stop", "user")  # form fields that are text; the others are parsed as JSON


def limit_body(request: Request, max_bytes: int, add: Callable[[int], None]) -> Request:
    """Return the request with a body of at most `max_bytes`; each piece's length is given to `add` as it arrives.

    Raises ApiError 413, before anything is read if Content-Length announces more.
    """
    too_large = ApiError(413, "too_large", f"the request has more than {max_bytes >> 20} MiB")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    received = 0

    async def receive():
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        add(len(message.get("body", b"")))
        return message

    result = Request(request.scope, receive)
    result.state.received = asyncio.Event()
    return result


async def cancel_on_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """Return the work's response. Cancels the work and raises ClientDisconnect if the client disconnects before."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    """Return once the client has closed the connection; until the body has arrived, reading it would report that."""
    await request.state.received.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request, seconds: float) -> dict:
    """Read the body as a JSON object within `seconds`. Raises ApiError."""
    try:
        body = json.loads(await _receive(request, request.body(), seconds))
    except (ValueError, RecursionError) as error:
        raise invalid_request("the request's body is no JSON") from error
    if not isinstance(body, dict):
        raise invalid_request("the request's body must be a JSON object")
    return body


async def read_bytes(request: Request, seconds: float) -> bytes:
    """Read the body as bytes within `seconds`. Raises ApiError."""
    return await _receive(request, request.body(), seconds)


async def read_form(
    request: Request, seconds: float, max_files: int
) -> tuple[list[tuple[str | None, Coroutine[Any, Any, bytes]]], dict]:
    """Read a multipart form: its files as (name, content to await), and its other fields. Raises ApiError."""
    form = request.form(max_files=max_files, max_fields=32, max_part_size=1 << 16)
    try:
        items = (await _receive(request, form, seconds)).multi_items()
    except (MultiPartException, HTTPException) as error:
        reason = error.message if isinstance(error, MultiPartException) else error.detail
        raise invalid_request(f"the form cannot be read: {reason}") from error
    files = [(value.filename, value.read()) for _, value in items if isinstance(value, UploadFile)]
    if not files:
        raise invalid_request(f"the form holds no file: send 1 to {max_files} files")
    return files, read_fields((name, value) for name, value in items if isinstance(value, str))


def read_fields(items: Iterable[tuple[str, str]]) -> dict:
    """Return the fields of a form or of a URL's query: JSON values, or texts."""
    return {name: _value(name, value) for name, value in items}


def _value(name: str, text: str):
    try:
        return text if name in TEXT_FIELDS else json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _receive(request: Request, receiving: Awaitable, seconds: float):
    try:
        async with asyncio.timeout(seconds):
            content = await receiving
    except TimeoutError as error:
        raise ApiError(408, "slow_request", f"the request did not arrive within {seconds:g} s") from error
    request.state.received.set()
    return content


async def gather_or_cancel(work: list) -> list:
    """Return all results in order; the first failure cancels the other work and is raised unchanged."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def merge(streams: list[AsyncGenerator]) -> AsyncGenerator[tuple[int, Any]]:
    """Yield (number of the stream, its item) in the order of arrival; the first failure ends all and is raised."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any, Exception | None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator) -> None:
        error = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((number, item, None))
        except Exception as raised:
            error = raised
        queue.put_nowait((number, None, error))

    tasks = [asyncio.create_task(forward(*numbered)) for numbered in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            number, item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
