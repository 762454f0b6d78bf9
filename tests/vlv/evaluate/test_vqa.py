"""Text-only VQA: the official normalisation and accuracy by hand, the official files, and few-shot prompts."""

import json

import pytest

from vlv.evaluate.__main__ import main
from vlv.evaluate.judges import vqa
from vlv.evaluate.judges.answers import short_answer
from vlv.evaluate.metrics.vqa_accuracy import CONTRACTIONS, accuracy, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat!", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("a red, round ball", "red round ball"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("black/white", "black white"),  # between letters a mark becomes a space
        ("black / white", "black white"),  # beside a space it goes
        ("1,000", "1000"),  # with a number's comma all marks go
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),  # a period before a digit stays
        ("U.S.", "us"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("im", "im"),  # its entries with a capital I never match
        ("well", "well"),
    ],
)
def test_official_normalisation(text, expected):
    assert normalise(text) == expected


def test_the_official_contractions():
    """Spot checks of the published table, and its length: one row for each apostrophe that may be missing."""
    for bare, spelled in {"aint": "ain't", "oclock": "o'clock", "twas": "'twas", "'ow'sat": "'ow's'at"}.items():
        assert CONTRACTIONS[bare] == spelled
    assert len(CONTRACTIONS) == 114
    assert not {"shell", "were", "ill", "wed", "shed", "hell", "its", "id"} & set(CONTRACTIONS)


def test_accuracy_leaves_each_person_out():
    """3 of 10 say so: for those three 2 others agree, for the other seven 3: (3 * 2/3 + 7 * 1) / 10 = 0.9."""
    assert accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx(0.9)
    assert accuracy("cat", ["cat"] * 1 + ["dog"] * 9) == pytest.approx(0.3)
    assert accuracy("cat", ["cat"] * 4 + ["dog"] * 6) == 1
    assert accuracy("cow", ["cat"] * 4 + ["dog"] * 6) == 0
    assert accuracy("The two", ["2"] * 5 + ["3"] * 5) == 1


def test_where_all_agree_nothing_is_normalised():
    """As the official code has it: then only the very words count."""
    assert accuracy("two", ["2"] * 10) == 0 and accuracy("2\n", ["2"] * 10) == 1
    with pytest.raises(ValueError, match="without answers"):
        accuracy("x", [])


QUESTIONS = [(1, 42, "What is it?", ["cat"] * 10, "other"), (2, 42, "How many?", ["1"] * 4 + ["2"] * 6, "number")]
QUESTIONS += [(3, 7, "Is it day?", ["yes"] * 9 + ["no"], "yes/no"), (4, 99, "Nothing?", ["no"] * 10, "yes/no")]


def write(folder, name, rows):
    questions = [{"question_id": i, "image_id": image, "question": q} for i, image, q, *_ in rows]
    annotations = [
        {
            "question_id": i,
            "image_id": image,
            "answer_type": kind,
            "question_type": "what",
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": j} for j, a in enumerate(answers, 1)],
        }
        for i, image, _, answers, kind in rows
    ]
    (folder / f"{name}-q.json").write_text(json.dumps({"questions": questions, "task_type": "Open-Ended"}))
    (folder / f"{name}-a.json").write_text(json.dumps({"annotations": annotations, "data_type": "mscoco"}))


@pytest.fixture
def words(tmp_path, server):
    """The command over two data files: questions of images 42 and 7, examples of 42 and of 100 to 139."""
    write(tmp_path, "val", QUESTIONS)
    train = [(1000 + i, 100 + i, f"Example {i}?", [f"answer{i}"] * 10, "other") for i in range(40)]
    write(tmp_path, "train", [*train, (2000, 42, "Forbidden?", ["leak"] * 10, "other")])
    captions = {"COCO_val2014_000000000042.jpg": "A cat.", "COCO_val2014_000000000007.jpg": "A sunny street."}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    examples = {f"COCO_train2014_{100 + i:012}.jpg": f"Picture {i}." for i in range(40)} | {
        "COCO_x_000042.jpg": "A cat."
    }
    (tmp_path / "t.json").write_text(json.dumps(examples))
    command = ["vqa", "--captions", f"ours={tmp_path / 'c.json'}", "--questions", tmp_path / "val-q.json"]
    command += [
        "--annotations",
        tmp_path / "val-a.json",
        "--url",
        server.url,
        "--model",
        "m",
        "-o",
        tmp_path / "o.json",
    ]
    return [str(w) for w in command]


def shots(tmp_path):
    found = ["--train-questions", tmp_path / "train-q.json", "--train-annotations", tmp_path / "train-a.json"]
    return [str(w) for w in found] + ["--train-captions", f"ours={tmp_path / 't.json'}"]


