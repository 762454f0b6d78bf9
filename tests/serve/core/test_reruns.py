"""The output after reruns: one record for each image that is there now, whatever happened to the folder in between."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from serve.core.inputs import expand
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import LLMSpec, Sampling
from serve.outputs.factory import sink_class
from serve.outputs.jsonl import is_listed
from serve.reports.progress import Progress
from tests.serve.serving import Scripted
from vlv.checkpoints.folder import Checkpoint

ROOT = Path(__file__).parents[3]
OUTPUTS = {
    "jsonl": "captions.jsonl",
    "txt": "captions.jsonl",
    "coco": "captions.json",
    "parquet": "captions.parquet",
    "webdataset": "shards",
}


@pytest.fixture
def here(tmp_path, monkeypatch, scene_images) -> Path:
    """The current folder, with 8 images in `in/` and more in `spare/`."""
    for name, numbers in (("in", range(8)), ("spare", range(8, 40))):
        (tmp_path / name).mkdir()
        for i in numbers:
            shutil.copy(scene_images / f"{i:02}.png", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(captioning_checkpoint):
    """run(kind, paths, ...) captions paths into OUTPUTS[kind]: (progress, images that have changed, missing ids)."""
    checkpoint = Checkpoint.open(captioning_checkpoint)

    def caption(kind: str, paths: list[str], prune: bool = False, after: int | None = None, verify: bool = False):
        engine = Scripted(LLMSpec.of(checkpoint), 20, 4)
        cls = type("Small", (sink_class(kind),), {"rows": 3, "shard_bytes": 20_000})
        sink, progress = cls(OUTPUTS[kind], checkpoint.hash, verify=verify), Progress()
        config = RunConfig(Sampling(20), 4, 1, limit=after, verify=verify)
        captioning = CaptionRun(checkpoint, engine, sink, config, progress)
        try:
            asyncio.run(captioning.run(expand(paths)))
            missing = list(sink.missing(captioning.listed)) if captioning.complete else []
            if prune:
                sink.drop(lambda record: not is_listed(record, captioning.listed))
        finally:
            sink.close()
        return progress, sink.changed, missing

    return caption


def captioned(kind: str) -> Counter:
    """Count the records in an output by their files' names, as any reader finds them."""
    output = Path(OUTPUTS[kind])
    if kind == "coco":
        content = json.loads(output.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return Counter(Path(names[a["image_id"]]).name for a in content["annotations"])
    if kind == "parquet":
        from pyarrow import parquet

        rows = [row for file in sorted(output.glob("part-*")) for row in parquet.read_table(file).to_pylist()]
        return Counter(Path(row["id"]).name for row in rows)
    if kind == "webdataset":
        names, contents = Counter(), {}
        for file in sorted(output.glob("*.tar")):
            with tarfile.open(file) as shard:
                contents |= {member.name: shard.extractfile(member).read() for member in shard}
        assert len(contents) % 3 == 0
        for name, content in contents.items():
            if name.endswith(".json"):
                record = json.loads(content)
                names[Path(record["id"]).name] += 1
                image = Path(record["path"])
                assert not image.exists() or contents[name.removesuffix("json") + "png"] == image.read_bytes()
        return names
    return Counter(Path(json.loads(line)["id"]).name for line in output.read_text().splitlines())


@pytest.mark.parametrize("kind", OUTPUTS)
def test_replaced_renamed_deleted_and_spelled_otherwise(kind, here, run):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    folder, spare = here / "in", here / "spare"
    run(kind, ["in"])
    assert captioned(kind) == Counter(f.name for f in folder.glob("*.png"))
    for spelling in ("./in/", str(folder), "in/../in", f"{folder}/*.png"):
        progress, changed, missing = run(kind, [spelling])
        assert (progress.captioned, progress.skipped, changed, missing) == (0, 8, 0, [])
    shutil.copy(spare / "08.png", folder / "00.png")  # replaced under its name
    os.rename(folder / "01.png", folder / "new name.png")
    (folder / "02.png").unlink()
    shutil.copy(spare / "09.png", folder)
    progress, changed, missing = run(kind, [str(folder)])
    assert (progress.captioned, changed) == (3, 1) and sorted(map(os.path.basename, missing)) == ["01.png", "02.png"]
    there = Counter(f.name for f in folder.glob("*.png"))
    assert captioned(kind) == there + Counter(["01.png", "02.png"])
    run(kind, ["in"], prune=True)
    assert captioned(kind) == there
    if kind == "txt":
        texts = {f.stem for f in folder.glob("*.txt")}
        assert texts == {Path(name).stem for name in there}
    progress, changed, missing = run(kind, ["in"])
    assert (progress.captioned, changed, missing) == (0, 0, [])


def test_a_random_history(here, run):
    """Runs that end early, with random changes and spellings in between; what is there at the end has one record."""
    draw, folder = random.Random(3), here / "in"
    spare = sorted((here / "spare").glob("*.png"))
    for step in range(20):
        images = sorted(folder.glob("*.png"))
        victim = draw.choice(images)
        change = draw.choice(["replace", "rename", "delete", "add"])
        if change == "replace":
            shutil.copy(draw.choice(spare), victim)
        elif change == "rename":
            os.rename(victim, folder / f"renamed-{step}.png")
        elif change == "delete":
            victim.unlink()
        else:
            shutil.copy(draw.choice(spare), folder / f"added-{step}.png")
        spelling = draw.choice(["in", "./in", str(folder), "in/*.png"])
        run("jsonl", [spelling], after=draw.choice([1, 3, None]))
    run("jsonl", ["in"], prune=True)
    assert captioned("jsonl") == Counter(f.name for f in folder.glob("*.png"))
    records = {json.loads(line)["id"]: json.loads(line) for line in Path(OUTPUTS["jsonl"]).read_text().splitlines()}
    for record in records.values():
        status = os.stat(record["path"])
        assert (record["bytes"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_verified_by_content(kind, here, run):
    """A file of another time with the same content stays, another one of the same size and time is captioned again."""
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    folder = here / "in"
    (folder / "00.png").write_bytes((here / "spare" / "08.png").read_bytes() + b"a")
    run(kind, ["in"], verify=True)
    before = os.stat(folder / "00.png")
    (folder / "00.png").write_bytes((here / "spare" / "08.png").read_bytes() + b"b")
    os.utime(folder / "00.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(folder / "01.png", ns=(1, 1))
    progress, changed, missing = run(kind, ["in"], verify=True)
    assert (progress.captioned, progress.skipped, changed, missing) == (1, 7, 1, [])
    assert captioned(kind) == Counter(f.name for f in folder.glob("*.png"))
    progress, changed, _ = run(kind, ["in"])  # by size and time, it is the other one that has changed
    assert (progress.captioned, progress.skipped, changed) == (1, 7, 1)


def test_a_failed_image_that_is_repaired_is_captioned(here, run):
    (here / "in" / "00.png").write_bytes(b"")
    Path("list.txt").write_text("in/00.png\nin/absent.png\nin/01.png\n")
    progress, *_ = run("jsonl", ["list.txt"])
    assert (progress.captioned, progress.failed) == (1, 2)
    progress, changed, _ = run("jsonl", ["list.txt"])
    assert (progress.captioned, progress.skipped, changed) == (0, 3, 0)
    for name in ("00.png", "absent.png"):
        shutil.copy(here / "spare" / "08.png", here / "in" / name)
    progress, changed, _ = run("jsonl", ["list.txt"])
    assert (progress.captioned, progress.skipped, changed) == (2, 1, 2)
    assert Path("captions.errors.jsonl").read_text() == ""


def test_a_folder_that_is_moved_with_its_output_goes_on(here, run, monkeypatch):
    """The ids stay, so nothing is captioned again."""
    run("jsonl", ["in"])
    (here / "elsewhere").mkdir()
    for name in ("in", OUTPUTS["jsonl"]):
        os.rename(name, here / "elsewhere" / name)
    monkeypatch.chdir(here / "elsewhere")
    progress, changed, missing = run("jsonl", ["in"])
    assert (progress.captioned, progress.skipped, changed, missing) == (0, 8, 0, [])
    for file, other in zip(sorted(Path("in").iterdir()), (here / "spare").iterdir(), strict=False):
        shutil.copy(other, file)  # of the same names, but other images
    os.rename("in", here / "in")
    monkeypatch.chdir(here)
    os.rename("elsewhere/" + OUTPUTS["jsonl"], OUTPUTS["jsonl"])
    records = [json.loads(line) for line in Path(OUTPUTS["jsonl"]).read_text().splitlines()]
    differ = {r["id"] for r in records if os.path.getsize(r["id"]) != r["bytes"]}
    progress, changed, missing = run("jsonl", ["in"])
    assert progress.captioned == changed == 8 and missing == [] and differ


def test_the_check_of_the_benchmark_sees_every_fault(tmp_path):
    """benchmarks/reruns_check.py, which reads only the output and the folder."""
    folder, digests = tmp_path / "in", {}
    folder.mkdir()
    for name in ("good", "twice", "absent", "other"):
        (folder / f"{name}.png").write_bytes(name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    for name, shade in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (2, 2), shade).save(folder / f"{name}.png")
    red = f"Pixels {hashlib.sha256(bytes([255] * 4 + [0] * 8)).hexdigest()[:16]}."  # channels first
    records = [("good", digests["good"]), *[("twice", digests["twice"])] * 2, ("other", digests["good"]), ("gone", "0")]
    records += [("red", None), ("blue", None)]
    with open(tmp_path / "c.jsonl", "w") as file:
        for name, digest in records:
            path = f"{folder}/../in/{name}.png"  # spelled otherwise
            text = "A." if digest else red
            file.write(json.dumps({"id": path, "path": path, "caption": text, "sha256": digest}) + "\n")
    command = [sys.executable, ROOT / "benchmarks" / "reruns_check.py", tmp_path / "c.jsonl", folder]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == {
        "images": 6, "records": 7, "images_without_record": 1, "images_with_several": 1, "records_without_image": 1,
        "records_of_another_image": 1, "captions_of_other_pixels": 1, "compared_by_hash": 4, "compared_by_pixels": 2,
    }  # fmt: skip
