"""Images behind URLs, in tables and in numbered shards, as the commands take them."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading

import fsspec
import pytest

from serve.core.inputs import LeftOut, SourceError, expand
from vlv.data.image import ImageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def tar(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return content.getvalue()


def test_tables_name_images(here):
    """The column is chosen, or found; paths are looked up from the current folder, or from the table's."""
    (here / "t.csv").write_bytes(b"\xef\xbb\xbfid,url\n1,a.png\n2,sub/b.png\n")
    (here / "sub" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n\n{"file_name": "c.png"}\n')
    assert [i.id for i in expand(["t.csv", "sub/metadata.jsonl"])] == ["a.png", "sub/b.png", "sub/b.png", "sub/c.png"]
    assert [i.id for i in expand(["t.csv"], column="id")] == ["1", "2"]
    with pytest.raises(SourceError, match=r"t.csv has no column file: it has \['id', 'url'\]; choose --url-column"):
        list(expand(["t.csv"], column="file"))
    (here / "bad.jsonl").write_text('{"url": "a.png"}\nnot JSON\n')
    with pytest.raises(SourceError, match=r"bad.jsonl, line 2: expected a JSON object, got b'not JSON"):
        list(expand(["bad.jsonl"]))
    with pytest.raises(SourceError, match=r"no such file or folder: absent.csv|no such file: absent.csv"):
        expand(["absent.csv"])


def test_urls_stand_beside_paths(here):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/r/x.png": b"x", "/r/y.psd": b"y", "/r/s.tar": tar({"m.png": b"old", "n.jpg": b"n"})})
    left_out = LeftOut()
    (here / "list.txt").write_text("memory://r/x.png\nsub/b.png\nmemory://r/gone.png\n")
    found = list(expand(["a.png", "memory://r", "list.txt"], left_out=left_out))
    names = ["a.png", "s.tar/m.png", "s.tar/n.jpg", "x.png", "x.png", "sub/b.png", "gone.png"]
    assert [item.id.split("/r/")[-1] for item in found] == names
    assert left_out.images == {".psd": 1}
    *good, gone = found
    assert [item.read() for item in good] == [b"a.png", b"old", b"n", b"x", b"x", b"sub/b.png"]
    assert not gone.is_file and gone.key == gone.id
    with pytest.raises(ImageError, match="there is no such file"):
        gone.read()


def test_numbered_shards(here):
    for number in range(9, 12):
        (here / f"s-{number:03}.tar").write_bytes(tar({"0.png": b"%d" % number}))
    assert [i.read() for i in expand(["s-{009..011}.tar"])] == [b"9", b"10", b"11"]
    with pytest.raises(SourceError, match=r"no such file or folder: s-012\.tar"):
        expand(["s-{009..012}.tar"])
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/n/{i}.tar": tar({f"{i}.png": json.dumps(i).encode()}) for i in range(2)})
    assert [i.read() for i in expand(["memory://n/{0..1}.tar"])] == [b"0", b"1"]


def test_images_of_a_web_server(here):
    """By their URLs, in a list of urls and paths, and with a name that says nothing; a missing one is named."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(here))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (here / "download").write_bytes(b"pixels")
        (here / "list.txt").write_text(f"# from the web\n{url}/sub/b.png?size=large\nsub/c.png\n{url}/gone.png\n")
        *good, gone = expand([f"{url}/a.png", f"{url}/download", "list.txt"])
        assert [item.read() for item in good] == [b"a.png", b"pixels", b"sub/b.png", b"sub/c.png"]
        assert good[2].id == f"{url}/sub/b.png?size=large"
        with pytest.raises(ImageError, match="there is no such file"):
            gone.read()
        server.shutdown()
