"""Ask any OpenAI-compatible chat server: one client for judges, text-only VQA, layout captions and distillation.

`ChatClient` sends one question and waits and asks again where the server is busy; `JournaledClient` asks many, says
what they cost first, and keeps every answer in a file as soon as it arrives, so that none is paid for twice. The key
comes from an environment variable, never from the command line.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import openai

from vlv.common.command import Misuse, UserError, say
from vlv.common.jsonl import cut_torn_line, read_records
from vlv.common.openai_config import ClientConfig
from vlv.common.retry import retry_delay
from vlv.data.image import ImageError, web_image

T = TypeVar("T")
CHARACTERS_PER_TOKEN = 4  # of English text, about: for the estimate only
THOUGHTS = 2000  # tokens that a reasoning model may think
PATIENCE = 20  # questions in a row without an answer that end a run
JOURNAL_HEAD = b'{"digest": "'  # the beginning of every line of a journal
REPEATED = (408, 409, 425, 429)  # besides 5xx: status codes after which the same request may succeed
REFUSED = (400, 413, 415, 422)  # status codes that refuse one question, not the client


class ServerError(UserError, RuntimeError):
    """Raised where the server gives no answers; `fatal` where another question would meet the same."""

    def __init__(self, message: str, fatal: bool = False):
        super().__init__(message)
        self.fatal = fatal


class NoAnswer(UserError, RuntimeError):
    """Raised where one question has no usable answer."""


class TokenLimitError(NoAnswer):
    """Raised where the server refuses the number of tokens that an answer may have."""


class _BadReply(Exception):
    """A reply with status 200 that holds no answer; `repeat`: the server says that it is a passing error."""

    def __init__(self, message: str, repeat: bool):
        super().__init__(message)
        self.repeat = repeat


@dataclass(frozen=True)
class Answer:
    """What the model wrote; `text` is empty where it wrote nothing after its thoughts."""

    text: str
    finish_reason: str | None
    model: str | None
    tokens_in: int
    tokens_out: int


def final_text(text: str) -> str:
    """Return what follows a model's thoughts: the text after the last </think>; "" where they do not end."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    return "" if re.match(r"\s*<think>", text) else text.strip()


def image_url(content: bytes) -> str:
    """Return an image file's content as a data: URL; see `web_image`. Raises ImageError."""
    kind, content = web_image(content)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class ChatClient:
    """Asks one question at a time; use it as an async context manager."""

    def __init__(self, config: ClientConfig):
        self.config = config
        self._failed = 0  # questions in a row
        self._client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=os.environ.get(config.key_env) or "none",
            max_retries=0,  # see `ask`
            timeout=config.timeout,
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.close()

    async def ask(self, messages: list[dict], max_tokens: int, **options: object) -> Answer:
        """Return the answer to the messages; a busy or failing server is asked again after a pause.

        Raises NoAnswer where this question has no usable answer, ServerError where the server cannot be used, or
        PATIENCE questions in a row had no answer.
        """
        try:
            answer = await self._ask(messages, self._limit(max_tokens) | options)
        except NoAnswer as error:
            self._failed += 1
            if self._failed >= PATIENCE:
                raise ServerError(f"{self.config.url} gives no answers ({error})", fatal=True) from error
            raise
        except ServerError as error:
            self._failed += 1
            error.fatal = error.fatal or self._failed >= PATIENCE
            raise
        self._failed = 0
        return answer

    def _limit(self, max_tokens: int) -> dict:
        if self.config.reasoning:  # thoughts count as tokens too
            return {"max_completion_tokens": max_tokens + THOUGHTS}
        return {"max_tokens": max_tokens}

    async def _ask(self, messages: list[dict], options: dict) -> Answer:
        create = self._client.chat.completions.with_raw_response.create
        attempt = 0
        while True:
            try:
                reply = await create(model=self.config.model, messages=messages, **options)
                return _answer(reply.content)
            except openai.APIStatusError as error:
                status, headers = error.status_code, error.response.headers
                if error.code == "unsupported_parameter" and not self.config.reasoning:
                    raise ServerError(f"{self.config.url} needs --reasoning: {error}", fatal=True) from error
                if status in REFUSED:
                    kind = TokenLimitError if re.search(r"max_(completion_)?tokens", str(error)) else NoAnswer
                    raise kind(f"the server refuses the question: {error}") from error
                problem = f"{self.config.url} answers {status}: {error}"
                hopeless = not (status in REPEATED or status >= 500) or error.code == "insufficient_quota"
                if hopeless or attempt >= self.config.retries:
                    raise ServerError(problem, fatal=hopeless) from error
            except openai.APIConnectionError as error:  # timeouts included
                headers = {}
                if attempt >= self.config.retries:
                    raise ServerError(f"{self.config.url} cannot be used: {error}") from error
            except openai.OpenAIError as error:
                raise ServerError(f"{self.config.url} cannot be used: {error}", fatal=True) from error
            except _BadReply as error:
                headers = reply.headers
                if attempt >= (self.config.retries if error.repeat else min(1, self.config.retries)):
                    raise NoAnswer(f"{self.config.url} {error}") from error
            await asyncio.sleep(retry_delay(attempt, headers))
            attempt += 1


