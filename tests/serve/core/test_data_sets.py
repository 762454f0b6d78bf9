"""Data sets in the forms that trainers and hubs use, read for captioning and for training with the same content."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from serve.core.inputs import LeftOut, SourceError, expand
from tests.serve.core.test_remote import tar
from vlv.data.image import ImageError, load_crop
from vlv.data.sources import open_sources

COMPRESSORS = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path / "data"


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [png(shade) for shade in range(7)]


def contents(*paths: str, **options) -> dict[str, bytes]:
    """Return images by their ids, read after a journey to another process."""
    return {item.id: item.read() for item in pickle.loads(pickle.dumps(list(expand(paths, **options))))}


def trained(*paths: str) -> list[bytes]:
    source = open_sources(paths)
    return [source.read(shard, row).image for shard, rows in enumerate(source.rows) for row in range(rows)]


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_shards(ending, here):
    plain = tar({f"{i}.png": image for i, image in enumerate(IMAGES)})
    (here / f"s{ending}").write_bytes(COMPRESSORS[ending](plain))
    assert contents(f"s{ending}") == {f"s{ending}/{i}.png": image for i, image in enumerate(IMAGES)}
    assert contents(".") == contents(f"s{ending}") and trained(f"s{ending}") == IMAGES
    items = list(expand([f"s{ending}"]))
    assert len({item.key for item in items}) == len(IMAGES) and items[0].path == str(here / f"s{ending}")
    for kept in (here.parent / "cache" / "vlv" / "plain").glob("*.tar"):  # as when there is no more room for it
        kept.unlink()
    assert items[3].read() == IMAGES[3]
    (here / f"s{ending}").write_bytes(COMPRESSORS[ending](plain)[:-40])
    (broken,) = expand([f"s{ending}"])
    with pytest.raises(ImageError, match=r"cannot be read to its end: .* cannot be decompressed to its end"):
        broken.read()


def test_numbered_shards_for_both(here):
    for i, image in enumerate(IMAGES):
        (here / f"s-{i:05}.tar").write_bytes(tar({"0.png": image}))
    pattern = "s-{00001..00003}.tar"
    assert [*contents(pattern).values()] == trained(pattern) == IMAGES[1:4]


def test_parquet_of_other_columns(here):
    """A struct without bytes names a file, as in the `datasets` library; lists are refused by name."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (here / "x.png").write_bytes(IMAGES[0])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = pa.array([{"bytes": IMAGES[1], "path": "x.png"}, {"bytes": None, "path": "x.png"}], kind)
    parquet.write_table(pa.table({"image": structs}), "paths.parquet")
    assert list(contents("paths.parquet").values()) == [IMAGES[1], IMAGES[0]] == trained("paths.parquet")
    parquet.write_table(pa.table({"image": pa.array([IMAGES[:2]], pa.list_(pa.binary()))}), "lists.parquet")
    with pytest.raises(SourceError, match=r"lists\.parquet: expected image files .* got list<"):
        list(expand(["lists.parquet"]))
    with pytest.raises(ValueError, match="holds a list, and an image file's content"):
        trained("lists.parquet")


