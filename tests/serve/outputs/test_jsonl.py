"""The output files: whole lines, resuming, locking, and full or forbidden disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from serve.core.id_set import IdSet
from serve.core.inputs import Item
from serve.outputs.jsonl import FileSink, SinkError

ITEM = Item("a", "/absent")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "captions.jsonl"


def test_writes_and_resumes(output):
    sink = FileSink(output, "m1")
    sink.caption({"id": "ü.png", "caption": "Zwei Äpfel.", "model": "m1"}, ITEM)
    assert not sink.errors_path.exists()
    sink.error({"id": "bad.png", "kind": "empty"})
    sink.close()
    assert "Zwei Äpfel." in output.read_text()
    assert lines(output.with_name("captions.errors.jsonl")) == [{"id": "bad.png", "kind": "empty"}]
    sink = FileSink(output, "m1")
    assert "ü.png" in sink.finished and "bad.png" in sink.finished and "new.png" not in sink.finished
    sink.caption({"id": "new.png"}, ITEM)
    sink.close()
    assert [r["id"] for r in lines(output)] == ["ü.png", "new.png"]


@pytest.mark.parametrize("torn", [b'{"id": "b", "capt', b"x" * 200_000, b'{"id": "b"}'])
def test_torn_last_line_is_cut_off(output, torn):
    output.parent.mkdir()
    output.write_bytes(b'{"id": "a"}\n' + torn)
    sink = FileSink(output, "m")
    assert len(sink.finished) == 1
    sink.caption({"id": "b"}, ITEM)
    sink.close()
    assert [r["id"] for r in lines(output)] == ["a", "b"]


def test_only_a_torn_line(output):
    output.parent.mkdir()
    output.write_bytes(b'{"id"')
    FileSink(output, "m").close()
    assert output.read_bytes() == b""


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a photo\n of two lines", b"a note", b'{"info": {}}'])
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.errors.jsonl"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_file_that_is_no_output_stays_as_it_is(output, name, content, resume):
    """As with `-o *.jpg`, where the shell makes the first photo the output."""
    file = output.with_name(name)
    file.parent.mkdir()
    file.write_bytes(content)
    if resume or file == output:
        with pytest.raises(SinkError, match="is there already, and no file of captions: choose another -o"):
            FileSink(output, "m", resume)
    else:
        FileSink(output, "m", resume).close()
        file = file.with_name(name + ".old")
    assert file.read_bytes() == content


@pytest.mark.parametrize("line", ['{"id": 5}', '{"id": "a", "path": 5}', '{"id": ' + "[" * 100_000, '["id"]'])
def test_a_line_that_is_no_record_is_named(output, line):
    FileSink(output, "m").close()
    content = '{"id": "a.png", "path": "/a.png", "caption": "x", "model": "m", "flags": ""}\n' + line + "\n"
    output.write_text(content)
    with pytest.raises(SinkError, match=r"line 2 of .*captions\.jsonl is not a record of a run: remove the line"):
        FileSink(output, "m")
    assert output.read_text() == content


@pytest.mark.parametrize("path", ["/a\0b/c.png", "/\ud800/c.png"])
def test_a_path_that_no_file_can_have(output, path):
    FileSink(output, "m").close()
    record = {"id": "c.png", "path": path, "caption": "x", "model": "m", "flags": ""}
    output.write_text(json.dumps(record) + "\n")
    FileSink(output, "m").close()
    assert json.loads(output.read_text()) == record


def test_file_names_that_are_no_utf8(output):
    name = os.fsdecode(b"caf\xe9.jpg")
    sink = FileSink(output, "m")
    sink.caption({"id": name}, ITEM)
    sink.close()
    assert name in FileSink(output, "m").finished


def test_start_over_keeps_the_old_file(output):
    for n, resume in enumerate((True, False)):
        sink = FileSink(output, f"m{n}", resume)
        sink.caption({"id": "a", "model": f"m{n}"}, ITEM)
        sink.error({"id": "b"})
        assert len(sink.finished) == 0
        sink.close()
    assert lines(output)[0]["model"] == "m1"
    assert lines(output.with_name("captions.jsonl.old"))[0]["model"] == "m0"
    assert output.with_name("captions.errors.jsonl.old").exists()


def test_refusals(output):
    sink = FileSink(output, "m1")
    with pytest.raises(SinkError, match="another run is writing"):
        FileSink(output, "m1")
    with pytest.raises(SinkError, match="another run is writing"):
        FileSink(output, "m1", resume=False)
    sink.caption({"id": "a", "model": "m1"}, ITEM)
    sink.close()
    with pytest.raises(SinkError, match="holds captions of model m1, and this checkpoint is m2"):
        FileSink(output, "m2")
    output.write_text('{"id": "a"}\nsomething else\n')
    with pytest.raises(SinkError, match=r"line 2 of .*captions.jsonl is not a record"):
        FileSink(output, "m1")


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "c.jsonl", tmp_path, "/sys/c.jsonl"):  # root may write almost anywhere else
        with pytest.raises(SinkError, match=r"^cannot write [^\n]*: [^\n]*choose another -o"):
            FileSink(place, "m")
    sink = FileSink("/dev/full", "m")
    with pytest.raises(SinkError, match="the disk is full"):
        sink.caption({"id": "a"}, ITEM)


def test_a_line_that_does_not_fit_is_taken_back(output):
    """The file may grow to 1000 bytes: what fits stays, nothing is torn."""
    script = (
        "import resource, sys\n"
        "from serve.outputs.jsonl import FileSink, SinkError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sink = FileSink(sys.argv[1], 'm')\n"
        "try:\n"
        "    for i in range(100): sink.caption({'id': str(i), 'caption': 'x' * 150}, None)\n"
        "except SinkError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, output], capture_output=True, text=True)
    assert "may not grow further" in run.stdout, run.stderr
    assert [r["id"] for r in lines(output)] == ["0", "1", "2", "3", "4"]
    assert output.read_bytes().endswith(b"\n")


def test_idset_is_a_set():
    ids = IdSet()
    keys = [f"photos/{i}.jpg" for i in range(150_000)]
    assert all(ids.add(k) for k in keys)
    assert not any(ids.add(k) for k in keys[:1000]) and len(ids) == len(keys)
    assert all(k in ids for k in keys[::97]) and "photos/x.jpg" not in ids
    assert len(ids._recent) <= 1 << 16  # the bulk is in the array
