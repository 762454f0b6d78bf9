"""Expanding arguments into images: order, ids, laziness, and what is said where there is nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile

import pytest
from PIL import Image

from serve.core.inputs import LeftOut, SourceError, expand
from vlv.data.image import ImageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, so that ids are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w") as file:
            file.write(name)


def shard(name: str, members: dict[str, bytes]) -> None:
    with tarfile.open(name, "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def ids(*paths: str) -> list[str]:
    return [item.id for item in expand(paths)]


def test_files_and_folders(here):
    touch(
        "a/2.JPG", "a/1.png", "a/deep/er/0.webp", "a/notes.txt", "a/.hidden.png", "a/.cache/3.png", "odd.name", "b.jpg"
    )
    assert ids("a") == ["a/1.png", "a/2.JPG", "a/deep/er/0.webp"]
    assert ids("b.jpg", "a/deep/") == ["b.jpg", "a/deep/er/0.webp"]
    assert ids("odd.name") == ["odd.name"]  # named by the user, so taken at their word
    os.chdir("a")
    assert ids(".") == ["1.png", "2.JPG", "deep/er/0.webp"]
    assert ids(f"{here}/b.jpg") == [f"{here}/b.jpg"]
    assert next(expand(["1.png"])).path == f"{here}/a/1.png"


def test_globs(here):
    touch("x/1/a.png", "x/2/a.png", "x/2/b.txt", "x/10/deep/c.png", "x/.h/d.png", "[z].png")
    assert ids("x/*/a.png") == ["x/1/a.png", "x/2/a.png"]
    assert ids("x/[12]") == ["x/1/a.png", "x/2/a.png"]
    assert ids("x/**/*.png") == ["x/1/a.png", "x/10/deep/c.png", "x/2/a.png"]
    assert ids("x/2/*") == ["x/2/a.png"]  # a glob does not vouch for b.txt
    assert ids(f"{here}/x/?/a.png") == [f"{here}/x/1/a.png", f"{here}/x/2/a.png"]
    assert ids("[z].png") == ["[z].png"]  # exists, so it is no pattern


def test_lists(here):
    touch("a.png", "sub/b.jpg")
    shard("s.tar", {"m.jpg": b"x"})
    with open("list.txt", "wb") as file:
        file.write(b"a.png\r\n\nsub/b.jpg\nno/such.jpg\n./a.png\ns.tar\nbyte-\xff.png")
    assert ids("list.txt") == [
        "a.png",
        "sub/b.jpg",
        "no/such.jpg",
        "a.png",
        "s.tar/m.jpg",
        os.fsdecode(b"byte-\xff.png"),
    ]


def test_shards(here):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    shard("s.tar", {"0.json": b"{}", "0.png": stream.getvalue(), "dir/1.jpg": b"not a picture", "._2.jpg": b"x"})
    items = list(expand(["s.tar"]))
    assert [i.id for i in items] == ["s.tar/0.png", "s.tar/dir/1.jpg"]
    assert items[0].read() == stream.getvalue() and items[1].read() == b"not a picture"
    assert ids(".") == ["s.tar/0.png", "s.tar/dir/1.jpg"]


def test_damaged_shard_is_an_item_of_its_own(here):
    shard("s.tar", {f"{i}.jpg": bytes(5000) for i in range(5)})
    os.truncate("s.tar", 8000)  # ends within the second member
    touch("t.tar", "z.png")
    *_, cut, last, other, good = list(expand(["."]))
    assert cut.id == "s.tar/1.jpg" and last.id == "s.tar" and other.id == "t.tar" and good.id == "z.png"
    for item in (cut, last, other):
        with pytest.raises(ImageError):
            item.read()


@pytest.mark.parametrize("cut", [0, 200])
def test_a_damaged_header_within_a_shard_is_an_item_of_its_own(here, cut):
    """tarfile takes such a header for the end: the images after it would be lost in silence."""
    shard("s.tar", {f"{i}.jpg": bytes([i]) * 600 for i in range(3)})
    start = 512 + 1024  # of the second header
    with open("s.tar", "r+b") as file:
        file.seek(start)
        file.write(b"X" * 512)
        if cut:
            file.truncate(start + cut)
    first, last = expand(["s.tar"])
    assert first.id == "s.tar/0.jpg" and first.read() == bytes(600) and last.id == "s.tar"
    with pytest.raises(ImageError, match=r"cannot be read to its end: the header at byte 1,536 is damaged"):
        last.read()


def test_names_that_no_file_can_have(here):
    touch("a.png")
    records = [{"path": "a\0b/c.png"}, {"path": "\ud800/c.png"}, {"path": None}, {"path": ""}, {"path": "a.png"}]
    (here / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    *wrong, right = expand(["t.jsonl"])
    assert right.read() == b"a.png" and len({item.key for item in wrong}) == 3
    for item, shown in zip(wrong, ("a\\x00b/c.png", "\\ud800/c.png", "without one", "without one"), strict=True):
        json.dumps(item.id, ensure_ascii=False).encode()
        with pytest.raises(ImageError) as raised:
            item.read()
        assert str(raised.value).startswith("expected the name of an image, got ") and shown in str(raised.value)


def test_urls_that_are_none(here):
    (here / "t.jsonl").write_text('{"url": "http://["}\n{"path": "x.png"}\n')
    wrong, other = expand(["t.jsonl"])
    assert other.id == "x.png"
    with pytest.raises(ImageError, match="it is not a URL"):
        wrong.read()
    with pytest.raises(SourceError, match=r"http://\[ is not a URL"):
        list(expand(["http://["]))


def test_csv_files_of_odd_content(here):
    """A field may be longer than Python's own limit, 128 KiB."""
    (here / "long.csv").write_text("path,caption\na.png," + "y" * 200_000 + "\nb.png,y\n")
    assert ids("long.csv") == ["a.png", "b.png"]
    for name, content in (("latin", "path,t\na.png,é\n".encode("latin1")), ("wide", "path\na.png\n".encode("utf-16"))):
        (here / f"{name}.csv").write_bytes(content)
        with pytest.raises(SourceError, match=rf"{name}\.csv cannot be read .*it is not UTF-8"):
            list(expand([f"{name}.csv"]))
    (here / "deep.jsonl").write_text('{"path": ' + "[" * 100_000)
    with pytest.raises(SourceError, match=r"deep\.jsonl, line 1: expected a JSON object"):
        list(expand(["deep.jsonl"]))


