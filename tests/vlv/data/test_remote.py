"""Data behind a server: what is fetched is what is read, a row group once; and what a server does wrong."""

from __future__ import annotations

import io
import itertools
import tarfile

import pytest

from benchmarks.data_reading import Server
from serve.core.inputs import Item
from tests.vlv.train.small_run import MODEL
from vlv.data import parquet, remote, tars
from vlv.data.image import ImageError
from vlv.data.loader import Order, TrainingImages, batches
from vlv.data.remote import MAX_GAP, DataError, Range, ServerError, read_ranges
from vlv.data.sources import open_sources

pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


@pytest.fixture
def served(tmp_path):
    """A served folder: (server, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    yield server, folder
    server.http.shutdown()


def tar_of(file, rows):
    with tarfile.open(file, "w") as tar:
        for name, content in rows:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_ranges_are_exact_and_neighbours_one_request(served):
    server, folder = served
    content = bytes(range(256)) * 100
    (folder / "a").write_bytes(content)
    url = f"{server.url}/a"
    asked = [Range(url, 100, 50), Range(url, 10_000, 20), Range(url, 160 + MAX_GAP, 10), Range(url, 150, 10)]
    assert read_ranges(asked) == [content[r.offset : r.offset + r.length] for r in asked]
    assert server.take() == {"requests": 2, "bytes": (160 + MAX_GAP + 10 - 100) + 20}
    assert read_ranges([Range(url)]) == [content] and read_ranges([Range(url, 25_590, 50, up_to=True)]) == [
        content[-10:]
    ]
    (short,) = read_ranges([Range(url, 25_590, 50)])
    assert isinstance(short, OSError) and "ends after 10 of 50 bytes at 25590" in str(short)
    (missing,) = read_ranges([Range(f"{server.url}/b")])
    assert isinstance(missing, FileNotFoundError)


def test_a_tar_is_indexed_once_by_its_headers_and_read_row_by_row(served):
    server, folder = served
    rows = [(f"{i:02}", bytes([i]) * 30_000, f"caption {i}".encode()) for i in range(10)]
    tar_of(folder / "x.tar", [part for n, image, text in rows for part in ((f"{n}.jpg", image), (f"{n}.txt", text))])
    source = open_sources([f"{server.url}/x.tar"])
    indexing = server.take()
    assert indexing["bytes"] <= 11 * tars.BLOCK and indexing["requests"] <= 11 + 4  # with a few questions of its size
    assert [(s.image, s.caption) for s in source.read_many([(0, i) for i in range(10)])] == [
        (image, text.decode()) for _, image, text in rows
    ]
    fetched = server.take()["bytes"] / sum(len(image) + len(text) for _, image, text in rows)
    assert 1 <= fetched < 1.06
    source.read_many([(0, 3)], texts=False)
    assert server.take() == {"requests": 1, "bytes": 30_000}
    open_sources([f"{server.url}/x.tar"])
    assert server.take()["bytes"] == 0  # the index is kept


def test_a_row_group_is_read_once_for_all_processes(served):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    server, folder = served
    images = [bytes([i]) * 5_000 + bytes(str(i), "ascii") for i in range(60)]
    table = pyarrow.table({"image": images, "caption": [str(i) for i in range(60)], "unread": [bytes(9_000)] * 60})
    writer.write_table(table, folder / "x.parquet", row_group_size=10, compression="none", use_dictionary=False)
    sources = [open_sources([f"{server.url}/x.parquet"]) for _ in range(2)]
    assert server.take()["bytes"] <= 2 * parquet.FOOTER
    order = Order(sources[0].rows, 0, sources[0].window)
    places = [order(i) for i in range(60)]
    found = [sources[i % 2].read(*place) for i, place in enumerate(places)]
    assert sorted(s.image for s in found) == sorted(images)
    assert server.take()["bytes"] <= 1.05 * sum(map(len, images))
    sources[0].read_many(places, head=0)
    assert server.take()["bytes"] < 20_000  # captions without images


def test_row_groups_on_the_disk_stay_below_their_limit(served, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    server, folder = served
    monkeypatch.setattr(parquet, "KEPT_BYTES", 200_000)
    table = pyarrow.table({"image": [bytes([i]) * 5_000 for i in range(60)]})
    writer.write_table(table, folder / "x.parquet", row_group_size=10)
    source = open_sources([f"{server.url}/x.parquet"])
    assert 10 <= source.window <= 14  # a third of the limit
    assert len({source.read(shard, 0).image for shard in range(6)}) == 6
    kept = [file.stat().st_size for file in (folder.parent / "cache").rglob("*.arrow")]
    assert 100_000 < sum(kept) <= 200_000


def test_a_server_that_fails_for_a_moment_and_one_that_stays_away(served):
    server, folder = served
    (folder / "a").write_bytes(b"content")
    server.failing = 2
    assert read_ranges([Range(f"{server.url}/a", 1, 3)]) == [b"ont"]
    server.failing = 100
    with pytest.raises(ServerError, match=r"/a could not be read in 4 attempts \(.*503.*\): the same command goes on"):
        read_ranges([Range(f"{server.url}/a", 1, 3)])


def test_a_server_that_stays_away_ends_the_run_and_skips_no_row(served, captioned):
    server, folder = served
    for file in captioned.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    lines = folder / "x.jsonl"
    lines.write_text("".join(f'{{"path": "{server.url}/{file.name}"}}\n' for file in folder.glob("*.png")))
    feed = batches(TrainingImages(open_sources([str(lines)]), MODEL.image_size), 4)
    assert len(next(feed)["id"]) == 4
    server.failing = 1000
    with pytest.raises(DataError, match="could not be read in 4 attempts"):
        next(feed)


def test_a_server_without_ranges_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    server = Server(tmp_path, ranges=False)
    with pytest.raises(DataError, match="does not serve ranges: write simplecache::"):
        read_ranges([Range(f"{server.url}/a", 10, 20)])
    assert read_ranges([Range(f"simplecache::{server.url}/a", 10, 20)]) == [bytes(20)]
    with pytest.raises(ImageError, match=f"cannot be read: the server of {server.url}/a does not serve ranges"):
        Item("a", f"{server.url}/a", 10, 20).read()
    with pytest.raises(DataError, match=f"no such file or folder: {server.url}/b.csv"):
        open_sources([f"{server.url}/b.csv"])
    server.http.shutdown()


@pytest.mark.parametrize("window", [500, 2000])
def test_neighbours_of_a_shard_are_far_apart(window):
    """Of 10,000 rows no more than a few follow one another as in their shard; each comes once an epoch."""
    order = Order([100] * 100, seed=0, group=window)
    places = [order(i) for i in range(10_000)]
    assert len(set(places)) == 10_000
    longest = run = 1
    for (shard, row), (next_shard, next_row) in itertools.pairwise(places):
        run = run + 1 if (next_shard, next_row) == (shard, row + 1) else 1
        longest = max(longest, run)
    assert longest <= 3