def _answer(content: bytes) -> Answer:
    """Read the body of a reply with status 200. Raises _BadReply, or NoAnswer where the model refuses."""
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _BadReply(f"answers no JSON object but {content[:60]!r}", repeat=True)
    if body.get("error"):
        error = body["error"]
        text = error.get("message", error) if isinstance(error, dict) else error
        raise _BadReply(f"answers 200 with an error: {text}", repeat=True)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _BadReply(f"answers no message: is it a chat server? {content[:60]!r}", repeat=False)
    text = message.get("content")
    if isinstance(text, list):  # parts, as some servers write them
        parts = [part for part in text if isinstance(part, dict) and part.get("type", "text") == "text"]
        text = "".join(str(part.get("text") or "") for part in parts)
    if not text and message.get("refusal"):
        raise NoAnswer(f"the model refuses: {message['refusal']}")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    if not text and thoughts and choice.get("finish_reason") != "length":
        raise NoAnswer("the server gave the model's thoughts (reasoning_content) and no content")
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (count if isinstance(count, int) else 0 for count in counts)
    return Answer(str(text or ""), choice.get("finish_reason"), body.get("model"), tokens_in, tokens_out)


@dataclass(frozen=True)
class Question:
    """A question with its own name; `image` (a file) goes before the text."""

    name: str
    text: str
    system: str
    max_tokens: int
    image: Path | None = None

    def messages(self, reminder: str = "") -> list[dict]:
        """Return the messages to send; a reminder is added to the text. Raises OSError, ImageError."""
        text = f"{self.text}\n\n{reminder}" if reminder else self.text
        content: list[dict] | str = text
        if self.image:
            url = {"url": image_url(self.image.read_bytes())}
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]

    def digest(self, model: str) -> str:
        """Return the journal's key of the question: a hash of model, texts, and the image's content."""
        digest = hashlib.sha256(json.dumps([model, self.system, self.text, self.max_tokens]).encode())
        digest.update(_image_hash(self.image) if self.image else b"")
        return digest.hexdigest()[:24]


