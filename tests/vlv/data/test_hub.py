"""Data sets by their hub ids, through the real `datasets` and `huggingface_hub`, from a local server of the routes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.vlv.data.hub import Hub

ROOT = Path(__file__).parents[3]
LOGIN = "log in (hf auth login, or the variable HF_TOKEN)"
ABSENT, GATED = f"is not on the hub, or is private: check the name, or {LOGIN}", "is gated: ask for access on its page"
READ = """
import json, sys, zlib
from serve.core.inputs import expand
from vlv.data.sources import open_sources
def tried(work):
    try:
        return work()
    except ValueError as error:  # DataError or SourceError
        return f"{type(error).__name__}: {error}"
def train(name):
    source = open_sources([name])
    rows = [source.read(shard, row) for shard, rows in enumerate(source.rows) for row in range(rows)]
    return [[zlib.crc32(sample.image), sample.caption] for sample in rows]
def caption(name):
    return [[zlib.crc32(item.read()), item.id] for item in expand([name])]
print(json.dumps({name: [tried(lambda: train(name)), tried(lambda: caption(name))] for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    made = []
    for shade in range(6):
        stream = io.BytesIO()
        Image.new("RGB", (4, 4), (40 * shade,) * 3).save(stream, "PNG")
        made.append(stream.getvalue())
    return made


@pytest.fixture(scope="module")
def hub(images):
    pytest.importorskip("datasets", reason="pip install datasets")
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    def rows(first: int, last: int) -> bytes:
        structs = [{"bytes": images[i], "path": f"{i}.png"} for i in range(first, last)]
        stream = io.BytesIO()
        parquet.write_table(pa.table({"image": structs, "text": [f"Image {i}." for i in range(first, last)]}), stream)
        return stream.getvalue()

    files = {"README.md": b"# Images\n", "data/train-0.parquet": rows(0, 4), "data/test-0.parquet": rows(4, 6)}
    with Hub({"someone/images": files}) as running:
        yield running


def command(hub, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python with the hub and an empty cache: a process of its own, since the endpoint is read at import."""
    caches = {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment = {**os.environ, **caches, **paths, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_ids_for_training_and_captioning(hub, images, tmp_path):
    from zlib import crc32

    names = ["hf:someone/images", "hf:someone/images:test", "hf:someone/images:train[1:3]"]
    names += ["hf://datasets/someone/images/data/test-0.parquet", "hf://datasets/someone/images"]
    done = command(hub, tmp_path, "-c", READ, *names)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    parts = {names[0]: range(4), names[1]: range(4, 6), names[2]: range(1, 3), names[3]: range(4, 6)}
    for name in names[:4]:
        trained, captioned = found[name]
        expected = [images[i] for i in parts[name]]
        assert trained == [[crc32(images[i]), f"Image {i}."] for i in parts[name]], name
        assert captioned == [[crc32(image), f"{name}/{row}"] for row, image in enumerate(expected)], name
    trained, captioned = found[names[4]]  # all Parquet files of the repository, by name
    order = [images[i] for i in (4, 5, 0, 1, 2, 3)]
    assert [row[0] for row in trained] == [row[0] for row in captioned] == [crc32(image) for image in order]


def test_ids_that_lead_to_nothing_are_one_sentence(hub, tmp_path):
    expected = {
        "hf:someone/absent": ABSENT,
        "hf:someone/gated": GATED,
        "hf:someone/asked": GATED,
        "hf:someone/images:validation": "cannot be opened: ValueError: Unknown split",
        "hf:some one/x": "cannot be opened: HFValidationError: Repo id must use",
        "hf://datasets/someone/absent": ABSENT,
        "hf://datasets/someone/gated": GATED,
        "hf://datasets/someone/gated/data/*.parquet": GATED,
        "hf://datasets/someone/asked/train.parquet": GATED,
    }
    absent = "hf://datasets/someone/images/data/no.parquet"
    done = command(hub, tmp_path, "-c", READ, *expected, absent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, words in expected.items():
        for kind, sentence in zip(("DataError", "SourceError"), found[name], strict=True):
            assert sentence.startswith(f"{kind}: {name} {words}"), (name, sentence)
    sentence = f"no such file or folder: {absent}"
    assert found[absent] == [f"DataError: {sentence}", f"SourceError: {sentence}"]


def test_the_commands_say_it(hub, tmp_path):
    bundled = str(ROOT / "assets" / "vlv-tiny")
    name = "hf:someone/absent"
    done = command(hub, tmp_path, "-m", "serve.vllm_caption", name, "--ckpt", bundled, "-o", "c.jsonl")
    assert (done.returncode, done.stderr) == (2, f"error: {name} {ABSENT}\n") and not (tmp_path / "c.jsonl").exists()
    name = "hf:someone/asked"
    train = ["--preset", "paper-stage1", "--data", name, "--ckpt", bundled, "--run", "run"]
    done = command(hub, tmp_path, "-m", "vlv.train.stage1", *train)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {name} {GATED}")
