"""The data-centre side of captioning at the edge: python -m serve.gateway --ckpt DIR --llm-url http://127.0.0.1:8001

Takes prompt embeddings as safetensors, checks shape, type and finiteness, and hands them to a stock `vllm serve
LLM --enable-prompt-embeds` on this machine. vLLM itself unpickles what it is sent; it must never be reachable.

    POST /v1/generate    body: safetensors with one tensor `embeds` [queries, width];
                         header X-VLV-Sampling: {"max_tokens": 300, "temperature": 0, "seed": 0, "stream": false}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import urllib.parse
from contextlib import aclosing

from serve.command import model_arguments
from serve.server import EXIT_CODES, in_loop, listen, listening_arguments, loopback, read_keys
from vlv.common.command import Misuse, Parser, debug_argument, run_command

HEADER = "x-vlv-sampling"
WISHES = {"max_tokens", "temperature", "seed", "stream"}  # what it may hold
WATCH = 1  # seconds between looks at vLLM


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m serve.gateway",
        description="Take prompt embeddings from elsewhere, checked, to a vLLM on this machine.",
        epilog=EXIT_CODES,
        parents=[model_arguments(in_flight=512), listening_arguments(), debug_argument()],
    )
    p.add_argument("--llm-url", metavar="URL", help="vLLM on this machine, such as http://127.0.0.1:8001")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(in_loop(_serve), parser().parse_args(argv))


class Upstream:
    """vLLM as a service: ready while it answers."""

    def __init__(self, engine, metrics):
        self.engine, self.metrics, self.ready = engine, metrics, False
        self.failure = asyncio.get_running_loop().create_future()
        metrics.watch("ready", lambda: self.ready)
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        try:
            await self.engine.start()
            while True:
                self.ready = await self.engine.healthy()
                await asyncio.sleep(WATCH)
        except Exception as error:
            self.failure.set_exception(error)

    def check_ready(self) -> None:
        """Raise ApiError 503 while vLLM does not answer."""
        from serve.http.auth import ApiError

        if not self.ready:
            raise ApiError(503, "not_ready", "the language model does not answer", 10)

    async def close(self) -> None:
        self._task.cancel()
        await self.engine.close()


def routes(upstream: Upstream, keys, admission, bounds):
    """The application's CaptionApp."""
    from starlette.responses import JSONResponse

    from serve.engines.base import EmbedsError, EngineError
    from serve.http import openai_api as api
    from serve.http.app import CaptionApp
    from serve.http.auth import ApiError
    from serve.http.incoming import read_bytes

    spec, engine = upstream.engine.spec, upstream.engine

    class Gateway(CaptionApp):
        """Embeddings in, token ids out, in the form of OpenAI's completions."""

        def app(self):
            return self.application({"/v1/generate": self.generate}, {"/v1/models": self.models})

        async def generate(self, request, place):
            fields = wishes_of(request.headers.get(HEADER, "{}"))
            stream = fields.get("stream", False)
            sampling = api.wish(fields, engine.max_tokens).sampling
            embeds = embeds_of(await read_bytes(request, self.bounds.body_seconds), spec)
            if stream:
                return self._stream(embeds, sampling)
            async with aclosing(self._steps(embeds, sampling, False)) as steps:
                ids = [i async for step in steps for i in step]
            reason = "stop" if engine.end in ids else "length"
            return {"choices": [{"token_ids": ids, "finish_reason": reason}]}

        async def _stream(self, embeds, sampling):
            async with aclosing(self._steps(embeds, sampling, True)) as steps:
                async for ids in steps:
                    yield api.event({"choices": [{"token_ids": ids, "finish_reason": None}]})

        async def _steps(self, embeds, sampling, every: bool):
            """Closed with the request: vLLM's own is cancelled before the place is free."""
            try:
                async with aclosing(engine.tokens(embeds, sampling, every)) as steps:
                    async for ids in steps:
                        self.metrics.tokens.inc(len(ids))
                        yield ids
            except EmbedsError as error:
                raise ApiError(400, "invalid_request", str(error)) from error
            except EngineError as error:
                raise ApiError(503, "engine", "the language model does not answer", 10) from error

        async def models(self, _):
            entry = {"id": "vlv", "object": "model", "accepts": "safetensors", "max_tokens": engine.max_tokens}
            return JSONResponse({"data": [{**entry, "queries": spec.queries, "width": spec.width}]})

    return Gateway(upstream, keys, admission, bounds)


def wishes_of(header: str) -> dict:
    """The fields of the header. Raises ApiError for what cannot be honoured here."""
    from serve.http.auth import ApiError

    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ApiError(400, "invalid_request", f"the header {HEADER} is no JSON object")
    if others := sorted(fields.keys() - WISHES):
        raise ApiError(400, "invalid_request", f"{HEADER} holds {', '.join(sorted(WISHES))}, not {others[0][:40]}")
    if not isinstance(fields.get("stream", False), bool):
        raise ApiError(400, "invalid_request", "stream must be true or false")
    return fields


def embeds_of(content: bytes, spec):
    """The tensor of a request's body, checked. Raises ApiError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from serve.engines.base import EmbedsError
    from serve.http.auth import ApiError

    try:
        tensors = load(content)
        if tensors.keys() != {"embeds"}:
            raise EmbedsError(f"the body must hold one tensor, embeds, not {sorted(tensors)[:5]}")
        spec.check(tensors["embeds"])
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        told = str(error) if isinstance(error, EmbedsError) else "the body is no safetensors"
        raise ApiError(400, "invalid_request", told) from error
    return tensors["embeds"]


async def _serve(args: argparse.Namespace) -> int:
    from serve.engines.base import LLMSpec, Options
    from serve.engines.remote import RemoteEngine
    from serve.http.app import Bounds
    from serve.http.auth import Admission
    from serve.http.metrics import Metrics
    from vlv.checkpoints.folder import Checkpoint, CheckpointError

    if not args.ckpt or not args.llm_url:
        raise Misuse("--ckpt and --llm-url are needed (--help shows the usage)")
    if not loopback(urllib.parse.urlsplit(args.llm_url).hostname or ""):
        raise Misuse(
            f"--llm-url {args.llm_url}: vLLM must be on this machine (127.0.0.1), it unpickles what it is sent"
        )
    keys = read_keys(args)
    try:
        spec = LLMSpec.of(Checkpoint.open(args.ckpt))
        max_tokens = spec.max_tokens(args.max_tokens)
    except (CheckpointError, ValueError) as error:
        raise Misuse(str(error)) from error
    engine = RemoteEngine(spec, max_tokens, args.in_flight, args.debug, Options(url=args.llm_url))
    engine.patience = math.inf  # vLLM may take long to load, and to come back
    upstream = Upstream(engine, Metrics())
    bounds = Bounds(args.deadline, 20, spec.queries * spec.width * 4 + 4096, 1)  # float32, and a header
    gateway = routes(upstream, keys, Admission(args.in_flight), bounds)
    try:
        return await listen(gateway.app(), args, gateway, upstream.failure, 20)
    finally:
        await upstream.close()


if __name__ == "__main__":
    sys.exit(main())
