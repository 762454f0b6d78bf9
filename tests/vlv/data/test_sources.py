"""Training data of every kind, read in an order that any position, process and worker agrees on."""

import io
import json
import pickle
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vlv.train.small_run import MODEL
from vlv.data.loader import MicroBatches, Order, TrainingImages, batches
from vlv.data.remote import DataError
from vlv.data.selection import Limits, select
from vlv.data.sources import open_sources


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rows(captioned):
    """(name, image, caption) of every scene of the folder."""
    return [(f.stem, f.read_bytes(), f.with_suffix(".txt").read_text()) for f in sorted(captioned.glob("*.png"))]


def write_tar(stream, rows, kind="txt"):
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, image, caption in rows:
            text = caption if kind == "txt" else json.dumps({"caption": caption, "license": "CC0", "pwatermark": 0.25})
            for suffix, content in (("png", image), (kind, text.encode())):
                info = tarfile.TarInfo(f"part/{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def everything(source):
    for shard, count in enumerate(source.rows):
        for row in range(count):
            assert source.name(shard, row) in (None, source.read(shard, row).id)
    return [source.read(s, r) for s, count in enumerate(source.rows) for r in range(count)]


def same(samples, rows):
    assert [(s.image, s.caption) for s in samples] == [(image, caption) for _, image, caption in rows]


def test_a_folder_and_the_texts_beside_its_images(captioned, rows):
    same(everything(open_sources([str(captioned)])), rows)


def test_tars_and_their_index(rows, tmp_path, monkeypatch):
    with (tmp_path / "a.tar").open("wb") as stream:
        write_tar(stream, rows[:7])
    with (tmp_path / "b.tar").open("wb") as stream:
        write_tar(stream, rows[7:], "json")
    source = open_sources([str(tmp_path)])
    assert source.rows == [7, 5]
    same(everything(source), rows)
    assert source.read(1, 0).about == {"license": "CC0", "pwatermark": 0.25}
    monkeypatch.setattr("vlv.data.tars._scan", lambda file: pytest.fail("it has an index already"))
    same(everything(open_sources([str(tmp_path / "*.tar")])), rows)


@pytest.mark.parametrize("damaged", [b"no tar" * 200, None])
def test_a_broken_tar_is_named(rows, tmp_path, damaged):
    if damaged is None:  # its second header
        tar_of(tmp_path / "a.tar", [("1.txt", b"a"), ("1.png", rows[0][1])])
        damaged = (tmp_path / "a.tar").read_bytes().replace(b"1.png", b"2.png")
    (tmp_path / "a.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.tar is no complete tar file"):
        open_sources([str(tmp_path)])


def test_parquet_by_row_groups_and_in_another_process(rows, tmp_path):
    pyarrow, parquet = (pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet"))
    columns = {
        "image": [{"bytes": image, "path": None} for _, image, _ in rows], "text": [caption for *_, caption in rows],
        "license": ["CC0"] * len(rows), "id": [name for name, *_ in rows],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=5)
    source = pickle.loads(pickle.dumps(open_sources([str(tmp_path / "a.parquet")])))
    assert source.rows == [5, 5, 2]
    same(everything(source), rows)
    assert source.read(1, 0).id == "05" and source.read(1, 0).about == {"license": "CC0"}


def test_json_lines_as_distill_and_the_captioner_write_them(captioned, rows, tmp_path):
    lines = [{"id": f"scene {n}", "path": str(captioned / f"{n}.png"), "caption": c, "url": "u"} for n, _, c in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = everything(open_sources([str(tmp_path / "data.jsonl")]))
    same(samples, rows)
    assert samples[3].id == "scene 03" and samples[3].about == {"url": "u"}


def test_ids_that_are_numbers(captioned, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"id": 1, "path": str(captioned / "00.png")}) + "\n")
    assert open_sources([str(file)]).read(0, 0).id == "1"
    file.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: expected a JSON object with a path, or an id that is"):
        open_sources([str(file)])


def test_several_captions_in_one_row_are_refused(captioned, tmp_path):
    line = {"path": str(captioned / "00.png"), "caption": ["a cat", "a bus"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    source = open_sources([str(tmp_path / "data.jsonl")])
    with pytest.raises(ValueError, match="its caption is a list, expected a text"):
        TrainingImages(source, MODEL.image_size, limits=Limits(captions=True))[0]
    assert TrainingImages(source, MODEL.image_size)[0]["pixels"].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="no row can be used: 0 of 1 rows are used; left out: 1 without a caption"):
        select(source, Limits(captions=True))


def test_urls_that_fsspec_opens(rows):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for name, image, caption in rows[:4]:
        fs.pipe({f"/shots/{name}.png": image, f"/shots/{name}.txt": caption.encode()})
    with fs.open("/shards/a.tar", "wb") as stream:
        write_tar(stream, rows[4:])
    same(everything(open_sources(["memory://shots"])), rows[:4])
    same(everything(open_sources(["memory://shards/*.tar"])), rows[4:])


def test_several_kinds_as_one(captioned, rows, tmp_path):
    with (tmp_path / "a.tar").open("wb") as stream:
        write_tar(stream, rows[:7])
    same(everything(open_sources([str(tmp_path / "a.tar"), str(captioned)])), rows[:7] + rows)


def test_what_leads_to_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"")
    for path, words in {"absent": "no such file", "empty": "no rows in", "x.zip": "expected a folder, .tar"}.items():
        with pytest.raises(ValueError, match=words):
            open_sources([str(tmp_path / path)])
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a JSON object"):
        open_sources([str(tmp_path / "a.jsonl")])


def test_a_folder_of_the_datasets_library(captioned, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    files = sorted(captioned.glob("*.png"))[:3]
    table = datasets.Dataset.from_dict({"image": [str(f) for f in files], "text": ["a", "b", "c"]})
    table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    for name in (str(tmp_path / "saved"), f"hf:{tmp_path / 'saved'}"):
        source = open_sources([name])
        assert source.rows == [3] and source.read(0, 1).caption == "b"
        assert source.read(0, 1).image == files[1].read_bytes()  # the file itself: nothing is decoded here


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:someone/pictures needs a package that is not installed: pip install data"):
        open_sources(["hf:someone/pictures"])


@pytest.mark.parametrize("group", [1, 10, 25, 1000])
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(group):
    counts = [7, 0, 12, 1, 30, 5]
    order = Order(counts, seed=3, group=group)
    epochs = [[order(e * 55 + i) for i in range(55)] for e in range(2)]
    every = [(s, r) for s, n in enumerate(counts) for r in range(n)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == every
    assert epochs[0] != epochs[1] != every
    assert Order(counts, 3, group)(60) == epochs[1][5]  # asked for at once, as a resumed run does
    assert [Order(counts, 4, group)(i) for i in range(55)] != epochs[0]


def test_few_shards_are_open_at_a_time():
    order = Order([100] * 50, seed=0, group=300)
    shards = [order(i)[0] for i in range(5000)]
    assert max(len(set(shards[i : i + 300])) for i in range(0, 5000, 300)) <= 6 and len(set(shards[:300])) >= 3


def test_processes_share_a_step_without_overlap():
    streams = [iter(MicroBatches(40, 4, rank, 3)) for rank in range(3)]
    taken = [i for _ in range(2) for s in streams for i in next(s)]
    assert taken == list(range(40, 64))


def test_workers_and_a_later_start_give_the_same_batches(captioned):
    images = TrainingImages(open_sources([str(captioned)]), MODEL.image_size, limits=Limits(captions=True))
    plain = batches(images, 2)
    first = [next(plain) for _ in range(8)]
    worked = batches(images, 2, position=6, workers=2)
    for expected in first[3:]:
        found = next(worked)
        assert found["position"] == expected["position"] and found["id"] == expected["id"]
        assert torch.equal(found["pixels"], expected["pixels"]) and found["caption"] == expected["caption"]
    worked.close()


def test_an_image_that_gives_nothing_is_replaced_and_told_of(captioned, tmp_path):
    folder = shutil.copytree(captioned, tmp_path / "some")
    (folder / "03.png").write_bytes(b"broken")
    (folder / "05.txt").unlink()
    source, limits = open_sources([str(folder)]), Limits(captions=True)
    selection = select(source, limits)
    assert str(selection) == "11 of 12 rows are used; left out: 1 without a caption"
    images = TrainingImages(source, MODEL.image_size, limits=limits, selection=selection)
    found = [images[i] for i in range(11)]
    names = sorted(s["id"][-6:] for s in found)
    assert "03.png" not in names and "05.png" not in names and len(set(names)) == 10
    (replaced,) = [s for s in found if s["replaced"]]
    assert [(id[-6:], "not recognised as an image" in reason) for id, reason in replaced["skipped"]] == [
        ("03.png", True)
    ]
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"33 rows drawn at random give no training image; the last, .*the file is emp"
    ):
        images[0]


def test_limits_on_size_and_shape(tmp_path):
    """Rows that are left out are in no epoch, and the choice is kept until a file changes."""
    for name, size in {"a": (64, 64), "b": (200, 64), "c": (40, 40)}.items():
        Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no image")
    limits, source = Limits(min_side=50, max_aspect=2.0), open_sources([str(tmp_path)])
    selection = select(source, limits)
    images = TrainingImages(source, 32, limits=limits, selection=selection)
    assert {images[i]["id"][-5:] for i in range(3)} == {"a.png"}
    assert selection.left_out == {"too small or too long": 2, "that are no images": 1}
    assert [(id[-5:], reason[:17]) for id, reason in selection.bad] == [("d.png", "not recognised as")]
    assert select(source, limits).bad == selection.bad
    assert str(select(source, limits)) == str(selection) and len(list(tmp_path.rglob("rows/*.npz"))) == 1
    Image.fromarray(np.full((60, 60, 3), 99, np.uint8)).save(tmp_path / "c.png")
    assert [rows.tolist() for rows in select(open_sources([str(tmp_path)]), limits).rows] == [[0, 2]]


def test_a_header_behind_a_long_profile_is_found(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.jpg", icc_profile=bytes(200_000))
    assert select(open_sources([str(tmp_path)]), Limits(min_side=50)).left_out == {}


def test_a_stretch_of_bad_rows_trains_no_neighbour_often(captioned, tmp_path):
    """32 and more bad rows in a row: the epoch goes on, and the good ones are drawn about equally."""
    good = [f.read_bytes() for f in sorted(captioned.glob("*.png"))]
    for i in range(60):
        (tmp_path / f"{i:02}.png").write_bytes(good[i % 12] if i < 20 else b"broken")
    images = TrainingImages(open_sources([str(tmp_path)]), MODEL.image_size)
    drawn = Counter(images[i]["id"] for i in range(60))
    assert len(drawn) == 20 and sum(drawn.values()) == 60 and max(drawn.values()) <= 9


def test_an_error_in_a_worker_is_one_sentence(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        next(batches(TrainingImages(open_sources([str(tmp_path)]), 32), 2, workers=1))
    assert str(raised.value).startswith("33 rows drawn at random give no") and "Traceback" not in str(raised.value)


def tar_of(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(file)


def test_the_image_of_a_row_by_a_stated_order_of_endings(rows, tmp_path):
    (_, a, _), (_, b, _), (_, c, _) = rows[:3]
    members = [("1.mask.png", c), ("1.png", b), ("1.jpg", a), ("2.mask.png", c), ("2.png", b), ("3.mask.png", c)]
    file = tar_of(tmp_path / "x.tar", members)
    source = open_sources([file])
    assert [s.image for s in everything(source)] == [a, b]
    assert source.notes == [
        f"{file}: 1 rows have several images (the first: 1): the first of jpg jpeg png webp … counts; --image-key "
        "chooses another",
        f"{file}: 3 rows have images whose names go on after the first dot (the first: 1.mask.png): they are left "
        "alone; --image-key takes them",
    ]
    assert [s.image for s in everything(open_sources([file], "mask.png"))] == [c, c, c]
    assert [s.image for s in everything(open_sources([file], "png"))] == [b, b]


def test_a_name_twice_in_a_tar_counts_with_its_last_content(rows, tmp_path):
    (_, a, _), (_, b, _) = rows[:2]
    file = tar_of(tmp_path / "x.tar", [("1.png", a), ("1.txt", b"old"), ("2.png", a), ("1.png", b), ("1.txt", b"new")])
    assert [(s.image, s.caption) for s in everything(open_sources([file]))] == [(b, "new"), (a, None)]


def test_json_without_a_caption_falls_through_to_txt(rows, tmp_path):
    image = rows[0][1]
    beside = {"1.json": b'{"license": "CC0"}', "1.txt": b"a cat", "2.json": b'{"caption": "a bus"}', "2.txt": b"no"}
    file = tar_of(tmp_path / "x.tar", [("1.png", image), ("2.png", image), *beside.items()])
    (folder := tmp_path / "folder").mkdir()
    for name, content in {"1.png": image, "2.png": image, **beside}.items():
        (folder / name).write_bytes(content)
    for path in (file, str(folder)):
        samples = everything(open_sources([path]))
        assert [s.caption for s in samples] == ["a cat", "a bus"] and samples[0].about == {"license": "CC0"}


def test_texts_with_a_byte_order_mark_of_several_lines_or_another_encoding(rows, tmp_path):
    beside = {
        "1.txt": "\ufeffa cat".encode(),
        "2.json": '\ufeff{"caption": "a bus"}'.encode(),
        "3.txt": "Käfer".encode("latin1"),
        "4.txt": b"one\ntwo\n",
        "5.txt": b"first paragraph\n\nsecond\n",
    }
    for name, content in {**beside, **{f"{i}.png": rows[0][1] for i in range(1, 6)}}.items():
        (tmp_path / name).write_bytes(content)
    samples = everything(open_sources([str(tmp_path)]))
    assert [s.caption for s in samples] == ["a cat", "a bus", None, "one", "first paragraph\n\nsecond"]
    assert samples[2].problem.endswith("3.txt is not UTF-8") and samples[3].captions == ("one", "two")
    (tmp_path / "x.jsonl").write_text('\ufeff{"path": "1.png", "caption": "x"}\n', encoding="utf-8")
    assert open_sources([str(tmp_path / "x.jsonl")]).read(0, 0).caption == "x"


def test_one_of_several_captions_is_drawn_for_every_epoch(captioned, tmp_path):
    line = {"path": str(captioned / "00.png"), "caption": "a", "captions": ["a", "b", "c"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    images = TrainingImages(open_sources([str(tmp_path / "x.jsonl")]), 32, limits=Limits(captions=True))
    drawn = [images[epoch]["caption"] for epoch in range(30)]
    assert set(drawn) == {"a", "b", "c"} and drawn == [images[epoch]["caption"] for epoch in range(30)]


def test_captions_of_a_tars_members_train(rows, tmp_path):
    """The records that serve.vllm_caption writes for a tar: `path` is the tar, `id` ends with the member's name."""
    file = tar_of(tmp_path / "x.tar", [(f"part/{name}.png", image) for name, image, _ in rows[:3]])
    lines = [{"id": f"data/x.tar/part/{name}.png", "path": file, "caption": caption} for name, _, caption in rows[:3]]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same(everything(open_sources([str(tmp_path / "captions.jsonl")])), rows[:3])
    (tmp_path / "captions.jsonl").write_text(json.dumps(lines[0] | {"id": "x.tar/none.png"}) + "\n")
    with pytest.raises(DataError, match=r"line 1: expected an id that ends with the name of a member of .*x\.tar, got"):
        open_sources([str(tmp_path / "captions.jsonl")])


def test_several_captions_of_a_text_file_as_the_captioner_writes_them(rows, tmp_path):
    from serve.outputs.text import lines

    record = {"caption": "a cat", "captions": ["a cat", "a cat\non a mat", "two", "three"]}
    (tmp_path / "1.png").write_bytes(rows[0][1])
    (tmp_path / "1.txt").write_text(lines(record))
    assert open_sources([str(tmp_path)]).read(0, 0).captions == ("a cat", "a cat on a mat", "two", "three")
