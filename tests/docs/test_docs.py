"""The documentation is true: its commands are taken by what they name, its messages are in the code, its links lead
somewhere, its drawing is current. Commands that need a hub, a GPU or a cluster are held against the options that exist;
the quick ones run. The README's are run by tests/test_readme.py."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
by_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
PACKAGES = ("kernels", "vlv", "export", "serve", "benchmarks")
OUTSIDE = {
    "pip",
    "docker",
    "kubectl",
    "helm",
    "hf",
    "curl",
    "source",
    "bash",
}  # not ours: only the files that they name are looked at
RUN = [
    "python -m vlv.checkpoint assets/vlv-tiny",
    "python -m serve.server --keys keys.json --new-key alice",
    "python -m serve.vllm_caption assets/samples --ckpt assets/vlv-tiny --engine transformers --limit 2 -o out/2.jsonl",
    "python -m vlv.reconstruct assets/samples/scene-00100.png --ckpt assets/vlv-tiny -o out/drawn --steps 10",
]


def commands(page: Path) -> list[str]:
    """The lines of a page's sh blocks, and of its indented ones that call Python; continued lines are joined."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"^    ((?:\w+=\S+ )*python -m .*)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return [line for line in lines if words_of(line)]


def words_of(command: str) -> list[str]:
    """A command's words without comment and assignments before it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    return words


@functools.cache
def options_of(*module: str) -> set[str]:
    """The options that the --help of a module, or of a module's subcommand, lists."""
    done = subprocess.run(
        [sys.executable, "-m", *module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{module} --help: {done.stderr[-500:]}"
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


@functools.cache
def options_of_vllm() -> set[str]:
    """The options that the installed vLLM's sources declare for `vllm serve`."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    folder = Path(found.origin).parent
    sources = [folder / "engine/arg_utils.py", *folder.glob("entrypoints/**/cli_args.py")]
    text = "".join(source.read_text() for source in sources)
    fields = re.findall(r"^    (\w+): ", text, re.M)
    return set(re.findall(r'"(--[\w-]+)"', text)) | {"--" + field.replace("_", "-") for field in fields}


def parse(module: str, words: list[str]) -> None:
    """Raise AssertionError where a command's parser refuses the words, say because one is missing."""
    if importlib.util.find_spec(module) is None or module.split(".")[0] not in PACKAGES:
        return
    if parser := getattr(importlib.import_module(module), "parser", None):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                parser().parse_args(list(itertools.takewhile(lambda word: word not in ("&", "|", ">", "&&"), words)))
            except SystemExit as end:
                assert not end.code, told.getvalue().splitlines()[-1]


def check(words: list[str]) -> None:
    """Raise AssertionError where a command has an option, a module or a file that does not exist."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    if words[0] in ("python", ".venv/bin/python"):
        assert words[1] == "-m" or (ROOT / words[1]).is_file(), words
        if words[2].startswith("vllm."):
            assert used - {"-m"} <= options_of_vllm(), used - options_of_vllm()
        elif words[1] == "-m" and words[2] != "pytest":
            missing = used - {"-m"} - options_of(words[2])
            if missing and words[3].isalpha():
                missing -= options_of(*words[2:4])
            assert not missing, f"{words[2]} takes no {missing}"
            parse(words[2], words[3:])
    elif words[:2] == ["vllm", "serve"]:
        assert used <= options_of_vllm(), used - options_of_vllm()
    elif words[:3] == ["optimum-cli", "export", "vlv"]:
        assert used <= options_of("export.onnx")
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= {*targets}
    else:
        assert words[0] in OUTSIDE, f"unknown command {words[0]}: teach this test to check it"
    for before, word in itertools.pairwise(words):
        written = before in ("-o", "--out", "--output")
        if not written and re.match(r"(deploy|assets|docs|scripts|benchmarks|requirements)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"


@by_page
def test_every_command_is_taken(page):
    for command in commands(page):
        try:
            check(words_of(command))
        except AssertionError as error:
            raise AssertionError(f"{page.name}: {command}: {error}") from error


def test_wrong_commands_are_noticed():
    lacking = "python -m export.trt --ckpt x --out y"
    for command in (lacking, "python -m serve.server --nonsense", "make tea", "vllm serve x --nonsense", "rm -rf /"):
        with pytest.raises(AssertionError):
            check(words_of(command))


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.split()[2])
def test_quick_commands_run(command, tmp_path):
    assert any(command in commands(page) for page in DOCS), "no page has it any more"
    words = [str(tmp_path / w) if w.startswith("out/") or w == "keys.json" else w for w in shlex.split(command)]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@functools.cache
def messages() -> list[str]:
    """Every text in the code, with … for what is filled in."""
    found = set()
    for package in PACKAGES[:-1]:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return sorted(found)


@pytest.mark.parametrize("title", re.findall(r"^### (.+)", (ROOT / "docs/troubleshooting.md").read_text(), re.M))
def test_messages_are_the_codes(title):
    pattern = ".*".join(map(re.escape, title.strip("…").split("…")))
    assert any(re.search(pattern, text) for text in messages()), "no message of the code reads so"


@pytest.mark.parametrize("page", [*DOCS, README, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    there = {"modules.md", "api.md"}  # made when the site is built
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert "://" in target or target in there or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*DOCS, README, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    if page.name == "log.md":
        return  # it tells of files that were
    files = re.findall(r"`((?:kernels|vlv|export|serve|tests|benchmarks|scripts|deploy)/[\w./-]*)`", page.read_text())
    written = {"benchmarks/gpu/kernels.json"}  # by a run on a GPU
    assert not [file for file in files if "NAME" not in file and file not in written and not (ROOT / file).exists()]


def test_the_readme_commands_for_a_gpu_are_taken():
    """They cannot run here: their options and files are checked, and that the locked packages are our requirements."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S) for line in block.splitlines()
    ]
    assert any("requirements/gpu.lock" in line for line in lines)
    for line in lines:
        words = shlex.split(line)
        command = Path(words[0]).name
        if command in scripts:
            parse(scripts[command].split(":")[0], words[1:])
        else:
            assert command.startswith("python") and "pip install" in line, line
            assert all((ROOT / word).exists() for word in words if word.startswith("requirements/")), line


def hook():
    spec = importlib.util.spec_from_file_location("docs_modules", ROOT / "scripts" / "docs_modules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_name_every_module_and_public_class():
    made = hook()
    modules, api = made.modules(), made.api()
    for path in (ROOT / "serve").glob("*.py"):
        assert f"`serve/{path.name}`" in modules
    for expected in (
        "class VLVEncoder",
        "def resolve(",
        "class LLMEngine(ABC)",
        "async def generate(self",
        "class CaptionRun",
    ):
        assert expected in api
    assert not [module for module in made.PUBLIC if f"\n## {module}\n" not in api]


def test_the_navigation_is_complete():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    text = str(site["nav"])
    for name in re.findall(r"[\w-]+\.md", text):
        assert (ROOT / "docs" / name).exists() or name in hook().GENERATED, name


def test_the_site_builds_without_a_warning(tmp_path):
    mkdocs = shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed (pip install mkdocs)")
    done = subprocess.run([mkdocs, "build", "--strict", "-q", "-d", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class VLVEncoder" in (tmp_path / "api" / "index.html").read_text()


def test_the_architecture_is_current():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "import_graph.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
