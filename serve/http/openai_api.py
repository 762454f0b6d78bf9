"""Read the requests and write the responses of OpenAI's API, as far as captions go; refuse the rest by name."""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from serve.engines.base import Completion, Sampling
from serve.http.errors import ApiError, invalid_request, invalid_value
from vlv.data.decoding.crop import CROPS
from vlv.model.clean_up import clean_caption

MAX_CHOICES = 16
MAX_LOGPROBS = 20  # alternatives per token, as OpenAI's
PENALTIES = "penalties count the tokens of the prompt, and an image's prompt has embeddings instead"
TOOLS = "this model calls no tools"

# fields of other parts of a request, and fields that do not change a caption
IGNORED = frozenset(
    "messages model images input stream stream_options encoding_format user metadata store service_tier "
    "parallel_tool_calls reasoning_effort verbosity safety_identifier prompt_cache_key prompt_cache_retention priority "
    "request_id add_generation_prompt spaces_between_special_tokens".split()
)
# fields that are accepted with these values only, which change nothing, and why not with others
NEUTRAL: dict[str, tuple[tuple, str]] = {
    "tools": (([],), TOOLS),
    "tool_choice": (("none", "auto"), TOOLS),
    "functions": (([],), TOOLS),
    "function_call": (("none", "auto"), TOOLS),
    "frequency_penalty": ((0,), PENALTIES),
    "presence_penalty": ((0,), PENALTIES),
    "repetition_penalty": ((1,), PENALTIES),
    "logit_bias": (({},), "it is not passed on to the language model"),
    "modalities": ((["text"],), "this model writes text"),
    "best_of": ((1,), "give n"),
    "use_beam_search": ((False,), "vLLM's beam search takes no embeddings"),
    "length_penalty": ((1,), "vLLM's beam search takes no embeddings"),
    "skip_special_tokens": ((True,), "captions have none"),
    "include_stop_str_in_output": ((False,), "a caption ends before its stop text"),
    "echo": ((False,), "the prompt is an image"),
}


@dataclass(frozen=True)
class CaptionParams:
    """How a request's captions are written."""

    sampling: Sampling
    count: int = 1  # captions per image
    raw: bool = False  # as the model wrote them, without the clean-up
    as_json: bool = False  # the content is a JSON object {"caption": ...}
    crop: str = "center"  # what the model sees: one of vlv.data.decoding.crop.CROPS
    clamped: int | None = None  # the limit, if the request asked for more tokens than that

    @property
    def samplings(self) -> list[Sampling]:
        """Return one sampling per caption, each with a seed of its own; greedy captions are all equal: one for all."""
        if not self.sampling.temperature:
            return [self.sampling]
        return [self.sampling.draw(number) for number in range(self.count)]


