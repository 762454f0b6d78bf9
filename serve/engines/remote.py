"""The engine that sends requests to a server with the language model: --engine remote --llm-url URL.

The URL is that of a stock `vllm serve LLM --enable-prompt-embeds`, which takes pickled tensors and therefore only
trusted callers, or of a `serve.gateway`, which takes safetensors. Embeddings travel as bfloat16: queries x width x
2 bytes an image. Connections are kept; what fails before its first token is tried again.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import torch
from safetensors.torch import save
from torch import Tensor

from serve.engines.base import EmbedsError, EngineError, LLMEngine, OptionError, Sampling
from vlv.common.command import one_line
from vlv.common.retry import retry_after, retry_delay

RETRIES = 5  # of one request
BUSY = (408, 425, 429, 500, 502, 503, 504, 529)  # status codes after which another attempt may succeed
GREEDY = Sampling()
PASSED_ON = ("top_p", "top_k", "min_p", "min_tokens", "ignore_eos")  # fields of Sampling that vLLM calls alike
# set in every request: else the server takes them from the model's generation_config.json, and penalties would count
# the placeholder tokens of the embeddings
NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
KEY = "VLV_API_KEY"  # environment variable with the key that the server asks for


class RemoteEngine(LLMEngine):
    """Send requests to a server that has the language model; the tokenizer is the checkpoint's, here."""

    name = "remote"
    takes = frozenset({"url"})
    patience = 60.0  # seconds to wait for a server that does not answer yet

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if not self.options.url:
            raise OptionError("--engine remote needs --llm-url, the server that runs the language model")
        if not self.options.url.startswith(("http://", "https://")):
            raise OptionError(f"--llm-url {self.options.url}: expected a URL such as http://localhost:8000")

    async def start(self) -> None:
        self._load_tokenizer()
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
        connector = aiohttp.TCPConnector(limit=self.in_flight, keepalive_timeout=60)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        self._base = self.options.url.rstrip("/").removesuffix("/v1") + "/v1"
        model = await self._first_answer()
        self._model, self._gateway = model["id"], model.get("accepts") == "safetensors"
        for name, ours in (("width", self.spec.width), ("queries", self.spec.queries)):
            if (served := model.get(name, ours)) != ours:
                raise EngineError(f"{self._base} takes embeddings of {name} {served}, and this encoder's have {ours}")
        # a gateway says how long captions may be, vLLM how long prompt and caption
        limit = model.get("max_tokens") or (model.get("max_model_len") or math.inf) - self.spec.queries
        if self.max_tokens > limit:
            raise EngineError(f"{self._base} writes up to {limit} tokens a caption: give --max-tokens {limit} or less")

    async def _first_answer(self) -> dict:
        """Return the server's model, as soon as it answers."""
        deadline = asyncio.get_running_loop().time() + self.patience
        while True:
            try:
                async with self._session.get(f"{self._base}/models") as answer:
                    if answer.status not in BUSY:
                        if answer.status != 200:
                            raise EngineError(f"{self._base}/models answers {answer.status}: is the key right ({KEY})?")
                        return (await answer.json())["data"][0]
                    problem = f"it answers {answer.status}"
            except (aiohttp.ClientError, OSError) as error:
                problem = one_line(error)
            except (ValueError, LookupError, TypeError) as error:
                raise EngineError(f"{self._base}/models is no list of models: {one_line(error)}") from error
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(
                    f"no language model at {self._base} after {self.patience:g} s: start one, or correct --llm-url "
                    f"({problem})"
                )
            await asyncio.sleep(0.5)

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        self.spec.check(embeds)
        request = self._request(embeds, sampling, every)
        async with self._answer(request, every) as events:
            try:
                async for event in events:
                    yield self._step(event)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, aiohttp.ClientError) as error:
                raise EngineError(f"the language model at {self._base} broke off: {one_line(error)}") from error

    def _request(self, embeds: Tensor, sampling: Sampling, every: bool) -> dict:
        """Return the arguments of the POST."""
        embeds = embeds.to(torch.bfloat16).contiguous()
        fields = {name: getattr(sampling, name) for name in PASSED_ON}
        if self._gateway:
            fields = {name: value for name, value in fields.items() if value != getattr(GREEDY, name)}
            fields |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "seed": sampling.seed}
            return {
                "url": f"{self._base}/generate",
                "data": save({"embeds": embeds}),
                "headers": {
                    "Content-Type": "application/octet-stream",
                    "X-VLV-Sampling": json.dumps(fields | {"stream": every}),
                },
            }
        stream = io.BytesIO()
        torch.save(embeds, stream)
        body = {
            "model": self._model,
            "prompt_embeds": base64.b64encode(stream.getvalue()).decode(),
            "stream": every,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": [] if sampling.ignore_eos else list(self.ends),
            "return_token_ids": True,
            **fields,
            **NO_PENALTIES,
        }
        return {
            "url": f"{self._base}/completions",
            "json": body | ({"seed": sampling.seed} if body["temperature"] else {}),
        }

    def _step(self, event: dict) -> list[int]:
        """Return the new tokens of an answer, or of one event of a stream."""
        if "error" in event:
            raise EngineError(f"the language model at {self._base} failed: {_message(event)}")
        (choice,) = event["choices"] or [{}]
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if ids is None and (choice.get("text") or reason == "length"):
            raise EngineError(
                f"{self._base} answers without token_ids: expected a vLLM that knows return_token_ids, or serve.gateway"
            )
        ids = list(ids or [])
        return ids + [self.ends[0]] if reason == "stop" and not any(i in self.ends for i in ids) else ids

    @asynccontextmanager
    async def _answer(self, request: dict, every: bool) -> AsyncIterator[AsyncIterator[dict]]:
        """Yield the events of a request, which is repeated while the server is busy or away.

        `every`: a stream of events; else one, whose content has been checked.
        """
        failed = 0
        while failed <= RETRIES:
            headers, limited = None, False
            try:
                answer = await self._session.post(**request)
            except (OSError, aiohttp.ClientError) as error:
                problem = one_line(error)
            else:
                try:
                    if answer.status == 200 and every:
                        yield _stream(answer)
                        return
                    text = await answer.text()
                    if answer.status == 200:
                        event = _parsed(text)
                        if "error" not in event:
                            yield _once(event)
                            return
                except (OSError, ValueError, aiohttp.ClientError) as error:  # broken off: asked again
                    text = one_line(error)
                finally:
                    # of an answer that is not read to its end the connection is closed: that cancels the request
                    answer.release() if answer.content.at_eof() else answer.close()
                text, headers = " ".join(text[:300].split()), answer.headers
                if answer.status != 200 and answer.status not in BUSY:
                    kind = EmbedsError if answer.status in (400, 413, 422) else EngineError
                    raise kind(f"{self._base} refuses the request ({answer.status}): {text}")
                problem = f"it answers {answer.status}: {text}"
                # the server works: the key's rate sets the pace
                limited = answer.status == 429 and retry_after(headers.get("Retry-After")) is not None
            delay = retry_delay(failed, headers)
            failed += not limited
            if failed <= RETRIES:
                await asyncio.sleep(delay)
        raise EngineError(f"the language model at {self._base} cannot be reached: {problem}")

    async def healthy(self) -> bool:
        """Return True if the server answers now; asks on a connection of its own, since all others may be in use."""
        try:
            url = self._base.removesuffix("/v1") + "/health"
            async with asyncio.timeout(5), aiohttp.request("GET", url) as answer:
                return answer.status == 200
        except (OSError, TimeoutError, aiohttp.ClientError):
            return False

    async def close(self) -> None:
        if session := getattr(self, "_session", None):
            await session.close()


def _parsed(text: str) -> dict:
    """Return the JSON object of an answer. Raises ValueError."""
    event = json.loads(text)
    if not isinstance(event, dict):
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    return event


async def _once(event: dict) -> AsyncIterator[dict]:
    yield event


async def _stream(answer: aiohttp.ClientResponse) -> AsyncIterator[dict]:
    async for line in answer.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield _parsed(line[6:].decode())


def _message(event: dict) -> str:
    error = event["error"]
    return str(error.get("message") if isinstance(error, dict) else error)
