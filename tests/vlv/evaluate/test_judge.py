"""The judge over HTTP: cost first, answers kept, blind pairs in both orders, and statistics by hand."""

import json
import re
import shutil

import pytest

from vlv.common.openai_client import THOUGHTS
from vlv.evaluate.__main__ import main
from vlv.evaluate.judges import captions as judge
from vlv.evaluate.metrics.statistics import bootstrap, wilson

KEYS = ["00", "01", "02", "03"]


@pytest.fixture
def files(tmp_path, scene_images):
    """Two systems' captions of four images."""
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.json"
    ours.write_text("".join(json.dumps({"id": f"a/{k}.png", "caption": f"good {k}"}) + "\n" for k in KEYS))
    theirs.write_text(json.dumps({f"{k}.png": f"poor {k}" for k in KEYS}))
    return [str(scene_images), "--captions", f"ours={ours}", f"theirs={theirs}"]


def run(files, server, tmp_path, *options):
    words = ["judge", *files, "--url", server.url, "--model", "m", "-o", str(tmp_path / "out.json"), *options]
    code = main(words)
    out = tmp_path / "out.json"
    return code, json.loads(out.read_text()) if out.exists() else None


def text_of(body):
    return body["messages"][1]["content"][1]["text"]


def fair(body):
    """Grades by the word in the caption; in pairs finds the good one wherever it stands."""
    text = text_of(body)
    if "Description 1" in text:
        return json.dumps({"better": 1 if "Description 1:\ngood" in text else 2})
    level = 5 if "good" in text else 2
    return f"Here it is: {json.dumps({'coverage': level, 'hallucination': 6, 'layout': level - 1, 'score': level})}"


def test_rubric_and_pairs(files, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answer = fair
    code, found = run(files, server, tmp_path, "--price", "2", "10")
    assert code == 0
    ours, theirs = found["rubric"]["ours"], found["rubric"]["theirs"]
    assert (ours["coverage"]["mean"], ours["layout"]["mean"], theirs["coverage"]["mean"]) == (5, 4, 2)
    assert ours["score"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "n": 4} and theirs["score"]["mean"] == 2
    pair = found["pairs"]["ours against theirs"]
    assert (pair["wins"], pair["losses"], pair["ties"], pair["flipped_with_order"]) == (4, 0, 0, 0)
    assert pair["first_preferred"] == 0.5 and pair["win_rate"]["mean"] == 1
    assert found["usage"] == {"model": "m", "tokens_in": 1600, "tokens_out": 160, "usd": 0.0048}
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["temperature"] == 0
    said = capsys.readouterr().err
    assert "16 questions (0 are answered already)" in said and "at most about $" in said
    # blind: no system's name goes over the wire
    assert not any(
        "ours" in json.dumps(b["messages"]) or "theirs" in json.dumps(b["messages"]) for *_, b in server.asked
    )


def test_a_judge_that_likes_the_first_gives_ties(files, server, tmp_path):
    server.answer = lambda body: '{"better": 1}'
    code, found = run(files, server, tmp_path, "--mode", "pairs")
    pair = found["pairs"]["ours against theirs"]
    assert code == 0 and "rubric" not in found
    assert (pair["ties"], pair["flipped_with_order"], pair["first_preferred"]) == (4, 4, 1.0)
    assert pair["win_rate"]["mean"] == 0.5 and pair["decided"]["n"] == 0
    assert "NaN" not in (tmp_path / "out.json").read_text()


def test_no_answer_is_paid_for_twice(files, server, tmp_path, capsys):
    server.answer = fair
    first = run(files, server, tmp_path)[1]
    asked = len(server.asked)
    journal = tmp_path / "out.journal.jsonl"
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:-1]) + kept[-1][:20])  # a kill in mid-line
    code, again = run(files, server, tmp_path)
    assert code == 0 and len(server.asked) == asked + 1
    assert again["rubric"] == first["rubric"] and again["pairs"] == first["pairs"]
    assert "1 questions (15 are answered already)" in capsys.readouterr().err
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_estimate_and_limit_ask_nothing(files, server, tmp_path, capsys):
    assert run(files, server, tmp_path, "--estimate", "--price", "1", "1") == (0, None)
    assert run(files, server, tmp_path, "--max-cost", "0.0001", "--price", "1", "1") == (2, None)
    assert "above --max-cost 0.0001" in capsys.readouterr().err and not server.asked


def test_an_unusable_answer_is_asked_once_more_and_then_reported(files, server, tmp_path):
    server.answer = lambda body: '{"coverage": 7, "hallucination": 1, "layout": 1, "score": 1}'
    code, found = run(files, server, tmp_path, "--mode", "rubric", "--limit", "1")
    assert code == 1 and set(found["failures"]) == {"ours/00", "theirs/00"}
    assert len(server.asked) == 4
    assert text_of(server.asked[-1][2]).endswith("from 0 to 6.") and len(server.asked[-1][2]["messages"]) == 2
    assert found["rubric"]["ours"] == {"n": 0}
    server.answer = lambda body: (400, "no such image, please")  # this question, not the server
    code, found = run(files, server, tmp_path, "--mode", "pairs", "--limit", "1")
    assert code == 1 and "no such image" in found["failures"]["theirs/00/1"]
    assert found["pairs"]["ours against theirs"] == {"n": 0}
    server.answer = fair  # what was refused is asked again
    assert run(files, server, tmp_path, "--mode", "pairs", "--limit", "1")[0] == 0


