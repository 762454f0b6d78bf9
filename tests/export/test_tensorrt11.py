"""TensorRT 11's interface as its own bindings declare it: every name, argument count and keyword that we use is there.

The bindings come without the library. Ten functions of C stand in for it, which suffice to import them, not to build.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("export/builders/tensorrt.py", "export/runtimes/tensorrt_library.py", "export/runtimes/tensorrt.py")
# our variables, and what they hold
HOLDS = {
    "trt": "", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "config": "IBuilderConfig", "shapes": "IOptimizationProfile", "refitter": "Refitter", "engine": "ICudaEngine",
    "_runtime": "Runtime", "_engine": "ICudaEngine", "_context": "IExecutionContext",
}  # fmt: skip
RTX_ALONE = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}  # in branches for it
OURS = {"precision", "components", "command", "force"}  # of our own ExportConfig, which is called config, too
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
STAND_IN = """
void *createInferBuilder_INTERNAL() {return 0;} void *createInferRefitter_INTERNAL() {return 0;}
void *createInferRuntime_INTERNAL() {return 0;} void *createNvOnnxParserRefitter_INTERNAL() {return 0;}
void *createNvOnnxParser_INTERNAL() {return 0;} void *getBuilderPluginRegistry() {return 0;}
void *getPluginRegistry() {return 0;} int getNvOnnxParserVersion() {return 110400;}
int initLibNvInferPlugins() {return 1;}
"""
# every class, enumeration and method, with the signatures in its docstring
LIST = """
import json, tensorrt_bindings as trt
members = {name: {m: str(getattr(getattr(value, m), "__doc__", "")) for m in dir(value)}
           for name, value in vars(trt).items() if name != "__builtins__"}
print(json.dumps({"version": trt.__version__, "members": members}))
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Name -> its members -> their docstrings."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("TensorRT's bindings are not here: pip install --no-deps tensorrt-cu13-bindings")
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("a C compiler is needed to stand in for TensorRT's library")
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "stand_in.c").write_text(STAND_IN)
    for name in LIBRARIES:
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}.so.11", "-o", folder / f"{name}.so.11"]
        subprocess.run([compiler, *flags, folder / "stand_in.c"], check=True)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    run = subprocess.run(
        [sys.executable, "-c", LIST], env={**os.environ, "LD_LIBRARY_PATH": paths}, check=True, capture_output=True,
        text=True, cwd=folder,
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert found["version"].startswith("11.")
    return found["members"]


def used(source: str) -> list[tuple[str, str, ast.Call | None]]:
    """(class or "" for the module, member, the call if it is one) of everything that is asked of TensorRT."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        value = node.value
        holder = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else None
        if holder in HOLDS:
            found.append((HOLDS[holder], node.attr, calls.get(id(node))))
        elif isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "trt":
            found.append((value.attr, node.attr, calls.get(id(node))))  # trt.BuilderFlag.REFIT
    return [entry for entry in found if not {entry[0], entry[1]} & (RTX_ALONE | OURS)]


def accepts(signatures: str, call: ast.Call) -> bool:
    """Whether one of a docstring's signatures takes the call's arguments: by their number, and by the keywords."""
    wanted = {keyword.arg for keyword in call.keywords}
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    for parameters in re.findall(r"\w+\((.*?)\) -> ", signatures):
        names = [part.split(":")[0].strip() for part in re.split(r",\s*(?=\w+:)", parameters) if ":" in part]
        if not isinstance(call.func, ast.Attribute) or call.func.attr != "__init__":  # called on the class, with self
            names = [name for name in names if name != "self"]
        if wanted <= set(names) and (starred or len(call.args) + len(wanted) <= len(names)):
            return True
    return False


@pytest.mark.parametrize("path", SOURCES)
def test_what_we_call_is_there(path, bindings):
    asked = used((ROOT / path).read_text())
    assert asked
    for owner, member, call in asked:
        place = bindings[owner] if owner else bindings
        assert member in place, f"{path}: TensorRT 11 has no {owner}.{member}"
        if owner and call is not None:
            assert accepts(place[member], call), f"{path}: {owner}.{member} does not take {ast.unparse(call)}"


def test_most_calls_are_seen():
    assert sum(len(used((ROOT / path).read_text())) for path in SOURCES) > 30


def test_a_wrong_call_would_be_found():
    signature = "set_timing_cache(self: IBuilderConfig, cache: ITimingCache, ignore_mismatch: bool) -> bool"
    for text, right in (("f(c, ignore_mismatch=False)", True), ("f(c, mismatch=False)", False), ("f(1, 2, 3)", False)):
        assert accepts(signature, ast.parse(text, mode="eval").body) == right
    assert used("trt.BuilderFlag.FP16\nconfig.gone()")[0][:2] == ("BuilderFlag", "FP16")
    assert used("config.gone()")[0][:2] == ("IBuilderConfig", "gone")
