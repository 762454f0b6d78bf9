"""Sources and outputs of serve.ray_batch on S3 and GCS, by their clients, against emulators on this machine."""

from __future__ import annotations

import io
import tarfile

import pytest
from pyarrow import Table, parquet

from benchmarks.clouds import CLIENTS, INSTALL, emulator, missing
from serve.core.inputs import expand
from serve.ray.store import Store, plan, unit_items
from vlv.data.image import ImageError


@pytest.fixture(params=CLIENTS)
def bucket(request) -> str:
    """The URL of an empty bucket."""
    if missing(request.param):
        pytest.skip(INSTALL)
    with emulator(request.param) as cloud:
        yield cloud.bucket


def test_folders_shards_lists_and_the_output(bucket, pictures):
    import fsspec

    fs, _ = fsspec.core.url_to_fs(bucket)
    first, second = ((pictures / name).read_bytes() for name in ("00.png", "01.png"))
    shard, listed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        tar.add(pictures / "00.png", "a.png")
        tar.add(pictures / "01.png", "b.png")
    parquet.write_table(Table.from_pydict({"url": [f"{bucket}/photos/one.png", f"{bucket}/gone.png"]}), listed)
    files = {
        "photos/one.png": first,
        "photos/two.png": second,
        "c.tar": shard.getvalue(),
        "l.parquet": listed.getvalue(),
    }
    fs.pipe({f"vlv-test/{name}": content for name, content in files.items()})

    assert [i.read() for i in expand([f"{bucket}/photos", f"{bucket}/c.tar"], column="url")] == [first, second] * 2
    there, gone = expand([f"{bucket}/l.parquet"], column="url")
    assert there.read() == first
    with pytest.raises(ImageError, match="there is no such file"):
        gone.read()

    store = Store(f"{bucket}/out")
    assert store.names(".parquet") == set()
    assert plan(store, expand([f"{bucket}/photos", f"{bucket}/c.tar"], column="url"), {"model": "a"}, 3) == 2
    assert [len(unit_items(store, unit)) for unit in range(2)] == [3, 1]
    store.write("part-000000.parquet", b"x")
    store.write("errors/part-000000.parquet", b"y")
    again = Store(f"{bucket}/out")  # as after a kill
    assert again.names(".parquet") == {"part-000000.parquet"} and again.read("errors/part-000000.parquet") == b"y"
    assert plan(again, iter([]), {"model": "a"}, 3) == 2
