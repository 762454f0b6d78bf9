"""The report of what is installed, and the page of captions."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from serve.core.inputs import expand
from serve.outputs.jsonl import SinkError
from serve.reports import doctor, gallery
from serve.vllm_caption import main
from vlv.checkpoints.folder import Checkpoint


def test_doctor_names_what_is_missing_and_its_remedy(capsys, monkeypatch):
    present = doctor.Need("numpy", ("numpy",), "pixels", "", True)
    absent = doctor.Need("nothing", ("no-such-distribution",), "a test", "ray")
    monkeypatch.setattr(doctor, "NEEDS", (present, absent))
    assert main(["--doctor"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"^Python +3\.\d+", report, re.M) and re.search(r"^CPU +.*cores usable", report, re.M)
    assert re.search(rf"^numpy +{np.__version__} ", report, re.M)
    assert 'missing         for a test: python -m pip install -e ".[ray]"' in report
    assert "captioning works here" in report


def test_doctor_fails_where_captioning_would(capsys, monkeypatch):
    broken = doctor.Need("no_such_module", ("numpy",), "a test", "", True)
    monkeypatch.setattr(doctor, "NEEDS", (broken,))
    assert main(["--doctor"]) == 1
    report = capsys.readouterr().out
    assert "does not import: ModuleNotFoundError" in report
    assert "captioning does not work here: no_such_module" in report


@pytest.fixture
def captioned(scene_images, tmp_path):
    """Items and the records that a run would have left, all but one."""
    items = list(expand([str(scene_images)]))[:5]
    file = tmp_path / "c.jsonl"
    with open(file, "w") as stream:
        for item in items[1:]:
            record = {"id": item.id, "caption": f'A <b>bold</b> {item.id[-6:]} & a "quote".'}
            stream.write(json.dumps(record) + "\n")
    return items, file


def test_gallery_without_t2i(random_checkpoint, captioned, tmp_path):
    items, file = captioned
    page = tmp_path / "new" / "gallery.html"
    gallery.write(page, Checkpoint.open(random_checkpoint), items, file)
    text = page.read_text()
    assert text.count("<article>") == 4 and text.count("<img") == 4
    assert "A &lt;b&gt;bold&lt;/b&gt; 01.png &amp; a &quot;quote&quot;." in text and "<b>bold" not in text
    assert "no text-to-image model (t2i/): no reconstructions" in text
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link", text)  # works offline
    data = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(pixels, np.asarray(Image.open(items[1].path)))


def test_gallery_with_reconstructions(random_checkpoint, captioned, tmp_path):
    from vlv.train.config import T2I
    from vlv.train.initialize import build_t2i

    folder = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, folder)
    build_t2i(T2I["tiny"]).save(folder / "t2i")
    page = tmp_path / "gallery.html"
    gallery.write(page, Checkpoint.open(folder), *captioned, count=3, steps=2)
    text = page.read_text()
    assert text.count("<article>") == 2 and text.count("<figcaption>reconstruction") == 2
    assert "frozen text-to-image model draws from the 32 embeddings of width 128" in text


def test_gallery_that_cannot_be_written(random_checkpoint, captioned, tmp_path):
    with pytest.raises(SinkError, match=r"cannot write .*: "):
        gallery.write(captioned[1] / "under-a-file.html", Checkpoint.open(random_checkpoint), *captioned)


def test_gallery_of_nothing(random_checkpoint, captioned, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    gallery.write(tmp_path / "g.html", Checkpoint.open(random_checkpoint), captioned[0], empty)
    assert "No image has a caption." in (tmp_path / "g.html").read_text()