class JournaledClient:
    """Asks many questions at once, and keeps the answers in a journal."""

    def __init__(self, config: ClientConfig, journal: Path):
        """Read the journal. Raises Misuse where the file is something else."""
        self.config = config
        self.journal = journal
        self.answers: dict[str, dict] = {}
        if journal.exists():
            with journal.open("rb") as file:
                if not JOURNAL_HEAD.startswith(file.read(len(JOURNAL_HEAD))):
                    raise Misuse(f"{journal} exists and is no journal of answers: choose another --journal")
            self.answers = {record["digest"]: record for record in read_records(journal)}

    def digest(self, question: Question) -> str:
        """Return the journal's key of the question."""
        return question.digest(self.config.model)

    def estimate(self, questions: list[Question]) -> dict:
        """Return and print the cost of the questions without an answer. Raises Misuse above max_cost."""
        config = self.config
        new = [q for q in questions if self.digest(q) not in self.answers]
        tokens_in = sum((len(q.system) + len(q.text)) // CHARACTERS_PER_TOKEN for q in new)
        tokens_in += config.image_tokens * sum(q.image is not None for q in new)
        tokens_out = sum(q.max_tokens + THOUGHTS * config.reasoning for q in new)
        found = {"questions": len(new), "in_journal": len(questions) - len(new)}
        found |= {"tokens_in": tokens_in, "tokens_out_at_most": tokens_out}
        text = f"{len(new):,} questions ({found['in_journal']:,} are answered already), about {tokens_in:,} tokens in"
        text += f" and at most {tokens_out:,} out"
        if config.price:
            found["usd_at_most"] = round(config.dollars(tokens_in, tokens_out), 4)
            text += f": at most about ${found['usd_at_most']:,.2f}"
        else:
            text += " (--price IN OUT gives the cost in dollars)"
        say(text)
        if config.max_cost is not None and found["usd_at_most"] > config.max_cost:
            raise Misuse(f"that is above --max-cost {config.max_cost:g}: take fewer images, or raise it")
        return found

    def ask(self, questions: list[Question], parse: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
        """Return the parsed answers by the questions' names, and the reasons of those that failed.

        `parse` gets the text after a model's thoughts and raises ValueError for one that it cannot use; such a
        question is asked once more, with the reason. Raises ServerError where the server cannot be used.
        """
        new = [q for q in questions if self.digest(q) not in self.answers]
        failures = asyncio.run(self._ask_all(new, parse)) if new else {}
        answers = {}
        for question in questions:
            record = self.answers.get(self.digest(question))
            if record is None:
                continue
            try:
                answers[question.name] = parse(final_text(record["answer"]))
            except ValueError as error:
                cut_off = record.get("finish_reason") == "length" and not final_text(record["answer"])
                failures[question.name] = (
                    "no answer within the limit of tokens: a model that thinks first needs --reasoning"
                    if cut_off
                    else str(error)
                )
        return answers, failures

    async def _ask_all(self, questions: list[Question], parse: Callable) -> dict[str, str]:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.journal)
        waiting, done, failures = iter(questions), 0, {}

        async def work(client: ChatClient, file) -> None:
            nonlocal done
            for question in waiting:
                try:
                    record = await self._ask(client, question, parse)
                except NoAnswer as error:  # not in the journal: another run asks again
                    failures[question.name] = str(error)
                else:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    self.answers[record["digest"]] = record
                done += 1
                if done % 50 == 0 or done == len(questions):
                    say(f"{done:,} of {len(questions):,} answered")

        async with ChatClient(self.config) as client:
            with self.journal.open("a", encoding="utf-8") as file:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.config.concurrency, len(questions))):
                            group.create_task(work(client, file))
                except ExceptionGroup as several:
                    error = several.exceptions[0]
                    if isinstance(error, ServerError):
                        raise ServerError(f"{error} (the answers so far are kept in {self.journal})") from error
                    raise error from None  # a full disk, an image that was deleted
        return failures

    async def _ask(self, client: ChatClient, question: Question, parse: Callable) -> dict:
        record = {"digest": self.digest(question), "name": question.name, "usage": [0, 0]}
        options, reminder = {} if self.config.reasoning else {"temperature": 0}, ""
        for _ in range(2):
            try:
                messages = question.messages(reminder)
            except ImageError as error:
                raise NoAnswer(f"{question.image}: {error}") from error
            answer = await client.ask(messages, question.max_tokens, **options)
            record["usage"][0] += answer.tokens_in
            record["usage"][1] += answer.tokens_out
            record |= {"answer": answer.text, "finish_reason": answer.finish_reason}
            try:
                parse(final_text(answer.text))
                break
            except ValueError as error:
                reminder = f"{error}."
        return record

    def usage(self, questions: list[Question]) -> dict:
        """Return the tokens that the answers took, in this run or before, and dollars where there is a price."""
        records = [self.answers.get(self.digest(q), {"usage": [0, 0]}) for q in questions]
        tokens_in, tokens_out = (sum(r["usage"][i] for r in records) for i in (0, 1))
        found = {"model": self.config.model, "tokens_in": tokens_in, "tokens_out": tokens_out}
        return found | ({"usd": round(self.config.dollars(tokens_in, tokens_out), 4)} if self.config.price else {})


@functools.cache
def _image_hash(image: Path) -> bytes:
    return hashlib.sha256(image.read_bytes()).digest()
