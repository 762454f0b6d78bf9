"""BLEU, ROUGE-L and CIDEr against hand-computed cases; the files that captions come in; the report."""

import json
import math
import subprocess
import sys
import time

import pytest

from vlv.evaluate import caption_files
from vlv.evaluate.__main__ import COMMANDS, main


def scores(captions, known):
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
    from vlv.evaluate.metrics import ngrams

    return ngrams.score(captions, known)


def test_bleu_and_rouge_by_hand():
    """ "the cat sat here" to "the cat sat there now": 3 of 4 words, 2 of 3 pairs, 1 of 2 triples; 4 words for 5."""
    found = scores({"a": "The cat sat here."}, {"a": ["the cat sat there now"]})
    short = math.exp(1 - 5 / 4)  # brevity
    assert found["bleu_1"] == pytest.approx(short * 3 / 4, rel=1e-6)
    assert found["bleu_2"] == pytest.approx(short * (3 / 4 * 2 / 3) ** (1 / 2), rel=1e-6)
    assert found["bleu_3"] == pytest.approx(short * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3), rel=1e-6)
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    assert found["rouge_l"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))


def test_cider_by_hand():
    """Every n-gram of one image only: a caption that is the reference has cosine 1 for each n, so 10."""
    found = scores({"a": "one two three four", "b": "five six seven eight"},
                   {"a": ["one two three four"], "b": ["five six seven eight"]})  # fmt: skip
    assert found["cider"] == pytest.approx(10) and found["bleu_4"] == pytest.approx(1)
    # swapped, nothing agrees
    found = scores({"a": "five six seven eight", "b": "one two three four"},
                   {"a": ["one two three four"], "b": ["five six seven eight"]})  # fmt: skip
    assert found["cider"] == 0 and found["rouge_l"] == 0
    # half of the words, in no common pair: cosine of the counts is 1/2 for n = 1, 0 above; mean of four n, times 10
    found = scores({"a": "one x three y", "b": "five six seven eight"},
                   {"a": ["one two three four"], "b": ["five six seven eight"]})  # fmt: skip
    # words that no reference has weigh log(2 images), as those of one reference do
    assert found["cider"] == pytest.approx((10 + 10 * 0.5 / 4) / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat, a dog; and... a bus!", "a cat a dog and a bus"),
        ("It's the dog's ball.", "it 's the dog 's ball"),
        ("They can't (really) go", "they ca n't really go"),
        ("A 3.5-inch, two-tone U.S. flag", "a 3.5-inch two-tone u.s. flag"),
        ("", ""),
    ],
)
def test_tokens_as_the_penn_treebank_has_them(text, expected):
    from vlv.evaluate.metrics import ngrams

    assert ngrams.tokenize(text) == expected


def test_the_command_reads_coco_files(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
    annotations = [
        {"image_id": 42, "id": i, "caption": c} for i, c in enumerate(["a red cat sits", "the cat sits down"])
    ]
    annotations += [{"image_id": 7, "id": 9, "caption": "a blue bus on the road"}]
    (tmp_path / "refs.json").write_text(json.dumps({"annotations": annotations, "images": []}))
    lines = [{"id": f"x/COCO_val2014_{i:012}.jpg", "caption": c} for i, c in ((42, "a red cat sits"), (7, "a bus"))]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    words = ["references", "--captions", f"ours={tmp_path / 'c.jsonl'}", "--references", str(tmp_path / "refs.json")]
    assert main([*words, "-o", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["images"] == 2 and 0 < found["rows"]["ours"]["bleu_1"] < 1 and found["rows"]["ours"]["cider"] > 0


def test_caption_files(tmp_path):
    made = {
        "lines.jsonl": '{"id": "a/cat.v2.jpg", "caption": "x"}\n\n{"image": "dog.png", "captions": ["y"]}\n',
        "table.json": '{"cat.v2.jpg": "x", "b/dog.png": "y"}',
        "results.json": '[{"image_id": "cat.v2.jpg", "caption": "x"}, {"file_name": "dog.png", "caption": "y"}]',
    }
    for name, content in made.items():
        (tmp_path / name).write_text(content)
        assert caption_files.read(tmp_path / name) == {"cat.v2": "x", "dog": "y"}, name
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "dog.txt").write_text("y\n")
    assert caption_files.read(tmp_path / "texts") == {"dog": "y"}
    (tmp_path / "one.jsonl").write_text('{"id": "dog.png", "caption": "y"}')
    assert caption_files.read(tmp_path / "one.jsonl") == {"dog": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no captions"),
        ("{}", "holds no captions"),
        ('{"id": "a"}\n{"id"', "line 2 is no JSON"),
        ('[{"caption": "x"}]', "record 1: an image"),
        ('[{"id": "a", "caption": 3}]', "record 1: an image"),
        ('[{"id": "a", "caption": "x"}, {"id": "b/a.jpg", "caption": "y"}]', "two captions of 'a'"),
    ],
)
def test_caption_files_that_are_none(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        caption_files.read(tmp_path / "c.json")


def test_a_missing_package_is_named_with_its_command(tmp_path):
    (tmp_path / "c.json").write_text('{"1.jpg": "a cat"}')
    words = ["references", "--captions", f"a={tmp_path / 'c.json'}", "--references", str(tmp_path / "c.json")]
    code = f"""
import sys
sys.modules["pycocoevalcap"] = None
from vlv.evaluate.__main__ import main
sys.exit(main({words}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: pycocoevalcap is not installed: pip install --no-deps pycocoevalcap\n"


def test_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["nothing"]) == 2
    assert "there are scenes, images" in capsys.readouterr().err
    start = time.perf_counter()
    for command in COMMANDS:
        text = subprocess.run(
            [sys.executable, "-m", "vlv.evaluate", command, "--help"], capture_output=True, text=True
        ).stdout
        assert f"python -m vlv.evaluate {command}" in text
    assert time.perf_counter() - start < 2 * len(COMMANDS)
