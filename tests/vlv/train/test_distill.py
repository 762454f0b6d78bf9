"""Captions for stage 2 from a real OpenAI-compatible server: ours, with the reference engine."""

import base64
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from vlv.data.image import decode
from vlv.distill.duplicates import Duplicates, content_hash, difference_hash
from vlv.distill.quality import Limits, caption_problem, image_problem, repetition, tidy
from vlv.train import distill

ROOT = Path(__file__).parents[3]
SMALL = ["--min-side", "32", "--min-words", "1", "--repetition", "1", "--size", "0", "--max-tokens", "40"]


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    """The address of our server, in a thread."""
    from serve.engines.transformers import TransformersEngine
    from tests.serve.serving import Running
    from vlv.checkpoints.folder import Checkpoint

    running = Running(Checkpoint.open(captioning_checkpoint), TransformersEngine)
    yield running.url + "/v1"
    running.stop()


@pytest.fixture
def photos(scene_images, tmp_path):
    """Ten scenes, one of them twice, one of them again as a JPEG, a small one and a broken file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        shutil.copy(scene_images / f"{i:02}.png", folder)
    shutil.copy(folder / "04.png", folder / "10-again.png")
    Image.open(folder / "05.png").save(folder / "11-again.jpg", quality=90)
    Image.new("RGB", (20, 20)).save(folder / "12-small.png")
    (folder / "13-broken.png").write_bytes(b"no image")
    (folder / "00.json").write_text(json.dumps({"license": "CC0-1.0", "url": "https://example.org/0"}))
    return folder


def call(photos, server, output, *more):
    model = httpx.get(server + "/models").json()["data"][0]["id"]
    return distill.main([str(photos), "--url", server, "--model", model, "-o", str(output), *SMALL, *more])


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_captions_origin_and_what_is_left_out(photos, server, tmp_path, captioning_checkpoint, capsys):
    out = tmp_path / "data.jsonl"
    assert call(photos, server, out, "--license", "mine", "--price", "1", "2") == 0
    kept, rejected = records(out), records(tmp_path / "data.rejected.jsonl")
    assert [Path(r["id"]).stem for r in sorted(kept, key=lambda r: r["id"])] == [f"{i:02}" for i in range(10)]
    reasons = {Path(r["id"]).stem: r["reason"] for r in rejected}
    assert reasons.keys() == {"10-again", "11-again", "12-small", "13-broken"}
    assert reasons["10-again"].endswith("04.png") and reasons["11-again"].endswith("05.png")
    assert reasons["12-small"] == "small: 20 x 20" and reasons["13-broken"].startswith("unreadable")
    first = next(r for r in kept if r["id"].endswith("00.png"))
    assert (first["license"], first["source"]) == ("CC0-1.0", "https://example.org/0")
    assert {r["license"] for r in kept if r is not first} == {"mine"}
    assert (
        first["teacher"]["model"] and first["teacher"]["date"] and first["width"] == 64 and len(first["sha256"]) == 16
    )

    from vlv.checkpoints.folder import Checkpoint
    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    captioner = Captioner.load(Checkpoint.open(captioning_checkpoint))
    crop = __import__("torch").from_numpy(load_crop(photos / "00.png", 64))[None]
    assert first["caption"] == tidy(captioner.captions(crop, max_new_tokens=40)[0], False)
    printed = capsys.readouterr()
    assert "14 images: at most 0.02 M tokens in" in printed.err and "$" in printed.err
    summary = json.loads(printed.out)
    assert (summary["kept"], summary["rejected"], summary["failed"]) == (10, 4, 0) and summary["dollars"] > 0

    before = out.read_bytes()
    assert call(photos, server, out) == 0  # nothing is left to do
    assert out.read_bytes() == before and json.loads(capsys.readouterr().out)["answers"] == 0

    from vlv.data.sources import open_sources

    source = open_sources([str(out)])  # as stage 2 reads it
    assert source.rows == [10] and all(source.read(0, i).caption == kept[i]["caption"] for i in range(10))


def test_our_own_server_takes_the_default_limit(photos, server, tmp_path):
    """400 tokens are more than it gives; it lowers them, and every caption arrives."""
    default = distill.parser().get_default("max_tokens")
    assert default == 400 and call(photos, server, tmp_path / "data.jsonl", "--max-tokens", str(default)) == 0
    assert len(records(tmp_path / "data.jsonl")) == 10 and not (tmp_path / "data.errors.jsonl").exists()


def test_kill_9_loses_and_doubles_nothing(photos, server, tmp_path):
    out = tmp_path / "data.jsonl"
    model = httpx.get(server + "/models").json()["data"][0]["id"]
    command = [
        sys.executable,
        "-m",
        "vlv.train.distill",
        str(photos),
        "--url",
        server,
        "--model",
        model,
        "-o",
        str(out),
    ]
    process = subprocess.Popen([*command, *SMALL, "--concurrency", "1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(records_so_far(out)) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with out.open("ab") as stream:
        stream.write(b'{"id": "half a li')
    assert len(records_so_far(out)) < 10
    assert call(photos, server, out) == 0
    assert sorted(Path(r["id"]).stem for r in records(out)) == [f"{i:02}" for i in range(10)]
    assert len(records(tmp_path / "data.rejected.jsonl")) == 4


def records_so_far(file):
    return file.read_bytes().splitlines() if file.exists() else []


class FlakyServer(BaseHTTPRequestHandler):
    """Fails now and then, as APIs do and our server does not.

    `failures`: by call, the status that it gives, or None for a good one with `choices: null`; `message`: of errors;
    `content`: of answers, None for one that is good; `images`: the data: URLs that it got.
    """

    failures, calls, message, content, images = {}, 0, "not now", None, []

    def do_POST(self):
        type(self).calls += 1
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.images.append(question["messages"][0]["content"][1]["image_url"]["url"])
        status = self.failures.get(self.calls, 200)
        text = self.content or f"Number {self.calls} is a red kite above two green hills."
        message = {"role": "assistant", "content": text}
        answer = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "flaky",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100_000, "completion_tokens": 10_000, "total_tokens": 110_000},
        }  # fmt: skip
        if status is None:
            answer["choices"], status = None, 200
        body = json.dumps(answer if status == 200 else {"error": {"message": self.message}}).encode()
        self.send_response(status)
        self.send_header("Retry-After-Ms", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def flaky():
    FlakyServer.failures, FlakyServer.calls, FlakyServer.message, FlakyServer.content, FlakyServer.images = (
        {},
        0,
        "not now",
        None,
        [],
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), FlakyServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def ask(photos, url, out, *more):
    return distill.main(
        [str(photos), "--url", url, "--model", "m", "-o", str(out), *SMALL, "--concurrency", "1", *more]
    )


def test_what_fails_is_tried_again_and_then_reported(photos, flaky, tmp_path, capsys):
    FlakyServer.failures = {1: 429, 2: 503, 5: 400}
    out = tmp_path / "data.jsonl"
    assert ask(photos, flaky, out) == 1
    (error,) = records(tmp_path / "data.errors.jsonl")
    assert "BadRequestError" in error["error"] and len(records(out)) == 9
    assert ask(photos, flaky, out) == 0  # the next run asks for that one alone
    assert len(records(out)) == 10 and not (tmp_path / "data.errors.jsonl").exists() and FlakyServer.calls == 13


def test_an_answer_without_choices_is_reported_and_tried_again(photos, flaky, tmp_path):
    FlakyServer.failures = {2: None, 3: None}  # it is asked once more at once
    assert ask(photos, flaky, tmp_path / "data.jsonl") == 1
    assert len(records(tmp_path / "data.errors.jsonl")) == 1 and len(records(tmp_path / "data.jsonl")) == 9


def test_an_answer_that_cannot_be_written_stops_the_run(photos, flaky, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlv.distill.distiller.Output.write", full)
    assert ask(photos, flaky, tmp_path / "data.jsonl") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert FlakyServer.calls == 1  # no further image is paid for


def test_it_stops_when_the_money_is_spent(photos, flaky, tmp_path, capsys):
    out = tmp_path / "data.jsonl"
    assert ask(photos, flaky, out, "--price", "1", "1", "--max-cost", "0.3") == 1
    assert "$0.33 are spent, --max-cost is 0.3" in capsys.readouterr().err
    assert len(records(out)) == 3
    with pytest.raises(SystemExit):
        ask(photos, flaky, out, "--max-cost", "0.3")


def test_a_wrong_key_stops_at_once(photos, flaky, tmp_path, capsys):
    FlakyServer.failures = dict.fromkeys(range(1, 50), 401)
    assert ask(photos, flaky, tmp_path / "data.jsonl") == 1
    assert re.search(r"gives no answers .*401", capsys.readouterr().err)
    assert FlakyServer.calls < 4


def test_a_limit_of_tokens_stops_at_once_and_is_named(photos, flaky, tmp_path, capsys):
    """vLLM's words, and ours; every image would meet the same."""
    for message in (
        "'max_tokens' or 'max_completion_tokens' is too large: 400. This model's maximum context length is 512 tokens",
        "max_tokens: expected an integer from 1 to 300, got 400",
    ):
        FlakyServer.failures, FlakyServer.calls, FlakyServer.message = dict.fromkeys(range(1, 50), 400), 0, message
        assert ask(photos, flaky, tmp_path / "data.jsonl", "--max-tokens", "400") == 1
        assert FlakyServer.calls < 4
        assert "refuses --max-tokens 400, choose a smaller one" in capsys.readouterr().err


