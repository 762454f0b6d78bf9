"""The other output formats: what readers find in them, and that no kill loses or doubles an image."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from serve import FORMATS
from serve.core.inputs import Item, part_of
from serve.outputs.factory import sink_class
from serve.outputs.formats import sidecar
from serve.outputs.jsonl import SinkError
from serve.outputs.webdataset import sample
from vlv.data.image import ImageError
from vlv.data.image_files import is_image

WRITER = Path(__file__).with_name("killed_writer.py")
KILLS = 50


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three small pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    files = [folder / f"{name}.png" for name in ("a", "b", "ü")]
    for shade, file in enumerate(files):
        Image.new("RGB", (4, 4), (shade,) * 3).save(file)
    return files


def record(image: Path, **more) -> dict:
    timings = {"encode": 0.5, "llm": 1.5}
    given = {"id": str(image), "path": str(image), "caption": f"Picture {image.stem}.", "model": "m", "tokens": 3}
    return {**given, "finish_reason": "stop", "timings": timings, **more}


def fill(sink, images, **more) -> None:
    """As the pipeline does."""
    for image in images:
        if sink.finished.add(str(image)):
            try:
                sink.caption(record(image, **more), Item(str(image), str(image)))
            except ImageError as error:
                sink.error({"id": str(image), "kind": error.kind})
    sink.close()


def test_sidecars(images, tmp_path):
    def sink(resume=True):
        return sink_class("txt")(tmp_path / "c.jsonl", "m", resume)

    fill(sink(), images[:2])
    assert [sidecar(i).read_text() for i in images[:2]] == ["Picture a.\n", "Picture b.\n"]
    sidecar(images[1]).unlink()  # as a kill between the record and its text leaves it
    sidecar(images[2]).write_text("mine")
    fill(sink(), images)
    assert sidecar(images[1]).read_text() == "Picture b.\n" and sidecar(images[2]).read_text() == "mine"
    assert json.loads((tmp_path / "c.errors.jsonl").read_text())["kind"] == "exists"
    sidecar(images[0]).write_text("edited")
    fill(sink(resume=False), images, captions=["One.", "Two."])
    assert [sidecar(i).read_text() for i in images] == ["edited", "One.\nTwo.\n", "mine"]
    inside = sink_class("txt")(tmp_path / "d.jsonl", "m")
    with pytest.raises(ImageError, match="use --format webdataset"):
        inside.caption(record(images[0], path="x.tar"), Item("x.tar/a.png", "x.tar", 512, 90))
    inside.close()


def test_images_that_differ_in_their_endings_only(images, tmp_path):
    """Both would have the same text file: the first has it, the second says why it has none."""
    other = images[0].with_suffix(".jpg")
    other.write_bytes(b"")
    for _ in range(2):  # also in a run that goes on
        sink = sink_class("txt")(tmp_path / "c.jsonl", "m")
        if sink.finished.add(str(images[0])):
            sink.caption(record(images[0]), Item(str(images[0]), str(images[0])))
        with pytest.raises(ImageError, match="of another image of this output, whose name differs in its ending only"):
            sink.caption(record(other), Item(str(other), str(other)))
        sink.close()
    assert sidecar(other).read_text() == "Picture a.\n"


def test_a_caption_is_one_line_of_a_text(images, tmp_path):
    fill(sink_class("txt")(tmp_path / "c.jsonl", "m"), images[:1], captions=["One.\nStill one.", "Two."])
    assert sidecar(images[0]).read_text() == "One. Still one.\nTwo.\n"


def test_other_flags_are_not_mixed_in(images, tmp_path):
    """Captions made with other flags are refused in every format; those of earlier versions name none."""
    for kind in FORMATS:
        if kind == "parquet":
            pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        output = tmp_path / kind / "c.json" if kind == "coco" else tmp_path / kind / "c.jsonl"
        folder = output.parent
        folder.mkdir()
        if kind in ("parquet", "webdataset"):
            output = folder / "parts"
        copies = []
        for image in images[:2]:
            copies.append(folder / image.name)
            copies[-1].write_bytes(image.read_bytes())
        fill(sink_class(kind)(output, "m", flags="--raw"), copies[:1], flags="--raw")
        with pytest.raises(SinkError, match=r"holds captions made with --raw, and this run is without flags"):
            sink_class(kind)(output, "m")
        fill(sink_class(kind)(output, "m", flags="--raw"), copies, flags="--raw")
    old = tmp_path / "old.jsonl"
    fill(sink_class("jsonl")(old, "m"), images[:1])
    sink = sink_class("jsonl")(old, "m", flags="-n 3 --raw")
    assert str(images[0]) in sink.finished
    sink.close()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_shards_hold_only_extensions_that_readers_know(kind, tmp_path):
    """Also for an image whose own name says nothing, such as a download."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, kind)
    with tarfile.open(fileobj=io.BytesIO(sample("0", stream.getvalue(), record(tmp_path / "download")))) as made:
        name = made.getnames()[0]
    assert is_image(name) and Image.registered_extensions()[Path(name).suffix] in (kind, "JPEG2000", "MPO")


