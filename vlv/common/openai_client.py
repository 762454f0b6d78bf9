"""Questions to any OpenAI-compatible server: what they cost is said first, and no answer is paid for twice.

Every answer is appended to a journal as one line as soon as it is there; the same questions to the same model are
then read from it. The key comes from an environment variable, never from the command line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vlv.common import command
from vlv.evaluate import cli

T = TypeVar("T")
CHARACTERS = 4  # of English text in a token, about: for the estimate only
RETRIES = 5  # of a question that a busy server turns away
THOUGHTS = 2000  # tokens that a reasoning model may think
HEAD = b'{"digest": "'  # of every line of a journal


class ChatError(RuntimeError):
    """The server cannot be used; the message says what it answered."""


@dataclass(frozen=True)
class Question:
    """`name` is for people; `image` (a file) goes before the text."""

    name: str
    text: str
    system: str
    max_tokens: int
    image: Path | None = None

    def messages(self, reminder: str = "") -> list[dict]:
        text = f"{self.text}\n\n{reminder}" if reminder else self.text
        content: list[dict] | str = text
        if self.image:
            kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}
            data = base64.b64encode(self.image.read_bytes()).decode()
            url = f"data:image/{kind.get(self.image.suffix.lower(), 'png')};base64,{data}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]

    def digest(self, model: str) -> str:
        """What the journal knows the question by: model, texts, and the image's content."""
        digest = hashlib.sha256(json.dumps([model, self.system, self.text, self.max_tokens]).encode())
        digest.update(_content(self.image) if self.image else b"")
        return digest.hexdigest()[:24]


