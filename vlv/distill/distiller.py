"""Caption a source of images by another model: choose the images, ask, check the answers, write the records."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from vlv.common.command import UserError, say
from vlv.common.jsonl import cut_torn_line, read_records
from vlv.common.openai_client import Answer, ChatClient, NoAnswer, ServerError, TokenLimitError, final_text, image_url
from vlv.data.image import decode, file_ending, load_crop
from vlv.data.sources import Sample, Source
from vlv.distill.config import DistillConfig
from vlv.distill.duplicates import Duplicates, content_hash, difference_hash
from vlv.distill.quality import caption_problem, image_problem, tidy


class DistillError(UserError, ValueError):
    """Raised where a run stops early; everything that is written stays."""


@dataclass
class Tally:
    """Counts of what a run has done and used."""

    kept: int = 0
    rejected: int = 0
    failed: int = 0
    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Job:
    """An image to ask about, and the beginning of its record."""

    record: dict
    image: bytes


def estimate(images: int, config: DistillConfig) -> tuple[str, float]:
    """Return a sentence about the most that a run may cost, and the dollars."""
    client = config.client
    tokens_in, tokens_out = images * (client.image_tokens + len(config.prompt) // 3), images * config.max_tokens
    dollars = client.dollars(tokens_in, tokens_out)
    text = (
        f"{images:,} images: at most {tokens_in / 1e6:.2f} M tokens in (taking {client.image_tokens} an image) "
        f"and {tokens_out / 1e6:.2f} M out"
    )
    return text + (f", ${dollars:,.2f}" if client.price else " (--price IN OUT gives the cost)"), dollars


class Output:
    """data.jsonl, data.rejected.jsonl and data.errors.jsonl; every line is complete or absent."""

    def __init__(self, path: Path):
        self.path, self.rejected = path, path.with_suffix(".rejected.jsonl")
        self.errors = path.with_suffix(".errors.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.path, self.rejected):
            cut_torn_line(file)
        self.before = [r for file in (self.path, self.rejected) for r in read_records(file)]
        self.errors.unlink(missing_ok=True)

    def write(self, file: Path, record: dict) -> None:
        with file.open("ab") as stream:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


class Distiller:
    """Reads a source in order, asks about images that are new and good, and writes the answers."""

    def __init__(self, source: Source, config: DistillConfig):
        self.source = source
        self.config = config
        self.tally = Tally()
        self.output = Output(config.output)
        self.duplicates = Duplicates(config.near)
        for record in self.output.before:
            if "reason" not in record or not record["reason"].startswith("duplicate"):
                self._remember(record)
        self.done = {record["id"] for record in self.output.before}
        self.client = ChatClient(config.client)
        self.prompt_hash = hashlib.sha256(config.prompt.encode()).hexdigest()[:12]
        self.started = time.time()
        self.stop: BaseException | None = None  # why nothing more is asked

    @property
    def left(self) -> int:
        """The number of rows that no earlier run has finished."""
        return max(0, sum(self.source.rows) - len(self.done))

    async def run(self) -> Tally:
        """Caption everything that is left.

        Raises DistillError once the limit of the cost is reached or no answers come, OSError where an answer cannot
        be written.
        """
        semaphore, tasks = asyncio.Semaphore(self.config.client.concurrency), set()

        def ended(task: asyncio.Task) -> None:
            tasks.discard(task)
            semaphore.release()
            if not task.cancelled():
                self.stop = self.stop or task.exception()

        async with self.client:
            try:
                for shard, count in enumerate(self.source.rows):
                    for row in range(count):
                        job = await asyncio.to_thread(self._prepare, shard, row)
                        if job is None:
                            continue
                        await semaphore.acquire()
                        self._check()
                        task = asyncio.create_task(self._ask(job))
                        tasks.add(task)
                        task.add_done_callback(ended)
            finally:
                await asyncio.gather(*tasks, return_exceptions=True)
        if self.stop:
            raise self.stop
        return self.tally

    def _prepare(self, shard: int, row: int) -> Job | None:
        """Read an image; return None if it was finished before, or is rejected here."""
        sample = None
        if self.source.name(shard, row) in self.done:
            return None
        try:
            sample = self.source.read(shard, row)
            if sample.id in self.done:
                return None
            image = decode(sample.image)
            sent = self._image_to_send(sample.image)
        except Exception as error:  # a source's libraries raise nearly any type for a damaged row
            id = sample.id if sample else f"{shard}:{row}"
            self._reject({"id": id}, f"unreadable: {error}")
            return None
        width, height = image.size
        difference = difference_hash(image)
        about = sample.about
        record = {
            "id": sample.id,
            "sha256": content_hash(sample.image),
            "dhash": f"{difference:016x}",
            "width": width,
            "height": height,
            "license": about.get("license") or self.config.license,
            "source": about.get("url") or about.get("source") or self.config.source or sample.id,
            **{k: v for k, v in about.items() if k not in ("license", "url", "source")},
        }
        if problem := image_problem(width, height, about, self.config.limits):
            self._reject(record, problem)
            return None
        if earlier := self.duplicates.find(record["sha256"], difference):
            self._reject(record, f"duplicate of {earlier}")
            return None
        self._remember(record)
        return Job(record | {"path": self._path(sample)}, sent)

    def _image_to_send(self, image: bytes) -> bytes:
        """Return the crop that VLV sees, as a JPEG; with size 0 the file itself."""
        if not self.config.size:
            return image
        buffer = io.BytesIO()
        Image.fromarray(load_crop(image, self.config.size).transpose(1, 2, 0)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    def _path(self, sample: Sample) -> str:
        """Return where training finds the image: its file, or for a row of a shard a copy beside the output."""
        if os.path.exists(sample.id):
            return os.path.abspath(sample.id)
        if "://" in sample.id and not any(part in sample.id for part in (".tar/", ".parquet#")):
            return sample.id
        name = hashlib.sha256(sample.image).hexdigest()[:16]
        target = self.config.output.with_suffix(".images") / name[:2] / f"{name}{file_ending(sample.image)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sample.image)
        return os.path.relpath(target, self.config.output.parent)

    async def _ask(self, job: Job) -> None:
        content = [
            {"type": "text", "text": self.config.prompt},
            {"type": "image_url", "image_url": {"url": image_url(job.image)}},
        ]
        try:
            answer = await self.client.ask([{"role": "user", "content": content}], self.config.max_tokens)
        except (NoAnswer, ServerError) as error:
            self.tally.failed += 1
            text = f"{type(error.__cause__ or error).__name__}: {error}"[:500]
            self.output.write(self.output.errors, {"id": job.record["id"], "error": text})
            url, tokens = self.config.client.url, self.config.max_tokens
            if isinstance(error, TokenLimitError):  # every image would meet it
                self.stop = DistillError(f"{url} refuses --max-tokens {tokens}, choose a smaller one ({error})")
            elif getattr(error, "fatal", False):
                self.stop = DistillError(f"{url} gives no answers ({error}): what is written stays")
            return
        self.tally.answers += 1
        self.tally.tokens_in += answer.tokens_in
        self.tally.tokens_out += answer.tokens_out
        self._write(job, answer)
        self._progress()

    def _write(self, job: Job, answer: Answer) -> None:
        """Write the caption with its origin, or why it is rejected."""
        cut_off = answer.finish_reason == "length"
        caption = tidy(final_text(answer.text), cut_off)
        record = {"id": job.record["id"], "path": job.record["path"], "caption": caption, **job.record}
        record["teacher"] = {
            "model": answer.model or self.config.client.model,
            "url": self.config.client.url,
            "prompt": self.prompt_hash,
            "date": datetime.now(UTC).date().isoformat(),
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens_out or None,
        }
        if problem := caption_problem(caption, cut_off, self.config.limits):
            self._reject(record, problem)
        else:
            self.output.write(self.output.path, record)
            self.tally.kept += 1

    def _remember(self, record: dict) -> None:
        if "dhash" in record:
            self.duplicates.add(record["id"], record["sha256"], int(record["dhash"], 16))

    def _reject(self, record: dict, reason: str) -> None:
        self.output.write(self.output.rejected, record | {"reason": reason})
        self.tally.rejected += 1

    @property
    def _spent(self) -> float:
        return self.config.client.dollars(self.tally.tokens_in, self.tally.tokens_out)

    def _check(self) -> None:
        """Raise why the run must stop."""
        if self.stop:
            raise self.stop
        limit = self.config.client.max_cost
        if limit is not None and self._spent >= limit:
            raise DistillError(f"${self._spent:.2f} are spent, --max-cost is {limit:g}: what is written stays")

    def _progress(self) -> None:
        t = self.tally
        if t.answers % 100 and t.answers != 10:
            return
        left = self.left - t.kept - t.rejected - t.failed
        rate = t.answers / (time.time() - self.started)
        each = self._spent / t.answers
        money = f", ${self._spent:.2f} so far, about ${each * left:.2f} to go" if self.config.client.price else ""
        say(
            f"{t.answers} answers, {t.rejected} rejected, {t.failed} failed, {rate:.1f}/s, "
            f"about {left / rate / 3600:.2f} h to go{money}"
        )