def test_a_server_that_is_no_chat_server(files, server, tmp_path):
    server.answer = lambda body: {"hello": "world"}
    code, found = run(files, server, tmp_path, "--mode", "rubric", "--limit", "1")
    assert code == 1 and len(found["failures"]) == 2


def test_nobody_listens(files, tmp_path, capsys):
    words = ["judge", *files, "--url", "http://127.0.0.1:9/v1", "--model", "m", "-o", str(tmp_path / "o.json")]
    assert main([*words, "--retries", "0"]) == 1
    assert "error: http://127.0.0.1:9/v1 cannot be used: Connection error" in capsys.readouterr().err


def test_a_refused_key_stops_the_run(files, server, tmp_path, capsys):
    server.answer = lambda body: (401, "bad key")
    assert run(files, server, tmp_path)[0] == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {server.url} answers 401") and "bad key" in error


def test_a_deleted_image_stops_the_run_in_one_sentence(files, server, tmp_path, capsys):
    photos = shutil.copytree(files[0], tmp_path / "photos")

    def delete_photos(body):
        shutil.rmtree(photos, ignore_errors=True)
        return fair(body)

    server.answer = delete_photos
    assert run([str(photos), *files[1:]], server, tmp_path, "--concurrency", "1")[0] == 1
    assert re.match("error: .*No such file", capsys.readouterr().err.splitlines()[-1])


def test_a_reasoning_model_gets_its_own_fields(files, server, tmp_path):
    server.answer = fair
    assert run(files, server, tmp_path, "--reasoning", "--limit", "1", "--mode", "rubric")[0] == 0
    body = server.asked[0][2]
    assert body["max_completion_tokens"] > THOUGHTS and not {"temperature", "max_tokens"} & set(body)


def test_over_our_own_server(files, tmp_path, captioning_checkpoint, capsys):
    """Our server's language model writes captions and no grades: the wire works, and the judge says so."""
    pytest.importorskip("uvicorn")
    from serve.engines.transformers import TransformersEngine
    from tests.serve.serving import Running
    from vlv.checkpoints.folder import Checkpoint

    running = Running(Checkpoint.open(captioning_checkpoint), TransformersEngine)
    running.url += "/v1"
    try:
        # "tiny" is what Running calls its model
        words = ["judge", *files, "--url", running.url, "--model", "tiny", "-o", str(tmp_path / "out.json")]
        assert main([*words, "--mode", "rubric", "--limit", "1"]) == 1
        found = json.loads((tmp_path / "out.json").read_text())
        assert set(found["failures"]) == {"ours/00", "theirs/00"} and found["usage"]["tokens_out"] > 10
        kept = [json.loads(line) for line in (tmp_path / "out.journal.jsonl").read_text().splitlines()]
        assert len(kept) == 2 and kept[0]["answer"] == kept[1]["answer"] != ""
        assert main([*words[:-3], "other", *words[-2:], "--limit", "1"]) == 1
        assert "error: " in capsys.readouterr().err.splitlines()[-1]
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "--url and --model"),
        (["--url", "u", "--model", "m"], "-o or --journal"),
        (["--url", "u", "--model", "m", "-o", "x", "--max-cost", "1"], "needs --price"),
    ],
)
def test_misuse(files, options, message, capsys):
    assert main(["judge", *files, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_journal_stays_as_it_is(files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("a line without an end")
    words = ["judge", *files, "--url", "http://127.0.0.1:1", "--model", "m", "--journal", str(tmp_path / "notes.txt")]
    assert main(words) == 2 and "is no journal of answers: choose another --journal" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "a line without an end"


def test_coco_results_of_images_with_numbers(files, server, tmp_path, scene_images):
    """Results have bare ids, the images COCO's file names."""
    photos = tmp_path / "coco"
    photos.mkdir()
    for number in (42, 7):
        shutil.copy(scene_images / "00.png", photos / f"COCO_val2014_{number:012}.png")
    (tmp_path / "c.json").write_text('[{"image_id": 7, "caption": "good"}, {"image_id": 42, "caption": "poor"}]')
    server.answer = fair
    words = [str(photos), "--captions", f"c={tmp_path / 'c.json'}"]
    code, found = run(words, server, tmp_path, "--mode", "rubric")
    assert code == 0 and found["images"] == 2 and found["rubric"]["c"]["coverage"]["mean"] == 3.5


def test_captions_that_do_not_match(scene_images, tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"elsewhere.png": "a cat"}')
    words = ["judge", str(scene_images), "--captions", f"c={tmp_path / 'c.json'}", "--model", "m", "--estimate"]
    assert main(words) == 1 and "no image is in all files" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["judge", str(scene_images), "--captions", "c.json"])
    assert stopped.value.code == 2 and "is not NAME=PATH" in capsys.readouterr().err


GRADES = {"coverage": 5, "hallucination": 4, "layout": 3, "score": 2}
PLAIN = json.dumps(GRADES)
EXAMPLE = json.dumps(dict.fromkeys(GRADES, 0))


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        f"```json\n{json.dumps(GRADES, indent=2)}\n```",
        f"<think>The rubric wants {EXAMPLE} as its form. It is good.</think>\n{PLAIN}",
        f"The rubric wants {EXAMPLE}.\n</think>\n\n{PLAIN}",
        f"Following the format {EXAMPLE}, my grades are:\n```json\n{PLAIN}\n```",
        f'{{"thoughts": "maybe {{coverage: 1}}"}} {PLAIN} {{"note": "done"}}',
        json.dumps({"scores": GRADES, "reason": "fine {or so}"}),
        json.dumps({k: {"score": v, "reason": "r"} for k, v in GRADES.items()}),
        json.dumps({k: str(v) for k, v in GRADES.items()}),
        json.dumps({k: f"{v}/6" for k, v in GRADES.items()}),
        json.dumps({k.capitalize(): v for k, v in GRADES.items()}),
        '{"coverage": 5/6, "hallucination": 4/6, "layout": 3/6, "score": 2/6}',
        '{"coverage": 5, "hallucination": 4, "layout": 3, "score": 2,}',
        "{'coverage': 5, 'hallucination': 4, 'layout': 3, 'score': 2}",
        [{"type": "text", "text": PLAIN}],
    ],
)
def test_the_same_grades_in_every_form(files, server, tmp_path, answer):
    """What models write: thoughts, an example first, a fence, text for numbers, an object in another."""
    server.answer = lambda body: answer
    code, found = run(files, server, tmp_path, "--mode", "rubric", "--limit", "1")
    assert code == 0 and {k: v["mean"] for k, v in found["rubric"]["ours"].items()} == GRADES
    assert len(server.asked) == 2  # no caption was asked about twice


