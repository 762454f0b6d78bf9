"""WebDataset shards made of WebDataset shards: keys, order and members stay; the webdataset package reads them."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from serve.core.inputs import expand
from serve.core.record import error_record
from serve.outputs.webdataset import WebDatasetSink
from vlv.data.sources import open_sources


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write(file: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as shard:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def read(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as shard:
        return {member.name: shard.extractfile(member).read() for member in shard}


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    """Two shards as img2dataset writes them, with a further member a sample, in a folder with its other files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(2):
        contents = {}
        for i in range(6):
            key = f"{shard:05}{i:04}"
            about = {"url": f"http://host/{key}.png", "key": key, "status": "success", "caption": "alt text"}
            contents |= {f"{key}.png": png(10 * shard + i), f"{key}.txt": b"alt text"}
            contents |= {f"{key}.json": json.dumps(about).encode(), f"{key}.cls": b"%d" % i}
        write(folder / f"{shard:05}.tar", contents)
        (folder / f"{shard:05}_stats.json").write_text("{}")
    return folder


def record(item, text: str | None = None) -> dict:
    about = os.stat(item.path)
    given = {"id": item.id, "path": item.path, "caption": text or f"Caption of {item.id[-13:]}.", "model": "m"}
    return given | {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def run(paths: list[str], out: Path, seed: int = 0, fails=(), stop: int | None = None) -> int:
    """Caption in a random order, as the pipeline does; `stop` ends it after so many as a kill would."""
    sink = WebDatasetSink(out, "m")
    items = [item for item in expand(paths) if not sink.is_finished(item, None)]
    random.Random(seed).shuffle(items)
    for item in items[:stop]:
        if item.id.endswith(tuple(fails)):
            sink.error(error_record(item, "damaged", "it is"))
        else:
            sink.caption(record(item), item)
    if stop is None:
        sink.close()
    else:
        for file in (sink._journal._fd, sink._fd):  # as the system does for a process that is killed
            if file >= 0:
                os.close(file)
    return len(items)


def expected(shards: Path, out: Path, leave_out=()) -> None:
    """Every sample of the input is in the output shard of its name, in order, with what it had."""
    for file in sorted(shards.glob("*.tar")):
        before, after = read(file), read(out / file.name)
        keys = [name.removesuffix(".png") for name in before if name.endswith(".png")]
        keys = [key for key in keys if not key.endswith(tuple(leave_out))]
        endings = (".png", ".original.txt", ".original.json", ".cls", ".txt", ".json")
        assert [*after] == [key + ending for key in keys for ending in endings]
        for key in keys:
            assert [after[f"{key}.png"], after[f"{key}.cls"]] == [before[f"{key}.png"], before[f"{key}.cls"]]
            assert after[f"{key}.original.txt"] == b"alt text"
            assert json.loads(after[f"{key}.original.json"])["url"] == f"http://host/{key}.png"
            assert after[f"{key}.txt"] == f"Caption of {key}.png.".encode()
            assert json.loads(after[f"{key}.json"])["caption"] == f"Caption of {key}.png."


def test_keys_order_and_members_stay(shards, tmp_path):
    run([str(shards)], tmp_path / "out")
    expected(shards, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"00000.tar", "00001.tar", ".pending.jsonl"}
    assert run([str(shards)], tmp_path / "out") == 0


@pytest.mark.parametrize("stops", [(1,), (5, 3), (11, 1, 0), (2, 2, 2, 2)])
def test_killed_runs_keep_the_order_and_what_is_captioned(stops, shards, tmp_path):
    left = 12
    for seed, stop in enumerate(stops):
        assert run([str(shards)], tmp_path / "out", seed, stop=stop) == left
        left -= stop
    assert run([str(shards)], tmp_path / "out", 99) == left
    expected(shards, tmp_path / "out")
    assert (tmp_path / "out" / ".pending.jsonl").read_bytes() == b""


def test_a_failed_image_holds_nobody_up(shards, tmp_path):
    run([str(shards)], tmp_path / "out", fails=("0000.png", "0005.png"))
    expected(shards, tmp_path / "out", leave_out=("0000", "0005"))
    assert len((tmp_path / "out.errors.jsonl").read_text().splitlines()) == 4


def test_files_of_any_order_are_written_in_order(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.png").write_bytes(png(i))
    run([str(folder)], tmp_path / "out", stop=7)
    run([str(folder)], tmp_path / "out", 5)
    after = read(tmp_path / "out" / "000000.tar")
    assert [*after] == [f"{i:09}{ending}" for i in range(20) for ending in (".png", ".txt", ".json")]
    assert [after[f"{i:09}.png"] for i in range(20)] == [png(i) for i in range(20)]
    (folder / "03.png").write_bytes(png(99))  # gets a number of its own, after the others
    assert run([str(folder)], tmp_path / "out") == 1
    after = read(tmp_path / "out" / "000000.tar")
    assert "000000003.png" not in after and after["000000020.png"] == png(99) and len(after) == 3 * 20


def test_a_shard_without_samples_goes(shards, tmp_path):
    """Its images are not in the input any more; the others stay as they are."""
    run([str(shards)], tmp_path / "out")
    before = (tmp_path / "out" / "00001.tar").read_bytes()
    sink = WebDatasetSink(tmp_path / "out", "m")
    assert sink.drop(lambda record: "00000.tar" in record["id"]) == 6
    sink.close()
    assert [file.name for file in (tmp_path / "out").glob("*.tar")] == ["00001.tar"]
    assert (tmp_path / "out" / "00001.tar").read_bytes() == before
    run([str(shards)], tmp_path / "out")
    expected(shards, tmp_path / "out")


def test_several_images_of_one_key_and_names_that_are_too_long(tmp_path):
    """Shards of one name, samples without a caption of their own, keys in folders."""
    long = "x" * 95
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        contents = {"d/7.JPG": png(1), "d/7.mask.png": png(2), f"{long}.png": png(3)}
        write(tmp_path / name / "s.tar", contents)
    run([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    for name in ("s.tar", "s-2.tar"):
        after = read(tmp_path / "out" / name)
        assert [*after][:4] == ["d/7.JPG", "d/7.mask.png", "d/7.txt", "d/7.json"]
        rest = [*after][4:]
        assert [Path(name).suffix for name in rest] == [".png", ".txt", ".json"] * 2 and len(set(rest)) == 6
        assert [after[rest[0]], after[rest[3]]] == [png(2), png(3)]
        assert after[rest[1]] == b"Caption of /d/7.mask.png."


def test_read_by_webdataset_and_by_training(shards, tmp_path, monkeypatch):
    run([str(shards)], tmp_path / "out")
    source = open_sources([str(tmp_path / "out")])
    found = [source.read(shard, row).caption for shard in range(2) for row in range(6)]
    assert found == [f"Caption of {shard:05}{i:04}.png." for shard in range(2) for i in range(6)]
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    urls = str(tmp_path / "out" / "{00000..00001}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{shard:05}{i:04}" for shard in range(2) for i in range(6)]
    assert [sample["txt"] for sample in samples] == found
    assert [sample["png"].getpixel((0, 0))[0] for sample in samples] == [*range(6), *range(10, 16)]
    assert samples[3]["cls"] == 3 and samples[3]["original.json"]["status"] == "success"


def test_read_by_datasets(shards, tmp_path):
    run([str(shards)], tmp_path / "out")
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    files = sorted(str(file) for file in (tmp_path / "out").glob("*.tar"))
    given: list[dict] = [{"data_files": files}, {"data_dir": str(tmp_path / "out")}]
    for options in given:
        loaded = datasets.load_dataset(
            "webdataset", **options, split="train", cache_dir=str(tmp_path / "cache" / "datasets")
        )
        assert [row["txt"] for row in loaded] == [f"Caption of {s:05}{i:04}.png." for s in range(2) for i in range(6)]
        assert [row["png"].getpixel((0, 0))[0] for row in loaded] == [*range(6), *range(10, 16)]
