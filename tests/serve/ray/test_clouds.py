"""Sources and outputs of serve.ray_batch on S3 and GCS, by their clients, against emulators on this machine."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from pyarrow import Table, parquet

from serve.core.inputs import expand
from serve.ray.store import Store, plan, unit_items
from vlv.data.image import ImageError

CLOUDS = {
    "s3": ("s3fs", "moto", ["moto_server", "-p"]),
    "gs": ("gcsfs", "gcp_storage_emulator", ["gcp-storage-emulator", "start", "--in-memory", "--port"]),
}


@pytest.fixture(params=CLOUDS)
def bucket(request, monkeypatch) -> str:
    """The URL of an empty bucket."""
    import fsspec

    client, emulator, command = CLOUDS[request.param]
    if not (find_spec(client) and find_spec(emulator)):
        pytest.skip('pip install s3fs "moto[server]" gcsfs gcp-storage-emulator')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url, "FSSPEC_S3_ENDPOINT_URL": url, "STORAGE_EMULATOR_HOST": url,
        "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GS_PROJECT": "test", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)
    program = Path(sys.executable).with_name(command[0])
    process = subprocess.Popen([program, *command[1:], str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not answers(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        fsspec.core.url_to_fs(f"{request.param}://vlv-test/x")[0].mkdir("vlv-test")
        yield f"{request.param}://vlv-test"
    finally:
        process.terminate()
        process.wait()
        for name in ("s3", "gs"):
            fsspec.config.conf.pop(name, None)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


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