def test_parquet_with_images(here):
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(IMAGES)]
    parquet.write_table(pa.table({"image": structs, "text": ["a"] * 7}), "train.parquet", row_group_size=3)
    ids = [f"train.parquet/{i}" for i in range(7)]
    assert contents("train.parquet") == dict(zip(ids, IMAGES, strict=True)) and trained("train.parquet") == IMAGES
    assert [*contents("./train.parquet", "*.parquet")] == ids and [*contents(".")] == ids
    keys = {item.key for path in ("train.parquet", "../data/train.parquet", ".") for item in expand([path])}
    assert keys == {f"{here}/train.parquet/{i}" for i in range(7)}
    # a column of bytes under another name, null in one row; and a column of paths
    parquet.write_table(pa.table({"photo": [IMAGES[0], None], "url": ["x.png", "y.png"]}), "other.parquet")
    assert [*expand(["other.parquet"])][1].id == "y.png"
    first, second = expand(["other.parquet"], column="photo")
    assert first.read() == IMAGES[0] and second.read() == b""
    # the captions that --format parquet writes are no images, and damage is named
    parquet.write_table(pa.table({"id": ["a"], "caption": ["b"]}), "captions.parquet")
    left_out = LeftOut()
    assert len([*expand([".", "t*.parquet"], left_out)]) == 7 + 7
    assert left_out.others == {".parquet": 2}  # also that of paths: nobody has named it
    Path("train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"train\.parquet cannot be read: ArrowInvalid"):
        expand(["train.parquet"])


def test_parquet_behind_a_url():
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pa.table({"image": IMAGES}), stream)
    fsspec.filesystem("memory").pipe("/user/name/data/train-0.parquet", stream.getvalue())
    for path in ("memory://user/name", "memory://user/name/data/*.parquet", "memory://user/name/data/train-0.parquet"):
        assert [*contents(path).values()] == IMAGES


def test_a_folder_of_the_datasets_library(here):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    stored = [{"bytes": image, "path": None} for image in IMAGES]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": stored}, features=features).save_to_disk("saved")
    assert contents("saved") == {f"saved/{i}": image for i, image in enumerate(IMAGES)}
    assert contents(f"hf:{here}/saved") == {f"hf:{here}/saved/{i}": image for i, image in enumerate(IMAGES)}
    assert trained("saved") == IMAGES
    with pytest.raises(SourceError, match=r"saved has the columns \['image'\], none of photo"):
        expand(["saved"], column="photo")
    (here / "empty").mkdir()
    with pytest.raises(SourceError, match=r"hf:.*empty cannot be opened: FileNotFoundError"):
        expand([f"hf:{here}/empty"])


def test_a_data_set_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(SourceError, match="hf:user/name needs a package that is not installed: pip install datasets"):
        expand(["hf:user/name"])


def test_metadata_of_an_image_folder_and_csv_train_as_well(here):
    rows = [{"file_name": f"{i}.png", "text": f"Image {i}."} for i in range(3)]
    for i in range(3):
        (here / f"{i}.png").write_bytes(IMAGES[i])
    Path("metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    Path("metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,Image {i}.\n" for i in range(3)))
    for table in ("metadata.jsonl", "metadata.csv"):
        source = open_sources([table])
        assert [source.read(0, i).caption for i in range(3)] == ["Image 0.", "Image 1.", "Image 2."]
        assert trained(table) == [*contents(table).values()] == IMAGES[:3]


def test_a_table_behind_a_url_names_its_neighbours():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/folder/a.png": IMAGES[1], "/folder/metadata.jsonl": b'{"file_name": "a.png"}\n'})
    assert contents("memory://folder/metadata.jsonl") == {"memory://folder/a.png": IMAGES[1]}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"\xff\xd8\xff\xd9" * 9}])
def test_the_intact_part_of_a_truncated_jpeg(options, here):
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    full = stream.getvalue()
    complete = load_crop(full, 128).astype(int)
    for share in (0.6, 0.9, 1):
        Path("cut.jpg").write_bytes(full[: int(share * len(full))])
        (strict,) = expand(["cut.jpg"])
        (lenient,) = expand(["cut.jpg"], lenient=True)
        if share < 1:
            with pytest.raises(ImageError, match="damaged or truncated"):
                load_crop(strict.read(), 128)
            if not options.get("progressive"):  # its first rows of pixels are exact, the others are there in part
                assert np.array_equal(load_crop(lenient.read(), 128)[:, :40], complete[:, :40])
            else:
                found = np.abs(load_crop(lenient.read(), 128) - complete)
                assert found.mean() < np.abs(128 - complete).mean() - 5  # nearer than grey
        else:
            assert lenient.read() == strict.read() == full
    Path("cut.jpg").write_bytes(full[:200])  # nothing of its pixels
    (lenient,) = expand(["cut.jpg"], lenient=True)
    with pytest.raises(ImageError):
        load_crop(lenient.read(), 128)