@pytest.mark.parametrize("answer", ["<think>{}", '<think>\n{"better": 2}', "{'better': 3}", '{"better": 1.5}'])
def test_no_verdict_from_thoughts(answer):
    from vlv.common.openai_client import final_text

    with pytest.raises(ValueError, match="JSON object"):
        judge.parse_pair(final_text(answer))


def test_verdicts():
    assert judge.parse_pair('I take {"better": 1} or {"better": 2}: {"better": "0"}') == 0


def test_grades_without_the_papers_score_are_no_answer():
    assert judge.parse_rubric('{"coverage": 4, "hallucination": 6, "layout": 3, "score": 0}')["score"] == 0
    with pytest.raises(ValueError, match='"score": 2'):
        judge.parse_rubric('{"coverage": 4, "hallucination": 6, "layout": 3}')


@pytest.mark.parametrize("answer", ["", "none", '{"better": 3}', '{"better": true}', '{"better": "one"}', "{bad}"])
def test_no_verdict(answer):
    with pytest.raises(ValueError, match="JSON object"):
        judge.parse_pair(answer)


def test_wilson_by_hand():
    """Wilson's interval for 8 of 10: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10)."""
    found = wilson(8, 10)
    assert found["low"] == pytest.approx(0.49016, abs=1e-5) and found["high"] == pytest.approx(0.94331, abs=1e-5)
    assert wilson(0, 10)["low"] == pytest.approx(0, abs=1e-12) and wilson(10, 10)["high"] == pytest.approx(1)
    assert wilson(0, 0) == {"mean": None, "low": 0, "high": 1, "n": 0}  # as JSON knows it
    with pytest.raises(ValueError, match="3 wins of 2"):
        wilson(3, 2)


def test_bootstrap_agrees_with_the_normal_approximation():
    """Of 400 zeros and 400 ones the mean's deviation is 0.5 / sqrt(800); 10,000 draws give it to about 2 %."""
    found = bootstrap([0.0] * 400 + [1.0] * 400)
    half = 1.96 * 0.5 / 800**0.5
    assert found["mean"] == 0.5
    assert found["high"] - 0.5 == pytest.approx(half, rel=0.05) and 0.5 - found["low"] == pytest.approx(half, rel=0.05)
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no judgement"):
        bootstrap([])


def test_compare_counts_images():
    verdicts = {"o/a/1": 1, "o/a/2": 2, "o/b/1": 2, "o/b/2": 1, "o/c/1": 1, "o/c/2": 0, "o/d/1": 0, "o/d/2": 0}
    found = judge.compare(verdicts | {"o/e/1": 1}, "o", list("abcde"))
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (4, 1, 1, 2)
    assert found["win_rate"]["mean"] == 0.5 and found["flipped_with_order"] == 0
    assert found["decided"]["mean"] == 0.5
