"""The OpenAI-compatible client against a server that answers as real ones do: busy, partial, odd, with thoughts."""

import asyncio
import base64
import io
import json
import time
from email.utils import formatdate

import pytest
from PIL import Image

from vlv.common.openai_client import ChatClient, JournaledClient, NoAnswer, Question, ServerError, final_text, image_url
from vlv.common.openai_config import ClientConfig
from vlv.common.retry import MAX_DELAY, retry_after, retry_delay

QUESTIONS = [Question("one", "How many?", "Count.", 20)]


def reply(message, finish_reason="stop", usage="default", **more):
    """The body of a reply with this message."""
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110} if usage == "default" else usage
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    } | more


def ask(server, tmp_path, **options):
    """Ask one question; return answers, failures and usage."""
    client = JournaledClient(ClientConfig(server.url, "m", **options), tmp_path / "journal.jsonl")
    answers, failures = client.ask(QUESTIONS, number)
    return answers, failures, client.usage(QUESTIONS)


def number(text):
    return int(text)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("7.5", 7.5),
        ("0", 0),
        (formatdate(1_000_012, usegmt=True), 12),
        (formatdate(1_000_012, localtime=True), 12),
        (formatdate(999_000, usegmt=True), None),  # past: no time that can be waited for
        ("soon", None),
        ("-1", None),
        ("inf", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(value, seconds):
    """RFC 9110, section 10.2.3, and decimals, which servers send too."""
    assert retry_after(value, now=1_000_000) == seconds


def test_delays():
    assert 3 <= retry_delay(0, {"Retry-After": "3"}) <= 3.3
    assert 0.25 <= retry_delay(9, {"retry-after-ms": "250", "retry-after": "60"}) <= 0.275
    assert MAX_DELAY <= retry_delay(0, {"Retry-After": "86400"}) <= 1.1 * MAX_DELAY
    backoff = [retry_delay(attempt) for attempt in range(12)]
    assert all(low <= value <= 1.1 * low for value, low in zip(backoff, [0.5, 1, 2, 4] + [8] * 8, strict=True))


@pytest.mark.parametrize("form", ["date", "decimal"])
def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path, form):
    start = time.time()
    ready = start + 2

    def answer(body):
        if time.time() >= ready:
            return "3"
        # dates have whole seconds: the next one is not too early
        value = formatdate(int(ready) + 1, usegmt=True) if form == "date" else f"{ready - time.time():.2f}"
        return 429, "slow down", {"Retry-After": value}

    server.answer = answer
    assert ask(server, tmp_path)[0] == {"one": 3}
    assert len(server.asked) <= 3 and time.time() - start >= 1.9


@pytest.mark.parametrize(
    ("message", "usage"),
    [
        ({"role": "assistant", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}, "default"),
        ({"role": "assistant", "content": [{"text": "12"}, {"type": "audio", "audio": {}}]}, "default"),
        ({"role": "assistant", "content": "12"}, None),
        ({"role": "assistant", "content": "12"}, {"prompt_tokens": 100, "completion_tokens": None}),
        ({"role": "assistant", "content": "12"}, {"total_tokens": 5}),
        ({"role": "assistant", "content": "<think>\n3 or 4\n</think>\n\n12"}, "default"),
        ({"role": "assistant", "content": "3 or 4\n</think>\n\n12"}, "default"),  # the template wrote <think>
        ({"role": "assistant", "content": "12", "reasoning_content": "3 or 4"}, "default"),
    ],
)
def test_answers_of_many_forms(server, tmp_path, message, usage):
    server.answer = lambda body: reply(message, usage=usage)
    answers, failures, used = ask(server, tmp_path)
    assert answers == {"one": 12} and not failures and len(server.asked) == 1
    expected = {"default": (100, 10)}.get(usage if isinstance(usage, str) else None)
    partial = 0 if usage is None else (usage.get("prompt_tokens") or 0) if isinstance(usage, dict) else 0
    assert (used["tokens_in"], used["tokens_out"]) == (expected or (partial, 0))


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "upstream overloaded", "code": 502}},
        {"error": "overloaded"},
        b"<html>gateway</html>",
        b"",
        b"[]",
        reply(None),
        reply(None, choices=[]),
        reply(None, choices=None),
        {"id": "1", "object": "chat.completion"},
    ],
)
def test_a_reply_without_an_answer_is_asked_again_and_not_kept(server, tmp_path, body):
    """Status 200 or not: the first reply holds no answer, the second does."""
    server.answer = lambda _: body if len(server.asked) == 1 else "5"
    assert ask(server, tmp_path)[:2] == ({"one": 5}, {})
    (tmp_path / "journal.jsonl").unlink()
    server.asked.clear()
    server.answer = lambda _: body
    answers, failures, used = ask(server, tmp_path, retries=1)
    assert not answers and list(failures) == ["one"] and server.url in failures["one"] and used["tokens_in"] == 0
    assert len(server.asked) == 2 and not (tmp_path / "journal.jsonl").read_text()
    server.answer = lambda _: "6"  # another run asks again
    assert ask(server, tmp_path)[:2] == ({"one": 6}, {})


