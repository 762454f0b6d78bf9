"""Training data on S3 and GCS, read through their clients from emulators: the right rows, and few bytes beside them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from benchmarks.clouds import CLIENTS, INSTALL, emulator, missing
from vlv.data.loader import Order
from vlv.data.sources import open_sources

ROWS = 40


@pytest.fixture(params=CLIENTS)
def cloud(request, tmp_path, monkeypatch):
    if missing(request.param):
        pytest.skip(INSTALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with emulator(request.param) as cloud:
        yield cloud


def test_an_epoch_of_tars_and_parquet_fetches_its_images_once(cloud):
    """At most 1.1 and 1.5 times their bytes, indexing and HTTP's headers included; the next start indexes nothing."""
    pyarrow = pytest.importorskip("pyarrow")
    import fsspec
    from pyarrow import parquet

    noise = np.random.default_rng(0)
    images = [noise.bytes(50_000) for _ in range(ROWS)]
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer:
        for i, image in enumerate(images):
            for name, content in ((f"{i:03}.jpg", image), (f"{i:03}.txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
    columns = {"image": images, "caption": [f"caption {i}" for i in range(ROWS)]}
    parquet.write_table(pyarrow.table(columns), table, row_group_size=10, compression="none")
    for name, content, limit in (("a.tar", tar, 1.1), ("a.parquet", table, 1.5)):
        url = f"{cloud.bucket}/{name}"
        with fsspec.open(url, "wb") as file:
            file.write(content.getvalue())
        cloud.take()
        source = open_sources([url])
        order = Order(source.rows, 0, source.window)
        places = [order(i) for i in range(ROWS)]
        samples = [sample for i in range(0, ROWS, 8) for sample in source.read_many(places[i : i + 8])]
        assert sorted((s.image, s.caption) for s in samples) == sorted(
            (image, f"caption {i}") for i, image in enumerate(images)
        )
        assert sum(map(len, images)) < cloud.take()["bytes"] <= limit * sum(map(len, images)), name
        open_sources([url])
        assert cloud.take()["bytes"] < 100_000


def test_captioning_and_training_read_the_same_from_a_folder(cloud):
    """Objects, a tar and Parquet below one prefix, by prefix, pattern and numbered names."""
    pyarrow = pytest.importorskip("pyarrow")
    import fsspec
    from pyarrow import parquet

    from serve.core.inputs import LeftOut, expand

    noise = np.random.default_rng(0)
    images = {f"{i}.png": noise.bytes(2000) for i in range(9)}
    table, names = io.BytesIO(), list(images)
    parquet.write_table(pyarrow.table({"image": [images[name] for name in names[6:]]}), table)
    files = {f"pics/{name}": images[name] for name in names[:3]} | {"pics/notes.md": b"no image"}
    files |= {"sets/rows.parquet": table.getvalue()}
    for number in range(2):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as writer:
            for name in names[3 + number : 6 : 2]:
                info = tarfile.TarInfo(name)
                info.size = len(images[name])
                writer.addfile(info, io.BytesIO(images[name]))
        files[f"sets/s-{number}.tar"] = tar.getvalue()
    for name, content in files.items():
        with fsspec.open(f"{cloud.bucket}/{name}", "wb") as file:
            file.write(content)
    expected = {"pics": names[:3], "sets": names[3:], "sets/s-*.tar": names[3:6], "sets/s-{0..1}.tar": names[3:6]}
    for path, inside in expected.items():
        url, content = f"{cloud.bucket}/{path}", sorted(images[name] for name in inside)
        source = open_sources([url])
        rows = [source.read(shard, row).image for shard, count in enumerate(source.rows) for row in range(count)]
        left_out = LeftOut()
        items = list(expand([url], left_out))
        assert sorted(rows) == sorted(item.read() for item in items) == content, path
        assert all(item.id.startswith(f"{cloud.bucket}/") for item in items)
        assert left_out.others == ({".md": 1} if path == "pics" else {})
    with pytest.raises(ValueError, match=r"no such file or folder: .*/none\.tar"):
        open_sources([f"{cloud.bucket}/none.tar"])
