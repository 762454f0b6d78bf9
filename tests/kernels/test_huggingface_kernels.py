"""Our kernels/ and Hugging Face's library of that name, the real one, in one Python."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(sys.prefix) / "hf-kernels"

with_library = pytest.mark.skipif(
    not (LIBRARY / "done").exists(),
    reason="Hugging Face's kernels is not in .venv/hf-kernels; `make test` puts it there",
)


def run(code: str, tmp_path: Path, *folders: Path) -> None:
    """Run the code in a fresh Python that sees the repository, then the folders, then what is installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@with_library
def test_transformers_finds_the_library(tmp_path: Path) -> None:
    code = f"""
from transformers import Qwen2ForCausalLM
from transformers.utils import is_kernels_available
assert is_kernels_available(), "the version under test is not one that transformers accepts"

import kernels
assert kernels.__file__ == {str(ROOT / "kernels/__init__.py")!r}
assert kernels.get_kernel.__code__.co_filename.startswith({str(LIBRARY)!r})
assert kernels.__version__.startswith("0.")

from kernels import Mode
from kernels.layer import mode
assert Mode is mode.Mode, "the library was imported twice"

from kernels.window_attention import window_attention
"""
    run(code, tmp_path, LIBRARY)


@with_library
def test_our_modules_are_found_behind_the_library(tmp_path: Path) -> None:
    """With the library first on sys.path, as in site-packages beside an editable install of ours."""
    code = f"""
import sys
sys.path.insert(0, {str(LIBRARY)!r})
import vlv.model.encoder
import kernels
assert kernels.__file__.startswith({str(LIBRARY)!r}) and kernels.get_kernel
assert sys.modules["kernels.window_attention"].__file__.startswith({str(ROOT)!r})
from transformers import Qwen2ForCausalLM
"""
    run(code, tmp_path, LIBRARY)


@with_library
def test_our_modules_do_not_wait_for_the_library(tmp_path: Path) -> None:
    code = f"""
import sys
import kernels.channel_attention
from kernels import window_attention
loaded = [module.__file__ or "" for name, module in sys.modules.items() if name.startswith("kernels.")]
assert loaded and not [file for file in loaded if file.startswith({str(LIBRARY)!r})]
"""
    run(code, tmp_path, LIBRARY)


@with_library
def test_an_error_in_the_library_is_not_hidden(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None  # importing it now fails
import kernels
for attempt in range(2):  # the second must not find a half-made module
    try:
        kernels.get_kernel
    except ImportError as error:
        assert "huggingface_hub" in str(error)
    else:
        raise AssertionError("no ImportError")
"""
    run(code, tmp_path, LIBRARY)


@with_library
def test_no_module_has_two_owners() -> None:
    ours, theirs = (
        {module.name for module in pkgutil.iter_modules([str(folder / "kernels")])} for folder in (ROOT, LIBRARY)
    )
    assert theirs and not ours & theirs


def test_commands_are_found_behind_any_library_of_that_name(tmp_path: Path) -> None:
    """As with the wheel: the library's folder comes first, and `python -m kernels.aot` fails."""
    (tmp_path / "site/kernels").mkdir(parents=True)
    (tmp_path / "site/kernels/__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "site", ROOT)))}
    for words, code, said in (
        (["kernels.aot", "--help"], 1, "No module named kernels.aot"),
        (["vlv", "kernels.aot", "--help"], 0, "--write-baseline"),
        (["vlv", "kernels.aot", "--target", "sm91"], 2, "--target sm91: choose from sm80"),
        (["vlv", "kernels.occupancy", "--help"], 0, "usage: python -m kernels.occupancy"),
        (["vlv", "kernels.runtime.launch"], 2, "error: argument module: invalid choice"),
    ):
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr, (words, done)


def test_without_the_library(tmp_path: Path) -> None:
    try:
        distribution("kernels")
    except PackageNotFoundError:
        pass
    else:
        pytest.skip("Hugging Face's kernels is installed in this environment itself")
    code = """
import kernels
from kernels.window_attention import window_attention
assert not hasattr(kernels, "nonexistent") and not hasattr(kernels, "__version__")
for statement in ("import kernels.nonexistent", "from kernels import nonexistent"):
    try:
        exec(statement)
    except ImportError:
        continue
    raise AssertionError(f"no ImportError: {statement}")

from diffusers.utils import is_kernels_available
assert not is_kernels_available(), "diffusers takes our folder for the library"
from transformers.utils import is_kernels_available
assert not is_kernels_available(), "transformers takes our folder for the library"
"""
    run(code, tmp_path)