GOOD = "A red kite flies above two green hills."


@pytest.mark.parametrize(
    "content",
    [
        f"<think>Let me see the picture: it has hills.</think>\n\n{GOOD}",
        f"Let me see: it has hills.\n</think>\n{GOOD}",
        [{"type": "text", "text": "A red kite flies "}, {"type": "text", "text": "above two green hills."}],
    ],
)
def test_thoughts_and_parts(photos, flaky, tmp_path, content):
    FlakyServer.content = content
    assert ask(photos, flaky, tmp_path / "data.jsonl") == 0
    assert {r["caption"] for r in records(tmp_path / "data.jsonl")} == {GOOD}


def test_thoughts_without_an_end_are_no_caption(photos, flaky, tmp_path):
    FlakyServer.content = "<think>A red kite flies above two green hills. It is bright."
    assert ask(photos, flaky, tmp_path / "data.jsonl") == 0
    reasons = [r["reason"] for r in records(tmp_path / "data.rejected.jsonl")]
    assert not records(tmp_path / "data.jsonl") and reasons.count("empty") == 10


@pytest.mark.parametrize(("kind", "sent"), [("BMP", "png"), ("TIFF", "png"), ("AVIF", "png"), ("JPEG2000", "png"),
                                            ("WEBP", "webp"), ("GIF", "gif"), ("PNG", "png")])  # fmt: skip