def test_numbers_that_go_down_are_a_name(here):
    touch("{9..7}.png", "7.png")
    assert ids("{9..7}.png") == ["{9..7}.png"]
    with pytest.raises(SourceError, match=r"no such file or folder: x\{2\.\.1\}\.png"):
        ids("x{2..1}.png")


def test_what_leads_nowhere(here):
    os.mkdir("empty")
    touch("only.txt", "texts/a.md", "s.tar.zst")
    os.truncate("only.txt", 0)
    for path, words in {
        "absent.jpg": "no such file or folder: absent.jpg",
        "empty": "no images in empty",
        "texts": "no images in texts",
        "*.jpg": r"no images in \*.jpg",
        "only.txt": "no images in only.txt",
        "s.tar.zst": "decompress it",
    }.items():
        with pytest.raises(SourceError, match=words):
            expand([path])


def test_links(here):
    touch("real/a.png")
    os.symlink("../real", "real/again")  # a folder that holds itself
    os.symlink("real", "linked")
    os.symlink("absent", "real/broken.png")
    assert ids("linked") == ["linked/a.png"]
    os.mkfifo("real/pipe.png")  # would block whoever opened it
    assert ids("real") == ["real/a.png"]
    assert ids("real", "linked", f"{here}/real", "real/../real") == ["real/a.png"]  # one folder by several names


def test_unreadable_folder_does_not_end_the_run(here, monkeypatch):
    touch("a/secret/1.png", "a/z.png")
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root, whom no permission stops
    secret, good = expand(["a"])
    assert secret.problem and secret.id == "a/secret" and good.id == "a/z.png"