def test_coco(images, tmp_path):
    def sink(**more):
        return sink_class("coco")(tmp_path / "c.json", "m", **more)

    fill(sink(), images[:1])
    fill(sink(), images, captions=["One.", "Zwei Bäume."])
    content = json.loads((tmp_path / "c.json").read_text())
    assert [i["file_name"] for i in content["images"]] == [str(i) for i in images]
    assert [(a["image_id"], a["caption"]) for a in content["annotations"]] == [
        (1, "Picture a."), (2, "One."), (2, "Zwei Bäume."), (3, "One."), (3, "Zwei Bäume.")
    ]  # fmt: skip
    assert len({a["id"] for a in content["annotations"]}) == 5
    fill(sink(resume=False), images[2:])
    assert len(json.loads((tmp_path / "c.json").read_text())["images"]) == 1
    with pytest.raises(SinkError, match=r"writes one JSON file: -o .*c\.json"):
        sink_class("coco")(tmp_path / "c.jsonl", "m")
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(SinkError, match=r"is there already, without its c\.jsonl"):
        sink()
    (tmp_path / "other.json").write_text("{}")
    for resume in (True, False):
        with pytest.raises(SinkError, match="is there already, and not from a run"):
            sink_class("coco")(tmp_path / "other.json", "m", resume)
    assert (tmp_path / "other.json").read_text() == "{}"


def test_webdataset(images, tmp_path):
    def sink(model="m", resume=True):
        return sink_class("webdataset")(tmp_path / "shards", model, resume)

    fill(sink(), images[:2])
    fill(sink(), [*images, tmp_path / "absent.png"], captions=["One.", "Two."])
    with tarfile.open(tmp_path / "shards" / "000000.tar") as shard:
        content = {m.name: shard.extractfile(m).read() for m in shard}
    assert [*content] == [f"00000000{i}{kind}" for i in range(3) for kind in (".png", ".txt", ".json")]
    assert Image.open(io.BytesIO(content["000000002.png"])).getpixel((0, 0)) == (2, 2, 2)
    assert content["000000000.txt"] == b"Picture a." and content["000000002.txt"] == b"One.\nTwo."
    assert json.loads(content["000000002.json"])["id"] == str(images[2])
    assert json.loads((tmp_path / "shards.errors.jsonl").read_text())["kind"] == "missing"
    with pytest.raises(SinkError, match="holds captions of model m"):
        sink("other")
    (tmp_path / "shards.old").mkdir()
    fill(sink("other", resume=False), [])
    assert (tmp_path / "shards.old2" / "000000.tar").exists() and (tmp_path / "shards.old").exists()
    (tmp_path / "shards" / "000000.tar").write_bytes(b"something else" * 100)
    with pytest.raises(SinkError, match="no sample of a run"):
        sink()


def test_a_sample_is_named_by_what_it_holds():
    """Whatever an id ends in: a tar member's name is short, and no other member has it."""
    for name, ending in {"a.JPG": ".jpg", "a.json": ".jpg", "http://b/a.png?" + "x" * 200: ".jpg"}.items():
        with tarfile.open(
            fileobj=io.BytesIO(sample("0", b"\xff\xd8\xff pixels", {"id": name, "caption": "A."}))
        ) as shard:
            assert shard.getnames() == [f"0{ending}", "0.txt", "0.json"]