def test_files_are_sent_by_content(photos, flaky, tmp_path, kind, sent):
    """With --size 0 the file itself, whatever its name says; what servers do not take is converted."""
    (tmp_path / "one").mkdir()
    Image.open(photos / "00.png").convert("RGB").save(tmp_path / "one" / "a.jpg", kind)
    assert ask(tmp_path / "one", flaky, tmp_path / "data.jsonl") == 0
    head, _, data = FlakyServer.images[0].partition(";base64,")
    assert head == f"data:image/{sent}"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        assert opened.format == sent.upper()


def test_the_crop_that_vlv_sees_is_sent(flaky, tmp_path):
    """Not the file: upright, the centre square, at --size."""
    from vlv.data.image import load_crop

    (tmp_path / "one").mkdir()
    ramp = np.tile(np.arange(120, dtype=np.uint8), (80, 1))
    photo = Image.fromarray(np.stack([ramp, ramp[:, ::-1], ramp * 2], axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(tmp_path / "one" / "a.jpg", quality=95, exif=exif)
    assert ask(tmp_path / "one", flaky, tmp_path / "data.jsonl", "--size", "48") == 0
    head, _, data = FlakyServer.images[0].partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        pixels = np.asarray(sent).astype(int)
    expected = load_crop(tmp_path / "one" / "a.jpg", 48).transpose(1, 2, 0).astype(int)
    assert head == "data:image/jpeg" and pixels.shape == (48, 48, 3)
    assert abs(pixels - expected).mean() < 2 < abs(pixels[::-1] - expected).mean()  # JPEG's rounding
    (record,) = records(tmp_path / "data.jsonl")
    assert (record["width"], record["height"]) == (80, 120)


def test_no_program_is_started_for_an_image(flaky, tmp_path, monkeypatch):
    """An EPS file runs Ghostscript in Pillow; the allow-list of vlv.data.image refuses it by its content."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    assert ask(tmp_path / "one", flaky, tmp_path / "data.jsonl") == 0
    (rejected,) = records(tmp_path / "data.rejected.jsonl")
    assert (
        rejected["reason"].startswith("unreadable: not recognised as an image")
        and not started
        and not FlakyServer.calls
    )


def test_rows_of_shards_get_a_copy_that_training_reads(photos, flaky, tmp_path):
    import tarfile

    from vlv.data.sources import open_sources

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(photos / "00.png", "00.png")
    assert ask(tmp_path / "a.tar", flaky, tmp_path / "data.jsonl") == 0
    assert open_sources([str(tmp_path / "data.jsonl")]).read(0, 0).image == (photos / "00.png").read_bytes()
    (copy,) = (tmp_path / "data.images").rglob("*.*")
    assert copy.suffix == ".png"  # a reader of the folder takes it too


def test_near_duplicates(scene_images, tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((300, 300), Image.Resampling.BICUBIC)
    files = {"a": ("PNG", noise), "b": ("JPEG", noise), "c": ("PNG", noise.resize((200, 200))),
             "d": ("PNG", noise.transpose(Image.Transpose.ROTATE_90)), "e": ("PNG", Image.new("RGB", (90, 90))),
             "f": ("PNG", Image.new("RGB", (91, 91)))}  # fmt: skip
    found, seen = {}, Duplicates(near=3)
    for name, (kind, image) in files.items():
        image.save(tmp_path / name, kind)
        content = (tmp_path / name).read_bytes()
        found[name] = seen.find(content_hash(content), difference_hash(decode(content)))
        seen.add(name, content_hash(content), difference_hash(decode(content)))
    assert found == {"a": None, "b": "a", "c": "a", "d": None, "e": None, "f": None}


def test_every_pair_within_the_distance_is_found():
    rng, seen = np.random.default_rng(1), Duplicates(near=3)
    base = int(rng.integers(2**62, 2**63)) | 0xFFFF
    seen.add("a", "x", base)
    for _ in range(300):
        bits = rng.choice(64, 4, replace=False)
        near = base ^ sum(1 << int(b) for b in bits[:3])
        assert seen.find("y", near) == "a" and seen.find("y", near ^ (1 << int(bits[3]))) is None


def test_what_a_caption_must_be():
    good = "A brown dog lies on a grey sofa. Behind it hangs a round mirror that shows a window and part of a door."
    limits = Limits()
    assert caption_problem(good, False, limits) is None
    for text, cut, reason in (
        ("", False, "empty"), ("I'm sorry, but I cannot describe this picture for you.", False, "refusal"),
        ("A dog.", False, "short"), (good * 30, False, "long"), ("- A dog\n" + good, False, "markup"),
        ((good[:32] + " ") * 12, False, "repeated"), (good[:-5], True, "cut off"),
    ):  # fmt: skip
        assert caption_problem(text, cut, limits).startswith(reason), text
    assert tidy("Here is a caption of it:\n\n" + good + " And then a", True) == good
    assert tidy('"' + good + '"', False) == good and repetition("a b c d e".split()) == 0


def test_what_an_image_must_be():
    limits = Limits()
    assert image_problem(513, 1026, {"pwatermark": 0.49}, limits) is None
    assert image_problem(512, 800, {}, limits) == "small: 512 x 800"  # the paper keeps what is greater
    assert image_problem(600, 800, {"pwatermark": 0.5}, limits) == "watermark: 0.50"
    assert image_problem(500, 800, {}, limits) == "small: 500 x 800"
    assert image_problem(1300, 600, {}, limits) == "aspect: 1300 x 600"
    assert image_problem(600, 800, {"pwatermark": 0.8}, limits) == "watermark: 0.80"
