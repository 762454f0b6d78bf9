"""Requests while they arrive: bounded in size and time, and given up once the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.http.auth import ApiError

TEXTS = ("model", "stop", "user")  # form fields that are text; the others are read as JSON


def bounded(request: Request, most: int, grow: Callable[[int], None]) -> Request:
    """The request with a body of at most `most` bytes, each piece of which is given to `grow` as it comes.

    Raises ApiError 413, at once where the length is announced.
    """
    too_large = ApiError(413, "too_large", f"the request has more than {most >> 20} MiB")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    arrived = 0

    async def receive():
        nonlocal arrived
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > most:
            raise too_large
        grow(len(message.get("body", b"")))
        return message

    result = Request(request.scope, receive)
    result.state.arrived = asyncio.Event()
    return result


async def until_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The work's answer. Where the client goes away before, the work is cancelled: raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(request: Request) -> None:
    """Return once the client has closed the connection; until its body has arrived, reading that would tell."""
    await request.state.arrived.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request, seconds: float) -> dict:
    """The body as a JSON object. Raises ApiError."""
    try:
        body = json.loads(await _arrive(request, request.body(), seconds))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request", "the request's body is no JSON") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the request's body must be a JSON object")
    return body


async def read_bytes(request: Request, seconds: float) -> bytes:
    """The body as it is. Raises ApiError."""
    return await _arrive(request, request.body(), seconds)


async def read_form(
    request: Request, seconds: float, most: int
) -> tuple[list[tuple[str | None, Coroutine[Any, Any, bytes]]], dict]:
    """A multipart form's files, as name and content to await, and its other fields. Raises ApiError."""
    form = request.form(max_files=most, max_fields=32, max_part_size=1 << 16)
    try:
        items = (await _arrive(request, form, seconds)).multi_items()
    except (MultiPartException, HTTPException) as error:
        told = error.message if isinstance(error, MultiPartException) else error.detail
        raise ApiError(400, "invalid_request", f"the form cannot be read: {told}") from error
    files = [(value.filename, value.read()) for _, value in items if isinstance(value, UploadFile)]
    if not files:
        raise ApiError(400, "invalid_request", f"the form holds no file: send 1 to {most} files")
    return files, {name: _value(name, value) for name, value in items if isinstance(value, str)}


def _value(name: str, text: str):
    try:
        return text if name in TEXTS else json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _arrive(request: Request, receiving: Awaitable, seconds: float):
    try:
        async with asyncio.timeout(seconds):
            content = await receiving
    except TimeoutError as error:
        raise ApiError(408, "slow_request", f"the request did not arrive within {seconds:g} s") from error
    request.state.arrived.set()
    return content


async def all_of(work: list) -> list:
    """The results of all; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
