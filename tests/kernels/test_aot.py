"""Ahead-of-time builds: compiled without a GPU, their parameters, their loader, and no new spills."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kernels.add_norm import add_norm_op
from kernels.aot import build, manifest
from kernels.aot import cases as aot_cases
from kernels.aot import load as aot_loader
from kernels.aot.__main__ import main
from kernels.aot.compile import compile_launch, signature
from kernels.channel_attention import channel_attention_op
from kernels.occupancy import LIMITS, occupancy
from kernels.runtime import tuning
from kernels.runtime.launch import function, recording
from kernels.runtime.spec import Launch
from kernels.runtime.tiles import cdiv

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="building needs Triton: pip install triton",
)


def start(**args) -> Launch:
    grid = lambda meta: (3, cdiv(args["width"], meta["BLOCK"]))  # noqa: E731
    return Launch("add_norm.forward", "c8", grid, args, {"BLOCK": 4}, {})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Builds of one small kernel, as the command makes them."""
    out = tmp_path_factory.mktemp("builds")
    everything = aot_cases.launches

    def few(*args):
        return {key: one for key, one in everything(*args).items() if one.kernel == "cross_attention.forward"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "launches", few)
        assert main(["--target", "sm80,sm90", "--parts", "unet", "--out", str(out)]) == 0
    return out


@needs_triton
def test_manifest_describes_the_files(built):
    content = json.loads((built / "manifest.json").read_text())
    assert set(content["targets"]) == {"sm80", "sm90"}
    for target, entries in content["targets"].items():
        (entry,) = entries.values()
        assert aot_loader.Builds(built).binary(entry).startswith(b"\x7fELF")
        ptx = (built / f"{entry['file']}.ptx").read_text()
        assert f".target {target.replace('sm', 'sm_')}" in ptx and 0 < entry["registers"] <= 255
        # the loader's parameters are the PTX's, one for one, scratch pointers included
        kinds = re.findall(r"\.param \.(\w+)", re.search(r"\.entry.*?\n\)", ptx, re.DOTALL)[0])
        launch = next(one for one in aot_cases.launches(target, parts=("unet",)).values() if one.key() in entries)
        tensors = {name: torch.empty(64) if isinstance(v, torch.Tensor) else v for name, v in launch.args.items()}
        packed = aot_loader.pack(entry["arguments"], tensors)
        sizes = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}
        assert [ctypes.sizeof(value) for value in packed] == [sizes[kind] for kind in kinds]


@needs_triton
def test_damaged_build_is_refused(built, tmp_path):
    builds = aot_loader.Builds(built)
    entry = dict(next(iter(builds.targets["sm80"].values())), sha256="0" * 64)
    with pytest.raises(ValueError, match="not the file that the manifest describes"):
        builds.binary(entry)


def test_missing_builds_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m kernels\.aot"):
        aot_loader.Builds(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "targets": {"sm80": {}}}))
    builds = aot_loader.Builds(tmp_path)
    with pytest.raises(KeyError, match="not for this GPU's sm90"):
        builds.entry(start(width=8), "sm90")
    with pytest.raises(KeyError, match=r"no build of add_norm\.forward width=i32 BLOCK=4"):
        builds.entry(start(width=8), "sm80")