def add_flags(p: argparse.ArgumentParser) -> None:
    """--url, --model and what belongs to them."""
    p.add_argument("--url", metavar="URL", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    p.add_argument("--model", metavar="NAME", help="the model's name there")
    p.add_argument("--key-env", default="OPENAI_API_KEY", metavar="VAR", help="environment variable with the API key")
    p.add_argument("--journal", type=Path, metavar="JSONL", help="where answers are kept (default: beside -o)")
    p.add_argument("--concurrency", type=command.positive, default=8, help="questions at a time (8)")
    p.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens, for the cost")
    p.add_argument(
        "--image-tokens", type=command.positive, default=800, help="tokens an image counts, for the cost (800)"
    )
    p.add_argument("--max-cost", type=float, metavar="USD", help="stop before it where the estimate is above this")
    p.add_argument(
        "--reasoning", action="store_true", help="a model that thinks first: max_completion_tokens, no temperature"
    )
    p.add_argument("--estimate", action="store_true", help="say what it would cost, and stop")


def check(args: argparse.Namespace) -> None:
    """Raise Misuse where the flags do not make a server."""
    if not args.model or not (args.url or args.estimate):
        raise cli.Misuse("--url and --model are needed: the server that answers, and its model's name")
    if not (args.journal or args.out or args.estimate):
        raise cli.Misuse("-o or --journal is needed: answers are kept, so that none is paid for twice")
    if args.max_cost is not None and not args.price:
        raise cli.Misuse("--max-cost needs --price IN OUT, in dollars a million tokens")


class Chat:
    """A model behind a URL, and the journal of its answers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.journal: Path = args.journal or (args.out or Path("estimate")).with_suffix(".journal.jsonl")
        self.answers: dict[str, dict] = {}
        if self.journal.exists():
            content = self.journal.read_bytes()
            if not HEAD.startswith(content[: len(HEAD)]):
                raise cli.Misuse(
                    f"{self.journal} is there already, and no journal of answers: choose another --journal"
                )
            for line in content.splitlines(keepends=True):
                if line.endswith(b"\n"):  # a kill may leave half a line at the end; it is asked again
                    record = json.loads(line)
                    self.answers[record["digest"]] = record

    def estimate(self, questions: list[Question]) -> dict:
        """What the questions that are not answered yet will take, said on stderr. Raises Misuse above --max-cost."""
        new = [q for q in questions if q.digest(self.args.model) not in self.answers]
        tokens_in = sum((len(q.system) + len(q.text)) // CHARACTERS for q in new)
        tokens_in += self.args.image_tokens * sum(q.image is not None for q in new)
        tokens_out = sum(q.max_tokens + THOUGHTS * self.args.reasoning for q in new)
        found = {"questions": len(new), "in_journal": len(questions) - len(new)}
        found |= {"tokens_in": tokens_in, "tokens_out_at_most": tokens_out}
        text = f"{len(new):,} questions ({found['in_journal']:,} are answered already), about {tokens_in:,} tokens in"
        text += f" and at most {tokens_out:,} out"
        if self.args.price:
            found["usd_at_most"] = round(self._dollars(tokens_in, tokens_out), 4)
            text += f": at most about ${found['usd_at_most']:,.2f}"
        else:
            text += " (--price IN OUT says it in dollars)"
        cli.say(text)
        if self.args.max_cost is not None and found["usd_at_most"] > self.args.max_cost:
            raise cli.Misuse(f"that is above --max-cost {self.args.max_cost:g}: take fewer images, or raise it")
        return found

    def _dollars(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.args.price[0] + tokens_out * self.args.price[1]) / 1e6

    def ask(self, questions: list[Question], parse: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
        """What `parse` makes of every answer, by name, and the failures with their reasons.

        `parse` raises ValueError for an answer that it cannot use; such a question is asked once more, with the
        reason. Raises ChatError where the server cannot be reached or refuses the key or the model.
        """
        new = [q for q in questions if q.digest(self.args.model) not in self.answers]
        if new:
            asyncio.run(self._ask_all(new, parse))
        good, bad = {}, {}
        for question in questions:
            record = self.answers[question.digest(self.args.model)]
            try:
                if "refused" in record:
                    raise ValueError(record["refused"])
                good[question.name] = parse(record["answer"])
            except ValueError as error:
                bad[question.name] = str(error)
        return good, bad

    async def _ask_all(self, questions: list[Question], parse: Callable) -> None:
        import openai

        self.journal.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.journal)
        waiting, done = iter(questions), 0
        client = openai.AsyncOpenAI(
            base_url=self.args.url,
            api_key=os.environ.get(self.args.key_env) or "none",
            max_retries=RETRIES,
            timeout=300,
        )

        async def work(file) -> None:
            nonlocal done
            for question in waiting:
                record = await self._ask(client, question, parse)
                if "refused" not in record:  # what was refused cost nothing: another run may ask again
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                self.answers[record["digest"]] = record
                done += 1
                if done % 50 == 0 or done == len(questions):
                    cli.say(f"{done:,} of {len(questions):,} answered")

        async with client:
            with self.journal.open("a", encoding="utf-8") as file:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.args.concurrency, len(questions))):
                            group.create_task(work(file))
                except ExceptionGroup as several:
                    error = several.exceptions[0]
                    if not isinstance(error, openai.OpenAIError):  # a full disk, a picture that is gone
                        raise error from None
                    answered = getattr(error, "status_code", None)
                    what = f"answers {answered}: {error}" if answered else f"cannot be used: {error}"
                    raise ChatError(f"{self.args.url} {what} (answers so far are kept in {self.journal})") from error

    async def _ask(self, client, question: Question, parse: Callable) -> dict:
        import openai

        record, reminder = {"digest": question.digest(self.args.model), "name": question.name, "usage": [0, 0]}, ""
        for _ in range(2):
            try:
                answer = await client.chat.completions.create(
                    model=self.args.model, messages=question.messages(reminder), **self._options(question)
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:  # this question, not the server
                return record | {"refused": f"the server refuses the question: {error}"}
            choices = getattr(answer, "choices", None)  # a server that is no chat server may answer anything
            text = (choices[0].message.content if choices else "") or ""
            if getattr(answer, "usage", None):
                record["usage"][0] += answer.usage.prompt_tokens
                record["usage"][1] += answer.usage.completion_tokens
            record["answer"] = text
            try:
                parse(text)
                break
            except ValueError as error:
                reminder = f"{error}."
        return record

    def _options(self, question: Question) -> dict:
        if self.args.reasoning:  # its thoughts count as tokens too
            return {"max_completion_tokens": question.max_tokens + THOUGHTS}
        return {"max_tokens": question.max_tokens, "temperature": 0}

    def usage(self, questions: list[Question]) -> dict:
        """Tokens that the answers took, whenever they were given, and dollars where --price is given."""
        records = [self.answers[q.digest(self.args.model)] for q in questions]
        tokens_in, tokens_out = (sum(r["usage"][i] for r in records) for i in (0, 1))
        found = {"model": self.args.model, "tokens_in": tokens_in, "tokens_out": tokens_out}
        return found | ({"usd": round(self._dollars(tokens_in, tokens_out), 4)} if self.args.price else {})


@functools.cache
def _content(image: Path) -> bytes:
    """The SHA-256 of a file, read once a run."""
    return hashlib.sha256(image.read_bytes()).digest()


def _cut_torn_line(file: Path) -> None:
    if file.exists() and not (content := file.read_bytes()).endswith(b"\n"):
        with file.open("r+b") as torn:
            torn.truncate(content.rfind(b"\n") + 1)
