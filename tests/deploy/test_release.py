"""A release: the wheel that its source archive builds, installed beside nothing but its dependencies."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.deploy.conftest import ROOT, run

COMMANDS = [
    "serve.vllm_caption", "serve.server", "serve.gateway", "serve.bench", "export.onnx", "export.trt", "export.verify",
    "export.bench", "vlv.reconstruct", "vlv.published", "vlv.checkpoint", "vlv.train.stage1", "kernels.aot",
]  # fmt: skip
LIBRARY = Path(sys.prefix) / "hf-kernels"


@pytest.fixture(scope="module")
def installed(clean_venv, wheel):
    """A Python that has the wheel, to be run in a folder where the tree is not."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", clean_venv / "bin/python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=wheel.parent)

    def python(*arguments, **options) -> str:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | options.pop("env", {})
        return run(clean_venv / "bin/python", *arguments, cwd=wheel.parent, env=env, **options)

    return python


def test_the_wheel_holds_the_packages_and_their_data(wheel, tree):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    # not kernels: Hugging Face's library has kernels/__init__.py, and one would overwrite the other
    assert top == {"_vlv", "vlv.pth", "optimum"}
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]  # a namespace
    packages = ("vlv", "export", "serve", "optimum", "kernels")
    kept = [
        str(path.relative_to(tree)) for package in packages for path in (tree / package).rglob("*") if path.is_file()
    ]
    there = {name.removeprefix("_vlv/") for name in names}
    assert not [name for name in kept if name not in there]
    assert "_vlv/vlv/assets/OFL.txt" in names  # the glyphs' licence goes where they go


def test_the_source_archive_can_be_set_up_and_tested(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "setup.py",
        "Makefile",
        "README.md",
        "requirements/cpu.lock",
        "requirements/test.lock",
        "scripts/setup.sh",
    }
    assert needed | {"serve/http/web/app.js", "tests/conftest.py", "docs/serving.md"} <= names


def test_imports_and_data_are_the_wheels(installed, clean_venv):
    code = """
import json, export.runtimes.base, kernels.window_attention, serve.http.web.page, serve.server, vlv.model.encoder
import vlv.data.scenes
vlv.data.scenes.render(vlv.data.scenes.sample(0))
import kernels.runtime.tuning
print(json.dumps([m.__file__ for m in (export.runtimes.base, kernels, serve.http.web.page, vlv.model.encoder)]
                 + [serve.http.web.page.PAGE]))
"""
    *files, page = json.loads(installed("-c", code))
    assert all(Path(file).is_relative_to(clean_venv) for file in files), files
    assert "<title>VLV captions" in page


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_answer(installed, module):
    assert "usage: python -m " + module in installed("-m", module, "--help")


@pytest.mark.skipif(
    not (LIBRARY / "done").exists(),
    reason="Hugging Face's kernels is not in .venv/hf-kernels; `make test` puts it there",
)
def test_beside_hugging_faces_kernels(installed):
    """Both in one site-packages, as pip puts them: each is found, and neither has lost a file."""
    code = """
from transformers import Qwen2ForCausalLM
import vlv.model.encoder
import kernels
assert kernels.get_kernel
from kernels.window_attention import window_attention
"""
    installed("-c", f"import sys; sys.path.insert(1, {str(LIBRARY)!r})\n{code}")


def test_the_bill_of_materials(installed):
    bom = json.loads(installed(ROOT / "deploy" / "docker" / "sbom.py"))
    versions = {c["name"]: c["version"] for c in bom["components"]}
    assert bom["bomFormat"] == "CycloneDX" and versions["vlv"] == "0.1.0" and "torch" in versions
    stated = [c for c in bom["components"] if c.get("licenses")]
    assert len(stated) > 0.8 * len(bom["components"])
