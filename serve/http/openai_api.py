"""Read the requests and write the responses of OpenAI's API, as far as captions go; refuse the rest by name."""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from dataclasses import dataclass

from serve.engines.base import Completion, Sampling
from serve.http.errors import ApiError, invalid_request
from vlv.model.captioner import clean_caption

IGNORED = {"user", "metadata", "store", "messages", "model", "images", "stream", "stream_options"}
DEFAULTS = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "n": 1}


@dataclass(frozen=True)
class CaptionParams:
    """How a request's captions are written."""

    sampling: Sampling
    count: int = 1  # captions per image
    raw: bool = False  # as the model wrote them, without the clean-up
    as_json: bool = False  # the content is a JSON object {"caption": ...}


def caption_params(body: dict, max_tokens: int) -> CaptionParams:
    """Read a request's decoding fields; `max_tokens` is the engine's limit. Raises ApiError for unsupported fields."""
    body = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    limits = [body.pop(name) for name in ("max_completion_tokens", "max_tokens") if name in body]
    tokens = _integer(limits[0] if limits else min(300, max_tokens), "max_tokens", 1, max_tokens)
    temperature = body.pop("temperature", 0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise invalid_request(f"temperature must be a number from 0 to 2, not {_shown(temperature)}")
    stop = body.pop("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise invalid_request("stop must be a text or up to 4 texts, each of 1 to 100 characters")
    count = _integer(body.pop("n", 1), "n", 1, 16)
    if count > 1 and not temperature:
        raise invalid_request("n above 1 draws captions: give a temperature above 0, greedy ones are all the same")
    seed = _integer(body.pop("seed", 0), "seed", -(2**63), 2**63 - 1) % 2**32
    raw = body.pop("raw", False)
    if not isinstance(raw, bool):
        raise invalid_request("raw must be true or false")
    as_json = _is_json_object(body.pop("response_format", {"type": "text"}))
    for name, value in body.items():
        if name not in DEFAULTS or value != DEFAULTS[name]:
            raise invalid_request(f"{name} is not supported here: leave it out")
    return CaptionParams(Sampling(tokens, float(temperature), seed, tuple(stop)), count, raw, as_json)


def _is_json_object(response_format) -> bool:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in ("text", "json_object"):
        raise invalid_request("response_format must be of type text or json_object; this model follows no schema")
    return kind == "json_object"


def _integer(value, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid_request(f"{name} must be an integer from {low} to {high}, not {_shown(value)}")
    return value


def image_url(messages) -> str:
    """Return the one image URL of a chat's last user message. The model reads no text: the message's is ignored."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise invalid_request("messages must be a list of messages")
    users = [message for message in messages if message.get("role") == "user"]
    content = users[-1].get("content") if users else None
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    images = [part.get("image_url") for part in parts if part.get("type") == "image_url"]
    if len(images) != 1:
        raise invalid_request(
            f"the last user message must hold one image_url, not {len(images)}: each image has its own caption"
        )
    url = images[0].get("url") if isinstance(images[0], dict) else images[0]
    if not isinstance(url, str):
        raise invalid_request("image_url must hold a url")
    return url


def image_urls(body: dict, name: str, max_images: int) -> list[str]:
    """Return the URLs of a field that holds one image URL or a list of at most `max_images`."""
    urls = body.get(name)
    urls = [urls] if isinstance(urls, str) else urls
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise invalid_request(f"{name} must be one image URL (data: or http) or a list of them")
    if len(urls) > max_images:
        raise invalid_request(f"{len(urls)} images in one request; this server takes up to {max_images}")
    return urls


def unique_texts(completions: list[Completion], params: CaptionParams) -> list[tuple[str, Completion]]:
    """Return texts with their completions; of equal texts only the first."""
    texts: dict[str, Completion] = {}
    for completion in completions:
        texts.setdefault(completion.text if params.raw else clean_caption(completion.text), completion)
    return list(texts.items())


def usage(prompt: int, tokens: int) -> dict:
    """Return OpenAI's token counts; the prompt's are its embeddings."""
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def chat_completion(
    model: str, texts: list[tuple[str, Completion]], params: CaptionParams, prompt: int, tokens: int
) -> dict:
    """Return a chat.completion."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": json.dumps({"caption": text}) if params.as_json else text},
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        for index, (text, completion) in enumerate(texts)
    ]
    return {**_head("chat.completion", model), "choices": choices, "usage": usage(prompt, tokens)}


DONE = b"data: [DONE]\n\n"


def event(content: dict) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Chunks:
    """Write the chat.completion.chunk events of one streamed caption."""

    def __init__(self, model: str):
        self._head = _head("chat.completion.chunk", model)

    def event(self, delta: dict, finish_reason: str | None = None) -> bytes:
        """Return the event of a piece of text, or of the end."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self._head, "choices": [choice]})

    def usage(self, prompt: int, tokens: int) -> bytes:
        """Return the last event of a request with stream_options.include_usage."""
        return event({**self._head, "choices": [], "usage": usage(prompt, tokens)})


class Cleaner:
    """Clean a caption while it is written: a sentence is sent once it is certain to stay."""

    def __init__(self):
        self._text = ""
        self._sent = ""

    def push(self, piece: str) -> str:
        """Add a piece of the caption; return the text that has become certain."""
        self._text += piece
        text = self._text.strip()
        sentences = re.split(r"(?<=[.!?])\s+", text[: text.rfind(".") + 1])[:-1]  # the last may still grow
        return self._new(" ".join(dict.fromkeys(sentences)))

    def end(self) -> str:
        """Return the rest, after the last piece."""
        return self._new(clean_caption(self._text))

    def _new(self, text: str) -> str:
        new, self._sent = text[len(self._sent) :], text
        return new


def embeddings(model: str, rows: list, encoding: str, shape: tuple[int, int]) -> dict:
    """Return OpenAI's list of embeddings: a flat vector per image, and beside it its shape [queries, width]."""
    data = []
    for index, row in enumerate(rows):
        values = row.float().flatten().numpy()
        flat = base64.b64encode(values.astype("<f4").tobytes()).decode() if encoding == "base64" else values.tolist()
        data.append({"object": "embedding", "index": index, "embedding": flat, "shape": list(shape)})
    tokens = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "model": model, "data": data, "usage": tokens}


def error_body(error: ApiError) -> dict:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _head(kind: str, model: str) -> dict:
    name = "chatcmpl-" + uuid.uuid4().hex
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
