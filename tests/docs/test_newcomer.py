"""scripts/newcomer.sh on small repositories whose README is right, and wrong in one place."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = """\
# A project
## Try it without a GPU
It takes 0.1 GB on disk.

```sh
make demo
make test
```

`make demo` creates `.venv`, and writes `out/captions.jsonl` and `out/page.html`. Nothing else.

```bash
make not-for-newcomers
```

## Commands
```sh
cp out/captions.jsonl other.jsonl
true -o other.jsonl
```

## Train it yourself
```sh
make not-for-newcomers
```
"""
MAKEFILE = """\
demo:
\tmkdir .venv out
\ttouch .venv/python
\techo '{"id": "assets/samples/a.png", "caption": "A cat."}' >out/captions.jsonl
\techo page >out/page.html
"""


@pytest.fixture
def repository(tmp_path):
    """Make a repository, with changes of its files, and return what the script does there."""

    def run(**changes: str) -> tuple[int, str, Path]:
        folder = tmp_path / "repository"
        files = {"README.md": README, "Makefile": MAKEFILE, ".gitignore": ".venv\nout\nother.jsonl\n"}
        files |= {"assets/samples/a.png": "image"} | changes
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "newcomer.sh", folder / "scripts")
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *words], check=True)
        report = tmp_path / "report.json"
        command = [folder / "scripts" / "newcomer.sh", "--json", report]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr, report

    return run


def test_each_command_is_followed_and_timed(repository):
    code, stderr, report = repository()
    assert code == 0, stderr
    found = json.loads(report.read_text())
    followed = ["git clone", "make demo", "cp out/captions.jsonl other.jsonl", "true -o other.jsonl"]
    assert [step["command"] for step in found["steps"]] == followed and found["left_out"] == ["make test"]
    assert 0 < found["first_caption_seconds"] < 60 and found["environment_gb"] < 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"README.md": README.replace("make demo\n", "make nothing\n")}, "this command of README failed: make nothing"),
        ({"Makefile": MAKEFILE.replace("page.html", "x.html")}, "leaves out/page.html: it is not there"),
        ({"README.md": README.replace("-o other", "-o absent")}, "leaves absent.jsonl: it is not there"),
        ({"Makefile": MAKEFILE.replace("A cat.", "")}, "does not hold a caption of each image"),
        ({"assets/samples/b.png": "another"}, "does not hold a caption of each image"),
        ({".gitignore": ".venv\nout\n"}, "leave files that git does not ignore: ?? other.jsonl"),
        ({"README.md": README.replace("0.1 GB", "0.000000001 GB")}, "and README says 0.000000001 GB"),
    ],
)
def test_the_first_thing_that_is_not_so_ends_it(repository, changes, words):
    code, stderr, report = repository(**changes)
    assert code == 1 and words in stderr and not report.exists()