def test_answers_from_captions_alone(words, server, tmp_path):
    def answer(body):
        text = body["messages"][1]["content"]
        asked = text.rsplit("Question: ", 1)[1]
        return {"What": "Cat.", "How ": "two", "Is i": "\nyes\nbecause"}[asked[:4]]

    server.answer = answer
    assert main([*words, "--shots", "0"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    # "Cat." is written as "cat"; "two" is the "2" of six; "yes" that of nine
    assert found["rows"][0]["by_kind"] == {"number": 100.0, "other": 100.0, "yes/no": 100.0}
    assert found["rows"][0]["accuracy"]["mean"] == pytest.approx(100)
    assert (found["questions"], found["without_caption"]) == (3, 1)
    sent = [json.dumps(body["messages"]) for _, _, body in server.asked]  # in any order: they are asked at once
    assert not any("image_url" in s for s in sent) and any("Description: A cat." in s for s in sent)


def test_examples_come_from_other_images(words, server, tmp_path):
    server.answer = lambda body: "cat"
    assert main([*words, *shots(tmp_path), "--shots", "0", "4", "32"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert [r["shots"] for r in found["rows"]] == [0, 4, 32]
    texts = [body["messages"][1]["content"] for *_, body in server.asked]
    assert sorted(t.count("Answer: ") for t in texts) == [0] * 3 + [4] * 3 + [32] * 3
    assert not any("leak" in t for t in texts if t.endswith("What is it?\nAnswer:") or t.endswith("How many?\nAnswer:"))
    asked = len(server.asked)
    assert main([*words, *shots(tmp_path), "--shots", "0", "4", "32"]) == 0
    assert len(server.asked) == asked  # the draws are the same, so nothing is asked again


def test_ids_may_be_texts_and_come_once(tmp_path):
    questions, annotations = tmp_path / "q.json", tmp_path / "a.json"
    asked = {"question_id": 7, "question": "What?"}
    answered = {"question_id": "7", "image_id": "42", "answers": [{"answer": "cat"}]}
    questions.write_text(json.dumps({"questions": [asked]}))
    annotations.write_text(json.dumps({"annotations": [answered]}))
    (item,) = vqa.load_items(questions, annotations)
    assert (item.image, item.question, item.answers) == (42, "What?", ("cat",))
    for wrong, words in (
        ([answered, {**answered, "question_id": 7}], "two annotations of one question"),
        ([{**answered, "answers": []}], "question 7 has no answers"),
        ([{**answered, "image_id": "a.png"}], "no pair of official VQA files"),
    ):
        annotations.write_text(json.dumps({"annotations": wrong}))
        with pytest.raises(ValueError, match=words):
            vqa.load_items(questions, annotations)


def test_what_cannot_be_done(words, tmp_path, capsys):
    assert main([*words, "--shots", "4"]) == 2 and "--shots above 0 needs" in capsys.readouterr().err
    assert main([*words, *shots(tmp_path), "--shots", "41"]) == 1 and "too few for 41" in capsys.readouterr().err
    assert main([*words, "--shots", "-1"]) == 2 and "--shots -1" in capsys.readouterr().err
    (tmp_path / "val-q.json").write_text('{"questions": []}')
    assert main([*words, "--shots", "0"]) == 1 and "no pair of official VQA files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        "yes", "Yes", "YES.", "**yes**", "`yes`", '"yes"', "'Yes.'", "“yes”", "answer: yes", "**Answer:** yes",
        "Answer:\nyes", "The answer is: Yes", "The final answer is **yes**.", "- yes", "> yes", "# Yes",
        "\\boxed{yes}", "<answer>yes</answer>", "\nyes\nbecause it is said",
        "<think>\nThe caption says no, then so.\n</think>\n\nyes", "The caption says so.\n</think>\n\nyes",
        [{"type": "text", "text": "yes"}],
    ],
)  # fmt: skip
def test_a_right_answer_in_every_form_scores_100(server, tmp_path, answer):
    """All ten people say "yes", so the official rules compare the words as they are."""
    write(tmp_path, "val", [(1, 2, "Is there a fish?", ["yes"] * 10, "yes/no")])
    (tmp_path / "c.jsonl").write_text('{"id":"COCO_val2014_000000000002.jpg","caption":"A fish."}\n')
    server.answer = lambda body: answer
    command = ["vqa", "--captions", f"ours={tmp_path / 'c.jsonl'}", "--shots", 0, "-o", tmp_path / "o.json"]
    command += ["--questions", tmp_path / "val-q.json", "--annotations", tmp_path / "val-a.json"]
    command += ["--url", server.url, "--model", "m"]
    assert main([str(w) for w in command]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"][0]["accuracy"]["mean"] == 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("U.S.", "u.s."), ("#1", "#1"), ("3.5", "3.5"), ("6'2\"", "6'2\""), ("dogs'", "dogs'"),
        ("answer phone", "answer phone"), ("t-shirt", "t-shirt"), ("a_b", "a_b"), ("2 * 3", "2 * 3"), ("", ""),
        ("Black Cat", "black cat"), ("**", "**"), (" \n ", ""), ("no", "no"), ("Answer: 'twas", "'twas"),
    ],
)  # fmt: skip
def test_only_markup_is_taken_off(text, expected):
    assert short_answer(text) == expected


def test_an_empty_answer_counts_as_wrong_and_is_reported(words, server, tmp_path):
    server.answer = lambda body: ""
    assert main([*words, "--shots", "0"]) == 1
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["rows"][0]["accuracy"]["mean"] == 0 and len(found["failures"]) == 3


def test_image_numbers(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "x/COCO_val2014_000000000042.jpg", "caption": "a"}\n')
    assert vqa.captions_by_number(tmp_path / "c.jsonl") == {42: "a"}


def test_numbers_of_coco_files_come_from_the_file_name(tmp_path):
    """Our own COCO output numbers its images from 1; plain COCO results have the real ids."""
    ours = {
        "images": [
            {"id": 1, "file_name": "x/COCO_val2014_000000000003.png"},
            {"id": 3, "file_name": "y/000000000001.jpg"},
        ],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a"}, {"id": 2, "image_id": 3, "caption": "b"}],
    }
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    assert vqa.captions_by_number(tmp_path / "ours.json") == {3: "a", 1: "b"}
    (tmp_path / "results.json").write_text('[{"image_id": 3, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    assert vqa.captions_by_number(tmp_path / "results.json") == {3: "a", 1: "b"}
    (tmp_path / "both.json").write_text(
        '{"COCO_val2014_000000000042.jpg": "a", "COCO_train2014_000000000042.jpg": "b"}'
    )
    with pytest.raises(ValueError, match="have the same image number 42"):
        vqa.captions_by_number(tmp_path / "both.json")