def test_refusals_and_thoughts_without_an_answer(server, tmp_path):
    server.answer = lambda _: reply({"role": "assistant", "content": None, "refusal": "I can't help."})
    assert ask(server, tmp_path)[1] == {"one": "the model refuses: I can't help."}
    server.answer = lambda _: reply({"role": "assistant", "content": None, "reasoning_content": "12"})
    assert "reasoning_content" in ask(server, tmp_path)[1]["one"]
    server.answer = lambda _: reply({"role": "assistant", "content": "<think>\n1 or 12"}, "length")
    assert "--reasoning" in ask(server, tmp_path)[1]["one"]


def test_what_follows_the_thoughts():
    assert final_text("<think>a</think>b") == final_text("a</think>\n\nb") == final_text(" b ") == "b"
    assert final_text("<think>a</think> <think>c</think>b") == "b"
    assert final_text("<think> no end") == final_text("\n<think>") == final_text("<think>a</think>") == ""
    assert final_text("a <think> in the middle") == "a <think> in the middle"


def test_a_quota_that_is_used_up_is_not_asked_again(server, tmp_path):
    error = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
    server.answer = lambda _: (429, error)
    with pytest.raises(ServerError, match="exceeded your current quota"):
        ask(server, tmp_path)
    assert len(server.asked) == 1


def test_a_model_that_takes_no_max_tokens_needs_a_flag(server, tmp_path):
    """OpenAI's reasoning models, in their words."""
    text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    error = {"message": text, "type": "invalid_request_error", "param": "max_tokens", "code": "unsupported_parameter"}
    server.answer = lambda body: (400, error) if "max_tokens" in body else "1"
    with pytest.raises(ServerError, match="needs --reasoning"):
        ask(server, tmp_path)
    assert len(server.asked) == 1 and ask(server, tmp_path, reasoning=True)[0] == {"one": 1}


def test_twenty_questions_without_an_answer_end_the_run(server, tmp_path):
    server.answer = lambda _: (400, "not this one")
    questions = [Question(str(i), f"Number {i}?", "Count.", 20) for i in range(50)]
    client = JournaledClient(ClientConfig(server.url, "m", concurrency=1), tmp_path / "journal.jsonl")
    with pytest.raises(ServerError, match=r"gives no answers .*not this one"):
        client.ask(questions, number)
    assert len(server.asked) == 20


def test_one_question(server):
    async def both():
        async with ChatClient(ClientConfig(server.url, "m")) as client:
            with pytest.raises(NoAnswer, match="refuses the question"):
                await client.ask([{"role": "user", "content": "?"}], 5)
            server.answer = lambda _: "7"
            return await client.ask([{"role": "user", "content": "?"}], 5)

    server.answer = lambda _: (422, "no")
    answer = asyncio.run(both())
    assert (answer.text, answer.finish_reason, answer.model) == ("7", "stop", "m")
    assert (answer.tokens_in, answer.tokens_out) == (100, 10)


SENT_AS = {
    "PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif", "BMP": "png", "TIFF": "png", "AVIF": "png",
    "JPEG2000": "png", "PPM": "png",
}  # fmt: skip


@pytest.mark.parametrize("kind", SENT_AS)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a"])
def test_images_are_sent_by_content(server, tmp_path, kind, name):
    """The name says nothing; what servers do not take is converted."""
    file = tmp_path / name
    Image.new("RGB", (8, 6), (250, 20, 30)).save(file, kind)
    client = JournaledClient(ClientConfig(server.url, "m"), tmp_path / "journal.jsonl")
    server.answer = lambda _: "1"
    assert client.ask([Question("q", "?", "s", 5, file)], number)[0] == {"q": 1}
    url = server.asked[0][2]["messages"][1]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert (head, sent.format) == (f"data:image/{SENT_AS[kind]}", SENT_AS[kind].upper()) and sent.size == (8, 6)
        assert max(abs(a - b) for a, b in zip(sent.convert("RGB").getpixel((4, 3)), (250, 20, 30), strict=True)) < 12
    if SENT_AS[kind] == kind.lower():
        assert base64.b64decode(data) == file.read_bytes()


def test_an_image_that_cannot_be_sent_is_one_failure(server, tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    server.answer = lambda _: "1"
    client = JournaledClient(ClientConfig(server.url, "m"), tmp_path / "journal.jsonl")
    answers, failures = client.ask([Question("q", "?", "s", 5, tmp_path / "a.png"), *QUESTIONS], number)
    assert answers == {"one": 1} and "a.png: not recognised as an image" in failures["q"]
    with pytest.raises(ValueError, match="not recognised"):
        image_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")


def test_an_old_journal_is_read_by_the_new_rules(server, tmp_path):
    """Raw answers are kept: thoughts are taken off when they are read."""
    digest = QUESTIONS[0].digest("m")
    record = {"digest": digest, "name": "one", "usage": [1, 2], "answer": "<think>3</think>4"}
    (tmp_path / "journal.jsonl").write_text(json.dumps(record) + "\n")
    assert ask(server, tmp_path)[0] == {"one": 4} and not server.asked
