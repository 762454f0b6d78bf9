"""Test the report of what is installed, and the page of captions."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from serve import ENGINES
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


@pytest.mark.parametrize(
    ("absent", "proposed", "lines"),
    [
        (
            (),
            "captions.jsonl\n",
            ["vllm +works", "transformers +works", "llamacpp +works", "remote +works, with --llm-url URL"],
        ),
        (
            ("vllm", "xllamacpp"),
            "captions.jsonl --engine transformers\n",
            ["vllm +needs vllm: .*cpu.lock", r"llamacpp +needs xllamacpp: .*\.\[edge\]\"", "transformers +works"],
        ),
    ],
)
def test_doctor_says_what_each_engine_needs(absent, proposed, lines, capsys, monkeypatch):
    """Captions need no vLLM: transformers, which is always there, writes them too."""
    every = ("torch", *(module for modules in doctor.ENGINE_MODULES.values() for module in modules))
    installed = doctor.version("numpy")
    needs = [need for need in doctor.NEEDS if need.module in every]
    monkeypatch.setattr(doctor, "NEEDS", needs)
    monkeypatch.setattr(doctor, "_installed", lambda names: None if {*names} & {*absent} else installed)
    monkeypatch.setattr(doctor, "_import_error", lambda module: None)
    assert main(["--doctor"]) == 0
    report = capsys.readouterr().out
    assert report.endswith(proposed)
    for line in lines:
        assert re.search(rf"^--engine {line}$", report, re.M), report


def test_every_engine_is_in_the_report():
    assert tuple(doctor.ENGINE_MODULES) == ENGINES


SMI = """\
#!/bin/sh
case "$1" in
--query-gpu=name,compute_cap,memory.total,memory.free,driver_version)
    echo "NVIDIA H100 80GB HBM3, 9.0, 81559, FREE, 580.65.06";;
*) echo "| NVIDIA-SMI 580.65.06     Driver Version: 580.65.06     CUDA Version: 13.0     |";;
esac
"""


@pytest.mark.parametrize(
    ("free", "words"), [(81000, r"fits with --in-flight 512: .* of 84\.9 GB"), (900, "does not fit")]
)
def test_doctor_on_a_gpu_node(free, words, captioning_checkpoint, tmp_path, capsys, monkeypatch):
    """There is no GPU here: nvidia-smi is a script that prints what it prints on an H100."""
    import torch

    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.replace("FREE", str(free)))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "NEEDS", ())
    assert main(["--doctor", "--ckpt", str(captioning_checkpoint)]) == 0
    report = capsys.readouterr().out
    assert re.search(r"^GPU 0 +NVIDIA H100 80GB HBM3, SM 9\.0, .* of 85\.5 GB free$", report, re.M), report
    assert re.search(r"^driver +580\.65\.06, for CUDA up to 13\.0$", report, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}, ", report, re.M)
    if torch.version.cuda is None:
        assert re.search(r"^torch .*a build without CUDA, which uses no GPU: .*gpu\.lock$", report, re.M)
    assert re.search(r"^vLLM +\S", report, re.M) and re.search(r"^kernels +SM 9\.0: \S", report, re.M)
    assert re.search(rf"^checkpoint +{captioning_checkpoint} .*{words}", report, re.M), report


def test_what_code_runs_on_which_gpu():
    assert doctor._runs_on("sm_90", "9.0") and doctor._runs_on("sm_80", "8.9") and doctor._runs_on("sm_120", "12.0")
    assert doctor._runs_on("compute_80", "9.0") and doctor._runs_on("sm_90a", "9.0")
    assert not doctor._runs_on("sm_80", "9.0") and not doctor._runs_on("sm_90", "8.9")
    assert not doctor._runs_on("compute_120", "9.0")


@pytest.fixture
def captioned(scene_images, tmp_path):
    """Items and the records that a run would have left, all but one."""
    items = list(expand([str(scene_images)]))[:5]
    file = tmp_path / "c.jsonl"
    with open(file, "w") as stream:
        for number, item in enumerate(items[1:]):
            record = {"id": item.id, "path": item.path, "caption": f'A <b>bold</b> {item.id[-6:]} & a "quote".'}
            record["finish_reason"] = ("stop", "length")[number % 2]
            stream.write(json.dumps(record) + "\n")
    return items, file


def records_of(page) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="records">(.*?)</script>', page.read_text())[1])


def test_gallery_without_t2i(random_checkpoint, captioned, tmp_path):
    items, file = captioned
    page = tmp_path / "new" / "gallery.html"
    gallery.write(page, Checkpoint.open(random_checkpoint), items, file)
    text, records = page.read_text(), records_of(page)
    assert len(records) == 4 and not (tmp_path / "new" / "gallery.images").exists()
    assert records[0]["caption"] == 'A <b>bold</b> 01.png & a "quote".' and "<b>bold" not in text
    assert records[0]["id"] == items[1].id and [record["cut"] for record in records] == [False, True, False, True]
    assert "no text-to-image model (t2i/): no reconstructions" in text
    assert not re.search(r"https?://|<[^>]*src=|<link|@import", text)  # works offline
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(records[0]["image"].split(",")[1]))))
    assert np.array_equal(pixels, np.asarray(Image.open(items[1].path)))


def test_gallery_with_reconstructions(random_checkpoint, captioned, tmp_path):
    from vlv.train.config import T2I
    from vlv.train.initialize import build_t2i

    folder = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, folder)
    build_t2i(T2I["tiny"]).save(folder / "t2i")
    page = tmp_path / "gallery.html"
    gallery.write(page, Checkpoint.open(folder), *captioned, count=3, steps=2)
    records = records_of(page)
    assert [record["reconstruction"][:22] for record in records[:3]] == ["data:image/png;base64,"] * 3
    assert "reconstruction" not in records[3] and records[3]["image"] == "gallery.images/000000.jpg"
    with Image.open(tmp_path / "gallery.images" / "000000.jpg") as image:
        assert image.size == (192, 192)
    text = page.read_text()
    assert "4 images. The first 3 images, each beside" in text
    assert "frozen text-to-image model from the 32 embeddings of width 128" in text


def test_gallery_that_cannot_be_written(random_checkpoint, captioned, tmp_path):
    with pytest.raises(SinkError, match=r"cannot write .*: "):
        gallery.write(captioned[1] / "under-a-file.html", Checkpoint.open(random_checkpoint), *captioned)


def test_gallery_of_nothing(random_checkpoint, captioned, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    gallery.write(tmp_path / "g.html", Checkpoint.open(random_checkpoint), captioned[0], empty)
    assert "No image has a caption." in (tmp_path / "g.html").read_text()
