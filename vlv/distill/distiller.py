"""The work of vlv.train.distill: what is asked about, how, and what becomes of the answers."""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vlv.distill.quality import Limits, caption_problem, image_problem, tidy

PATIENCE = 20  # requests in a row that fail, retries and all


@dataclass
class Tally:
    """What a run has done and used."""

    kept: int = 0
    rejected: int = 0
    failed: int = 0
    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def dollars(self, price: tuple[float, float] | None) -> float:
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6 if price else 0.0


@dataclass(frozen=True)
class Job:
    """An image that is worth asking about, with what its record will hold."""

    record: dict
    image: bytes


class Output:
    """data.jsonl, data.rejected.jsonl and data.errors.jsonl; every line is whole or absent."""

    def __init__(self, path: Path):
        self.path, self.rejected = path, path.with_suffix(".rejected.jsonl")
        self.errors = path.with_suffix(".errors.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.before = [r for file in (self.path, self.rejected) for r in _whole_lines(file)]
        self.errors.unlink(missing_ok=True)

    def write(self, file: Path, record: dict) -> None:
        with file.open("ab") as stream:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def _whole_lines(file: Path) -> Iterator[dict]:
    """The records of a file, from which a line that a killed run left unfinished is cut off."""
    if not file.exists():
        return
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with file.open("r+b") as stream:
            stream.truncate(len(content))
    for line in content.splitlines():
        yield json.loads(line)


class Distiller:
    """Goes through a source in order, asks about what is new and good, and writes what comes back."""

    def __init__(self, source, args: argparse.Namespace, limits: Limits):
        from openai import AsyncOpenAI

        from vlv.distill.duplicates import Duplicates

        self.source, self.args, self.limits, self.tally = source, args, limits, Tally()
        self.output = Output(args.output)
        self.duplicates = Duplicates(args.near)
        for record in self.output.before:
            if "reason" not in record or not record["reason"].startswith("duplicate"):
                self._remember(record)
        self.done = {record["id"] for record in self.output.before}
        self.client = AsyncOpenAI(
            base_url=args.url, api_key=os.environ.get(args.key_env) or "none", max_retries=args.retries,
            timeout=args.timeout,
        )  # fmt: skip
        self.prompt_hash = hashlib.sha256(args.prompt.encode()).hexdigest()[:12]
        self.started, self.in_a_row = time.time(), 0
        self.stop: BaseException | None = None  # why nothing more is asked

    @property
    def rows(self) -> int:
        return sum(self.source.rows)

    async def run(self) -> Tally:
        """Caption everything that is left.

        Raises ValueError once --max-cost is spent or no answers come, OSError where an answer cannot be written.
        """
        gate, tasks = asyncio.Semaphore(self.args.concurrency), set()

        def ended(task: asyncio.Task) -> None:
            tasks.discard(task)
            gate.release()
            if not task.cancelled():
                self.stop = self.stop or task.exception()

        try:
            for shard, count in enumerate(self.source.rows):
                for row in range(count):
                    job = await asyncio.to_thread(self._prepare, shard, row)
                    if job is None:
                        continue
                    await gate.acquire()
                    self._check()
                    task = asyncio.create_task(self._ask(job))
                    tasks.add(task)
                    task.add_done_callback(ended)
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.close()
        if self.stop:
            raise self.stop
        return self.tally

    def _prepare(self, shard: int, row: int) -> Job | None:
        """Read an image; None if it was done before, or is rejected here."""
        from PIL import Image

        from vlv.distill.duplicates import content_hash, difference_hash

        sample = None
        if self.source.name(shard, row) in self.done:
            return None
        try:
            sample = self.source.read(shard, row)
            if sample.id in self.done:
                return None
            with Image.open(io.BytesIO(sample.image)) as opened:
                width, height = opened.size
            difference = difference_hash(sample.image)
            shown = self._shown(sample.image)
        except Exception as error:  # of a damaged file Pillow and its decoders raise nearly anything
            id = sample.id if sample else f"{shard}:{row}"
            self._reject({"id": id}, f"unreadable: {error}")
            return None
        about = sample.about
        record = {
            "id": sample.id, "sha256": content_hash(sample.image), "dhash": f"{difference:016x}", "width": width,
            "height": height, "license": about.get("license") or self.args.license,
            "source": about.get("url") or about.get("source") or self.args.source or sample.id,
            **{k: v for k, v in about.items() if k not in ("license", "url", "source")},
        }  # fmt: skip
        if problem := image_problem(width, height, about, self.limits):
            self._reject(record, problem)
            return None
        if earlier := self.duplicates.of(record["sha256"], difference):
            self._reject(record, f"duplicate of {earlier}")
            return None
        self._remember(record)
        return Job(record | {"path": self._path(sample)}, shown)

    def _shown(self, image: bytes) -> bytes:
        """What the model gets: the crop that VLV sees, at --size; the file itself with --size 0."""
        if not self.args.size:
            return image
        from PIL import Image

        from vlv.data.image import load_crop

        buffer = io.BytesIO()
        Image.fromarray(load_crop(image, self.args.size).transpose(1, 2, 0)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    def _path(self, sample) -> str:
        """Where training finds the image: its file, or for a row of a shard a copy beside the output."""
        if os.path.exists(sample.id):
            return os.path.abspath(sample.id)
        if "://" in sample.id and not any(part in sample.id for part in (".tar/", ".parquet#")):
            return sample.id
        name = hashlib.sha256(sample.image).hexdigest()[:16]
        target = self.args.output.with_suffix(".images") / name[:2] / f"{name}.img"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sample.image)
        return os.path.relpath(target, self.args.output.parent)

    async def _ask(self, job: Job) -> None:
        import openai

        kind = {b"\x89P": "png", b"\xff\xd8": "jpeg", b"RI": "webp"}.get(job.image[:2], "jpeg")
        url = f"data:image/{kind};base64,{base64.b64encode(job.image).decode()}"
        content = [{"type": "text", "text": self.args.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        try:
            answer = await self.client.chat.completions.create(
                model=self.args.model, messages=[{"role": "user", "content": content}], max_tokens=self.args.max_tokens
            )
            choice = answer.choices[0]
            text = choice.message.content or ""
        except (openai.OpenAIError, IndexError, TypeError, AttributeError) as error:  # no chat server: any answer
            self.tally.failed += 1
            record = {"id": job.record["id"], "error": f"{type(error).__name__}: {error}"[:500]}
            self.output.write(self.output.errors, record)
            self.in_a_row += 1
            hopeless = isinstance(
                error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError
            )
            if hopeless or self.in_a_row >= PATIENCE:
                self.stop = ValueError(f"{self.args.url} gives no answers ({error}): what is written stays")
            return
        self.in_a_row = 0
        usage = answer.usage
        self.tally.answers += 1
        self.tally.tokens_in += usage.prompt_tokens if usage else 0
        self.tally.tokens_out += usage.completion_tokens if usage else 0
        cut_off = choice.finish_reason == "length"
        caption = tidy(text, cut_off)
        teacher = {
            "model": answer.model or self.args.model, "url": self.args.url, "prompt": self.prompt_hash,
            "date": datetime.now(UTC).date().isoformat(), "finish_reason": choice.finish_reason,
            "tokens": usage.completion_tokens if usage else None,
        }  # fmt: skip
        record = {"id": job.record["id"], "path": job.record["path"], "caption": caption, **job.record}
        record["teacher"] = teacher
        if problem := caption_problem(caption, cut_off, self.limits):
            self._reject(record, problem)
        else:
            self.output.write(self.output.path, record)
            self.tally.kept += 1
        self._progress()

    def _remember(self, record: dict) -> None:
        if "dhash" in record:
            self.duplicates.add(record["id"], record["sha256"], int(record["dhash"], 16))

    def _reject(self, record: dict, reason: str) -> None:
        self.output.write(self.output.rejected, record | {"reason": reason})
        self.tally.rejected += 1

    def _check(self) -> None:
        if self.stop:
            raise self.stop
        spent = self.tally.dollars(self.args.price)
        if self.args.max_cost is not None and spent >= self.args.max_cost:
            raise ValueError(f"${spent:.2f} are spent, --max-cost is {self.args.max_cost:g}: what is written stays")

    def _progress(self) -> None:
        t = self.tally
        if t.answers % 100 and t.answers != 10:
            return
        left = self.rows - len(self.done) - t.kept - t.rejected - t.failed
        rate = t.answers / (time.time() - self.started)
        each = t.dollars(self.args.price) / t.answers
        money = f", ${t.dollars(self.args.price):.2f} so far, about ${each * left:.2f} to go" if self.args.price else ""
        print(
            f"{t.answers} answers, {t.rejected} rejected, {t.failed} failed, {rate:.1f}/s, "
            f"about {left / rate / 3600:.2f} h to go{money}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