def test_lazy(here):
    with open("list.txt", "w") as file:
        file.writelines(f"{i}.jpg\n" for i in range(100_000))
    assert [i.id for i in itertools.islice(expand(["list.txt"]), 2)] == ["0.jpg", "1.jpg"]


def test_reading_errors(here):
    touch("a.png")
    (item,) = expand(["a.png"])
    os.remove("a.png")
    with pytest.raises(ImageError) as caught:
        item.read()
    assert caught.value.kind == "missing"


def test_lists_of_other_tools(here):
    """Byte order marks, NUL-separated names, comments, names relative to the list's folder; UTF-16 is refused."""
    touch("a.png", "b c.jpg", "sub/d.png", "sub/e.png")
    contents = {
        "bom.txt": b"\xef\xbb\xbfa.png\r\nb c.jpg\r\n",
        "nul.txt": b"a.png\0b c.jpg\0",
        "marked.txt": b"# my images\n\na.png\n  \n#b c.jpg\nb c.jpg",
    }
    for name, content in contents.items():
        with open(name, "wb") as file:
            file.write(content)
    assert ids("bom.txt") == ids("nul.txt") == ["a.png", "b c.jpg"]
    assert ids("marked.txt") == ["a.png", "b c.jpg"]
    with open("sub/list.txt", "w") as file:
        file.write(f"d.png\n{here}/a.png\ne.png\n")
    assert ids("sub/list.txt") == ["sub/d.png", f"{here}/a.png", "sub/e.png"]
    with open("wide.txt", "w", encoding="utf-16") as file:
        file.write("a.png\n")
    with pytest.raises(SourceError, match=r"the list wide.txt is UTF-16 text: save it as UTF-8"):
        ids("wide.txt")


def test_a_name_that_comes_twice_in_a_shard(here):
    """The last member counts, as when tar extracts them, and the earlier one is named."""
    with tarfile.open("s.tar", "w") as tar:
        for name, content in (("0.png", b"old"), ("1.png", b"other"), ("0.png", b"newer")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    left_out = LeftOut()
    items = list(expand(["s.tar"], left_out))
    with tarfile.open("s.tar") as tar:
        tar.extractall("extracted", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    for item in items:
        with open(f"extracted/{item.id.removeprefix('s.tar/')}", "rb") as file:
            assert item.read() == file.read()
    assert [item.id for item in items] == ["s.tar/0.png", "s.tar/1.png"]
    assert str(left_out) == "left out: 1 members of shards with a later one of the same name (s.tar/0.png)"


def test_what_is_left_out_is_counted(here):
    touch("a/1.png", "a/2.psd", "a/deep/3.PSD", "a/4.svg", "a/5.txt", "a/6.json", "a/noise", ".hidden.psd")
    os.symlink("absent", "a/7.png")
    os.mkfifo("a/8.jpg")
    shard("a/s.tar", {"x.png": b"", "y.tga": b"", "x.json": b""})
    left_out = LeftOut()
    assert [item.id for item in expand(["a"], left_out)] == ["a/1.png", "a/s.tar/x.png"]
    assert left_out.images == {".psd": 2, ".svg": 1, "links to nothing": 1, "special files": 1, ".tga": 1}
    assert left_out.others == {".txt": 1, ".json": 1, "no extension": 1}
    assert str(left_out).startswith("left out: 2 .psd; ") and "3 other files (" in str(left_out)
    again = LeftOut()
    list(expand(["a", f"{here}/a", "a/deep"], again))
    assert again == left_out
    assert str(LeftOut()) == ""


def test_captions_beside_images_are_no_lists(here):
    """As in `photos/*`, which the shell expands, after a run with --format txt."""
    touch("p/1.jpg", "p/1.txt", "p/2.PNG", "p/2.txt")
    left_out = LeftOut()
    assert [i.id for i in expand(["p/1.jpg", "p/1.txt", "p/2.PNG", "p/2.txt"], left_out)] == ["p/1.jpg", "p/2.PNG"]
    assert left_out.others == {".txt": 2}
    with pytest.raises(SourceError, match=r"no images in p/1.txt: .*1 other files \(\.txt\)"):
        expand(["p/1.txt"])