def test_without_a_driver_one_sentence(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(OSError, match=r"no libcuda\.so\.1 here"):
        aot_loader.driver.__wrapped__()


def test_parameters_are_packed_as_the_build_reads_them():
    x = torch.empty(8)
    signature = {"x": "*fp32:16", "n": "i32", "stride": "1", "big": "i64:16", "scale": "fp32"}
    packed = aot_loader.pack(signature, {"x": x, "n": -3, "stride": 1, "big": 2**40, "scale": 0.5})
    assert b"".join(bytes(value) for value in packed) == struct.pack("=Qiqf", x.data_ptr(), -3, 2**40, 0.5) + bytes(16)


@pytest.mark.parametrize(
    "kind, value, message",
    [("1", 2, "for n = 1"), ("i32:16", 8, "multiples of 16"), ("i32", 2**31, "32-bit")],
)
def test_wrong_parameters_are_refused(kind, value, message):
    with pytest.raises(ValueError, match=message):
        aot_loader.pack({"n": kind}, {"n": value})


def test_signature_follows_the_values():
    x = torch.empty(9)
    one = start(a=x, b=x[1:], c=torch.empty(2, dtype=torch.uint8, device="meta"), n=32, m=7, one=1, s=0.5, w=2**33)
    assert one.signature() == {
        "a": "*fp32:16", "b": "*fp32", "c": "*u8:16", "n": "i32:16", "m": "i32", "one": "1", "s": "fp32",
        "w": "i64:16",
    }  # fmt: skip


def test_the_grid_is_a_function_of_the_constants():
    assert start(width=9).blocks() == (3, 3, 1)
    one = replace(start(width=9), grid=lambda meta: (5 * meta["BLOCK"], cdiv(5, meta["BLOCK"]), 5 // 2))
    assert one.blocks() == (20, 2, 2)


@needs_triton
def test_arguments_are_in_the_kernels_order():
    for one in aot_cases.launches("sm90").values():
        kernel = function(one.kernel)
        assert list(signature(one)) == [name for name in kernel.arg_names if name in one.args], one.kernel


def test_new_spills_are_named():
    found = {"a": {"spills": 8}, "b": {"spills": 4}, "c": {"spills": 0}}
    assert manifest.new_spills(found, {"a": {"spills": 8}}) == ["b spills 4 bytes of a thread, 0 before"]


@needs_triton
@pytest.mark.slow
def test_no_spills_that_were_not_there_before():
    """Every launch for one of the targets, in turn; `python -m kernels.aot --target … --check` builds all for all."""
    command = [sys.executable, "-m", "kernels.aot", "--target", ",".join(manifest.TARGETS), "--check", "--in-turn"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_tensor_descriptors_build_for_hopper(causal):
    """Copied by the hardware, and without spills; not ahead of time, as descriptors lie in scratch memory."""
    starts = [one for one in aot_cases.launches("sm90").values() if one.kernel == "attention.forward"]
    one = next(one for one in starts if one.constants["CAUSAL"] is causal)
    assert one.constants["DESCRIBABLE"]
    for candidate in (config for config in tuning.CANDIDATES[one.kernel] if config["TMA"]):
        constants, options = tuning.split(candidate)
        trial = replace(one, constants={**one.constants, **constants}, options=options)
        built = compile_launch(trial, 90, scratch=True)
        assert built.spills == 0 and "cp.async.bulk.tensor" in built.ptx and "wgmma" in built.ptx
    with pytest.raises(ValueError, match="scratch memory"):
        compile_launch(trial, 90)


def test_baseline_and_tuned_defaults_are_complete():
    """Every launch of the published models has its entry; a changed kernel or shape needs a new baseline."""
    baseline, table = json.loads(manifest.BASELINE.read_text()), tuning.table()
    for target in manifest.TARGETS:
        assert set(baseline[target]) == set(aot_cases.launches(target)), f"python -m kernels.aot --target {target} …"
        assert not any(built["spills"] for built in baseline[target].values())
        entry = table[target]
        assert "untested" in entry["label"]
        for one in aot_cases.launches(target).values():
            chosen = entry["kernels"][one.kernel][one.shape]["config"]
            assert all({**one.constants, **one.options}[name] == value for name, value in chosen.items())


@needs_triton
@pytest.mark.parametrize("shape, design, tile, warps", [("c1024", 1, 2, 4), ("c512", 2, 4, 8), ("c2048", 0, 4, 8)])
def test_the_largest_tiles_of_the_convolution_do_not_spill(shape, design, tile, warps):
    names, largest = ("DESIGN", "TILE", "num_warps"), (design, tile, warps)
    (config,) = (
        one for one in tuning.candidates("dwconv_norm.forward", shape) if tuple(map(one.get, names)) == largest
    )
    one = next(one for one in aot_cases.launches("sm90").values() if one.shape == shape and "RESIDUAL" in one.constants)
    assert one.constants["RESIDUAL"]
    constants, options = tuning.split(config)
    assert compile_launch(replace(one, constants={**one.constants, **constants}, options=options), 90).spills == 0


def test_tiles_that_spill_are_no_candidates():
    tiles = {shape: tuning.candidates("dwconv_norm.forward", shape) for shape in ("c256", "c512", "c1024", "c2048")}
    assert [shape for shape, found in tiles.items() if any(one["TILE"] == 16 for one in found)] == ["c256"]
    largest = [max(one["TILE"] for one in found if one["DESIGN"]) for found in tiles.values()]
    assert largest == [4, 4, 2, 2] and min(map(len, tiles.values())) >= 8


@needs_triton
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16, 17, 31, 64])
def test_any_batch_finds_its_builds(batch):
    """Sizes that depend on the batch are compiled in where they are multiples of 16."""
    builds = aot_cases.launches("sm90", parts=("encoder",))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with tuning.forced("sm90"), recording() as record:
        for side, c, heads in aot_cases.STAGES:
            channel_attention_op._init_fn(empty(batch, side * side, 3 * c), heads)
        for tokens, c in ((77, 1024), (591, 1024)):
            x = empty(batch, tokens, c)
            for residual in (x, empty(tokens, c)):
                add_norm_op._init_fn(x, residual, empty(c), empty(c), 1e-5, False)
    assert len(record) == 12 and {one.key() for one in record} <= set(builds)


def test_occupancy():
    """By hand: 128 threads of 64 registers fill an A100's 2048 threads to 1024; its 164 KiB hold two of 60 KiB."""
    assert occupancy(LIMITS["sm80"], 4, 64, 0) == 0.5
    assert occupancy(LIMITS["sm80"], 4, 64, 60 * 1024) == 2 * 4 / 64
    assert occupancy(LIMITS["sm86"], 4, 64, 101 * 1024) == 0


def test_a_sample_is_no_build(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--in-turn", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "for --check alone" in capsys.readouterr().err


@pytest.mark.parametrize("option, value", [("--target", "sm75"), ("--parts", "engine")])
def test_wrong_words_list_the_right_ones(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([option, value])
    assert stopped.value.code == 2 and f"{value}: choose from" in capsys.readouterr().err


def test_nothing_imports_triton():
    code = "import sys, kernels.aot, kernels.aot.load, vlv.model.encoder; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