def caption_params(body: dict, max_tokens: int, has_logprobs: bool = False, crop: str = "center") -> CaptionParams:
    """Read a request's decoding fields; `max_tokens` and `has_logprobs` are the engine's, `crop` the server's default.

    Raises ApiError.
    """
    fields = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    requested = min(300, max_tokens)
    for name in ("max_tokens", "max_completion_tokens"):
        requested = _integer(fields.pop(name, requested), name, 1, 2**31)
    temperature = _number(fields, "temperature", 0, 0, 2)
    stop = fields.pop("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise invalid_value("stop", "stop must be a text or up to 4 texts, each of 1 to 100 characters")
    tokens = min(requested, max_tokens)
    sampling = Sampling(
        max_tokens=tokens,
        temperature=temperature,
        seed=_integer(fields.pop("seed", 0), "seed", -(2**63), 2**63 - 1) % 2**32,
        stop=tuple(stop),
        top_p=_number(fields, "top_p", 1, 1e-6, 1),
        top_k=max(0, _integer(fields.pop("top_k", 0), "top_k", -1, 2**31 - 1)),
        min_p=_number(fields, "min_p", 0, 0, 1),
        min_tokens=_integer(fields.pop("min_tokens", 0), "min_tokens", 0, tokens),
        ignore_eos=_boolean(fields, "ignore_eos"),
        logprobs=_logprobs(fields, has_logprobs),
    )
    count = _integer(fields.pop("n", 1), "n", 1, MAX_CHOICES)
    crop = crop_of(fields, crop)
    raw, as_json = _boolean(fields, "raw"), _is_json_object(fields.pop("response_format", {"type": "text"}))
    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    require_neutral(fields)
    return CaptionParams(sampling, count, raw, as_json, crop, max_tokens if requested > max_tokens else None)


def require_neutral(fields: dict) -> None:
    """Raise ApiError for a field that would change a caption in a way that is not offered."""
    for name, value in fields.items():
        if name not in NEUTRAL:
            raise invalid_request(f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        values, reason = NEUTRAL[name]
        if value not in values:
            raise invalid_request(
                f"{name} is not supported here ({reason}): leave it out", name, "unsupported_parameter"
            )


def crop_of(fields: dict, default: str, choices: tuple[str, ...] = CROPS) -> str:
    """Remove the field `crop` and return it, or the server's default where it is one of `choices`. Raises ApiError."""
    crop = fields.pop("crop", None)
    if crop is None:
        return default if default in choices else "center"
    if crop not in choices:
        raise invalid_value("crop", f"crop must be one of {', '.join(choices)}, not {_shown(crop)}")
    return crop


def _logprobs(fields: dict, has_logprobs: bool) -> int | None:
    """Return the alternatives per token whose log probabilities are asked for; None without logprobs."""
    logprobs = _boolean(fields, "logprobs")
    alternatives = _integer(fields.pop("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS)
    if alternatives and not logprobs:
        raise invalid_value("top_logprobs", "top_logprobs needs logprobs: true")
    if logprobs and not has_logprobs:
        raise invalid_request("logprobs need --engine vllm on this server", "logprobs", "unsupported_parameter")
    return alternatives if logprobs else None


def _is_json_object(response_format) -> bool:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in ("text", "json_object"):
        raise invalid_value(
            "response_format", "response_format must be of type text or json_object; this model follows no schema"
        )
    return kind == "json_object"


def _integer(value, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid_value(name, f"{name} must be an integer from {low} to {high}, not {_shown(value)}")
    return value


def _number(fields: dict, name: str, default: float, low: float, high: float) -> float:
    value = fields.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise invalid_value(name, f"{name} must be a number from {low:g} to {high:g}, not {_shown(value)}")
    return float(value)


def _boolean(fields: dict, name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise invalid_value(name, f"{name} must be true or false")
    return value


def stream_options(body: dict) -> tuple[bool, bool, bool]:
    """Return whether to stream, to end with the usage, and to send the usage with every chunk (as vLLM can)."""
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool):
        raise invalid_value("stream", "stream must be true or false")
    if not isinstance(options, dict):
        raise invalid_value("stream_options", "stream_options must be an object")
    every = bool(options.get("continuous_usage_stats"))
    return stream, every or bool(options.get("include_usage")), every


def image_url(messages) -> str:
    """Return the one image URL of a chat's last user message. The model reads no text: the message's is ignored."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise invalid_value("messages", "messages must be a list of messages")
    users = [message for message in messages if message.get("role") == "user"]
    content = users[-1].get("content") if users else None
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    images = [part.get("image_url") for part in parts if part.get("type") == "image_url"]
    if len(images) != 1:
        raise invalid_value(
            "messages",
            f"the last user message must hold one image_url, not {len(images)}: each image has its own caption",
        )
    url = images[0].get("url") if isinstance(images[0], dict) else images[0]
    if not isinstance(url, str):
        raise invalid_value("messages", "image_url must hold a url")
    return url


def image_urls(body: dict, name: str, max_images: int) -> list[str]:
    """Return the URLs of a field that holds one image URL or a list of at most `max_images`."""
    urls = body.get(name)
    urls = [urls] if isinstance(urls, str) else urls
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise invalid_value(name, f"{name} must be one image URL (data: or http) or a list of them")
    if len(urls) > max_images:
        raise invalid_value(name, f"{len(urls)} images in one request; this server takes up to {max_images}")
    return urls


def caption_text(completion: Completion, params: CaptionParams) -> str:
    """Return the caption as the request wants it."""
    return completion.text if params.raw else clean_caption(completion.text)


def usage(prompt: int, tokens: int) -> dict:
    """Return OpenAI's token counts; the prompt's are its embeddings."""
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def chat_completion(
    model: str, completions: list[Completion], params: CaptionParams, prompt: int, token_text: Callable[[int], str]
) -> dict:
    """Return a chat.completion with `params.count` choices; one greedy completion stands for all of them."""
    choices = []
    for index in range(params.count):
        completion = completions[index % len(completions)]
        text = caption_text(completion, params)
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": json.dumps({"caption": text}) if params.as_json else text},
                "finish_reason": completion.finish_reason,
                "logprobs": logprobs(completion, params.sampling.logprobs, token_text),
            }
        )
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {**_head("chat.completion", model), "choices": choices, "usage": usage(prompt, tokens)}


def logprobs(completion: Completion, alternatives: int | None, token_text: Callable[[int], str]) -> dict | None:
    """Return OpenAI's logprobs of a completion, whose tokens are those before the clean-up."""
    if alternatives is None or completion.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict:
        text = token_text(token)
        whole = "\ufffd" not in text  # a token may end inside a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    content = []
    for token, values in zip(completion.token_ids, completion.logprobs, strict=True):
        top = sorted(values.items(), key=lambda item: -item[1])[:alternatives]
        content.append({**entry(token, values[token]), "top_logprobs": [entry(*item) for item in top]})
    return {"content": content, "refusal": None}


DONE = b"data: [DONE]\n\n"


def event(content: dict) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Chunks:
    """Write the chat.completion.chunk events of a request's streamed captions."""

    def __init__(self, model: str, prompt: int, with_usage: bool, usage_in_every: bool):
        self._head = _head("chat.completion.chunk", model)
        self._prompt = prompt
        self._with_usage = with_usage
        self._usage_in_every = usage_in_every
        self.tokens = 0  # so far, of all choices

    def event(self, index: int, delta: dict, finish_reason: str | None = None, logprobs: dict | None = None) -> bytes:
        """Return the event of a piece of text of choice `index`, or of its end."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        counts = {"usage": self._usage() if self._usage_in_every else None} if self._with_usage else {}
        return event({**self._head, "choices": [choice], **counts})

    def end(self) -> bytes:
        """Return the last events: the usage, if the request asked for it, and [DONE]."""
        counts = event({**self._head, "choices": [], "usage": self._usage()}) if self._with_usage else b""
        return counts + DONE

    def _usage(self) -> dict:
        return usage(self._prompt, self.tokens)


class StreamedText:
    """Turn the pieces of one caption into the text to send: cleaned unless raw, inside a JSON object if asked for."""

    def __init__(self, params: CaptionParams):
        self._cleaner = None if params.raw else Cleaner()
        self._as_json = params.as_json
        self._begun = False

    def push(self, piece: str) -> str:
        """Add a piece of the caption; return the text that has become certain."""
        return self._framed(self._cleaner.push(piece) if self._cleaner else piece)

    def end(self) -> str:
        """Return the rest, after the last piece."""
        rest = self._framed(self._cleaner.end() if self._cleaner else "", last=True)
        return rest + '"}' if self._as_json else rest

    def _framed(self, text: str, last: bool = False) -> str:
        if not self._as_json or not (text or last):
            return text
        head, self._begun = "" if self._begun else '{"caption": "', True
        return head + json.dumps(text)[1:-1]


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
    """Return an error in OpenAI's format; half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes "?"."""
    kind = {429: "rate_limit_error"}.get(error.status)
    kind = kind or ("invalid_request_error" if error.status < 500 else "server_error")
    message, param = (text and text.encode(errors="replace").decode() for text in (str(error), error.param))
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def _head(kind: str, model: str) -> dict:
    name = "chatcmpl-" + uuid.uuid4().hex
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