def test_an_image_folder_is_read_by_datasets(images, tmp_path):
    """metadata.jsonl among the images, and no other file that a reader would take for data."""
    output = images[0].parent / "metadata.jsonl"
    (images[0].parent / "deep").mkdir()
    deep = images[1].rename(images[0].parent / "deep" / "b.png")
    outside = tmp_path / "elsewhere.png"
    outside.write_bytes(images[0].read_bytes())
    fill(sink_class("imagefolder")(output, "m"), [images[0], deep, outside])
    fill(sink_class("imagefolder")(output, "m"), [images[0], deep, images[2], outside])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["file_name"]: row["text"] for row in rows} == {
        "a.png": "Picture a.", "deep/b.png": "Picture b.", "ü.png": "Picture ü.",
    }  # fmt: skip
    error = json.loads((images[0].parent / "metadata.errors.jsonl").read_text())
    assert error["id"] == str(outside) and error["kind"] == "format"
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    folder = str(output.parent)
    loaded = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert {row["text"]: row["image"].getpixel((0, 0)) for row in loaded} == {
        "Picture a.": (0, 0, 0), "Picture b.": (1, 1, 1), "Picture ü.": (2, 2, 2),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "builder"), [("jsonl", "json"), ("parquet", "parquet")])
def test_records_are_read_by_datasets(kind, builder, images, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    output = tmp_path / f"c.{kind}"
    fill(sink_class(kind)(output, "m"), images)
    files = [str(file) for file in sorted(output.glob("part-*"))] or str(output)
    expected = [(str(i), f"Picture {i.stem}.") for i in images]
    given: list[dict] = [{"data_files": files}] + [{"data_dir": str(output)}] * output.is_dir()
    for options in given:
        loaded = datasets.load_dataset(builder, **options, split="train", cache_dir=str(tmp_path / "cache"))
        assert [(row["id"], row["caption"]) for row in loaded] == expected


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_folder_of_an_earlier_version_goes_on(kind, images, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    output = tmp_path / "out"
    fill(sink_class(kind)(output, "m"), images[:2])
    (output / ".pending.jsonl").rename(output / "_pending.jsonl")
    sink = sink_class(kind)(output, "m")
    assert len(sink.finished) == 2 and not (output / "_pending.jsonl").exists()
    sink.close()


def test_the_json_of_sd_scripts(images, tmp_path):
    output = tmp_path / "meta.json"
    fill(sink_class("kohya")(output, "m"), images[:1])
    fill(sink_class("kohya")(output, "m"), images)
    content = json.loads(output.read_text())
    assert content == {str(image): {"caption": f"Picture {image.stem}."} for image in images}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SinkError, match=r"is there already, without its other\.records\.jsonl: choose another -o"):
        sink_class("kohya")(tmp_path / "other.json", "m")


def test_shards_are_read_by_webdataset(images, tmp_path):
    fill(sink_class("webdataset")(tmp_path / "shards", "m"), images)
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    found = list(webdataset.WebDataset(str(tmp_path / "shards" / "000000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["txt"] for sample in found] == [f"Picture {image.stem}." for image in images]
    assert [sample["png"].getpixel((0, 0)) for sample in found] == [(i, i, i) for i in range(3)]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_is_no_output_stays_as_it_is(kind, resume, images, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    before = {file: file.read_bytes() for file in images}
    with pytest.raises(SinkError, match="images is there already, and no output of a run: choose another -o"):
        sink_class(kind)(images[0].parent, "m", resume)
    assert {file: file.read_bytes() for file in images[0].parent.iterdir()} == before


def test_a_foreign_shard_among_ours_stays_as_it_is(images, tmp_path):
    fill(sink_class("webdataset")(tmp_path / "shards", "m"), images)
    foreign = tmp_path / "shards" / "000001.tar"
    with tarfile.open(foreign, "w") as shard:
        shard.add(images[0], "000000000.png")  # pictures alone: no record says where a sample ends
    before = foreign.read_bytes()
    with pytest.raises(SinkError, match="no sample of a run"):
        sink_class("webdataset")(tmp_path / "shards", "m")
    assert foreign.read_bytes() == before


def test_parquet(images, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import dataset

    fill(sink_class("parquet")(tmp_path / "c.parquet", "m"), images[:2])
    fill(sink_class("parquet")(tmp_path / "c.parquet", "m"), images, captions=["One.", "Two."])
    rows = dataset.dataset(tmp_path / "c.parquet").to_table().to_pylist()
    assert [r["id"] for r in rows] == [str(i) for i in images]
    assert [r["captions"] for r in rows] == [["Picture a."], ["Picture b."], ["One.", "Two."]]
    assert rows[0]["encode_seconds"] == 0.5 and rows[0]["llm_seconds"] == 1.5 and rows[0]["tokens"] == 3


@pytest.mark.parametrize("size", [0, -20])
def test_a_damaged_part_is_named_and_stays(images, tmp_path, size):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    fill(sink_class("parquet")(tmp_path / "c.parquet", "m"), images)
    part = tmp_path / "c.parquet" / "part-00000.parquet"
    part.write_bytes(content := part.read_bytes()[:size])
    with pytest.raises(SinkError, match=r"part-00000\.parquet is not a complete Parquet file: move it away"):
        sink_class("parquet")(tmp_path / "c.parquet", "m")
    assert part.read_bytes() == content


def test_parquet_refuses_a_name_that_is_no_utf8(images, tmp_path):
    """In a part there is no way to say it, and a record that waits for a part would stop every later run."""
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    for _ in range(2):
        fill(sink_class("parquet")(tmp_path / "c.parquet", "m"), [Path(os.fsdecode(b"caf\xe9.png")), *images])
    error = json.loads((tmp_path / "c.errors.jsonl").read_text())
    assert os.fsencode(error["id"]) == b"caf\xe9.png" and error["kind"] == "name"
    assert (tmp_path / "c.parquet" / "part-00000.parquet").exists()


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SinkError, match="needs pyarrow: python -m pip install pyarrow"):
        sink_class("parquet")


@pytest.mark.parametrize("kind", ["jsonl", "txt", "coco", "parts", "parquet", "webdataset"])
def test_killed_at_any_moment(kind, tmp_path):
    """50 kills at random moments; then every image is there once, as a caption or as an error."""
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow; `parts` tests the same mechanism without it")
    folder, output = tmp_path / "images", tmp_path / ("shards" if kind == "webdataset" else "out.json")
    output = tmp_path / "out.jsonl" if kind in ("jsonl", "txt") else output
    folder.mkdir()
    count = 4000
    for i in range(count):
        (folder / f"{i:04}.png").write_bytes(b"pixels %d" % i)
    command = [sys.executable, str(WRITER), kind, str(output), str(folder), str(KILLS), "7"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [int(n) for n in run.stdout.split()]
    assert len(set(found)) > 5 and found[-1] < count, f"the kills came too early or too late: {found}"
    errors = [json.loads(line)["id"] for line in output.with_name(output.stem + ".errors.jsonl").open()]
    captions = READERS[kind](output, folder)
    assert Counter(errors + captions) == {str(folder / f"{i:04}.png"): 1 for i in range(count)}


def read_lines(output, _):
    return [json.loads(line)["id"] for line in output.open()]


def read_sidecars(output, folder):
    ids = read_lines(output, folder)
    assert all(sidecar(i).read_text() == f"Picture {Path(i).stem}.\n" for i in ids)
    assert len([*folder.glob("*.txt")]) == len(ids) and not [*folder.glob(".*")]
    return ids


def read_coco(output, _):
    content = json.loads(output.read_text())
    names = {i["id"]: i["file_name"] for i in content["images"]}
    assert all(a["caption"] == f"Picture {Path(names[a['image_id']]).stem}." for a in content["annotations"])
    return [names[a["image_id"]] for a in content["annotations"]]


def read_parts(output, _):
    assert (output / ".pending.jsonl").read_bytes() == b""
    return [r["id"] for part in sorted(output.glob("part-*.json")) for r in json.loads(part.read_text())]


def read_parquet(output, _):
    from pyarrow import dataset

    return dataset.dataset(output).to_table().column("id").to_pylist()


def read_shards(output, _):
    ids, names = [], []
    for shard in sorted(output.glob("*.tar")):
        with tarfile.open(shard) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar}
        names += content
        for name in (n for n in content if n.endswith(".json")):
            stem, made = Path(name).stem, json.loads(content[name])["id"]
            assert content[f"{stem}.png"] == Path(made).read_bytes()
            assert content[f"{stem}.txt"].decode() == f"Picture {Path(made).stem}."
            ids.append(made)
    assert len(names) == len(set(names)) == 3 * len(ids)
    return ids


READERS = {
    "jsonl": read_lines, "txt": read_sidecars, "coco": read_coco,
    "parts": read_parts, "parquet": read_parquet, "webdataset": read_shards,
}  # fmt: skip


@pytest.mark.parametrize("count", [0, 5, 5000, 5001, 5007])
def test_parts_of_the_input_are_disjoint_complete_and_even(count):
    items = [Item(f"photos/{i}.jpg", "x") for i in range(count)]
    parts = [[i.id for i in part_of(iter(items), part, 16)] for part in range(1, 17)]
    assert sorted(i for part in parts for i in part) == sorted(i.id for i in items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_formats_have_classes():
    assert FORMATS and all(issubclass(sink_class(f), sink_class("jsonl")) for f in FORMATS if f != "parquet")
