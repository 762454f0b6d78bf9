"""deploy/docker/slim_cuda.py: which device code stays, and that a shortened library's memory is what it was."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import struct
import subprocess
import sys

import pytest

from tests.deploy.conftest import ROOT

TOOL = ROOT / "deploy/docker/slim_cuda.py"
spec = importlib.util.spec_from_file_location("slim_cuda", TOOL)
slim_cuda = importlib.util.module_from_spec(spec)
sys.modules["slim_cuda"] = slim_cuda
spec.loader.exec_module(slim_cuda)
PTX, SM, OTHER = 1, 2, 16


def fat_binary(entries: list[tuple[int, int, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a fat binary, as nvcc and cuobjdump lay it out, and the range of each entry's payload."""
    body, ranges = b"", []
    for kind, architecture, payload in entries:
        payload += bytes(-len(payload) % 8)
        header = struct.pack("<HHIQIIIIIIQQQ", kind, 0x101, 64, len(payload), 0, 0, 0, architecture, 64, 0, 0, 0, 0)
        assert len(header) == 64
        ranges.append((16 + len(body) + 64, 16 + len(body) + 64 + len(payload)))
        body += header + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body, ranges


@pytest.mark.parametrize(
    ("sm", "held", "kept"),
    [
        (90, [(SM, 80), (SM, 90), (SM, 90), (SM, 100), (PTX, 90)], [(SM, 90), (SM, 90)]),  # 90 and 90a
        (89, [(SM, 80), (SM, 86), (SM, 90), (PTX, 90)], [(SM, 86)]),  # code of 8.6 runs on 8.9
        (86, [(SM, 80), (SM, 89)], [(SM, 80)]),  # code of 8.9 does not run on 8.6
        (90, [(SM, 80), (SM, 86), (PTX, 80), (PTX, 86)], [(PTX, 86)]),  # compiled by the driver
        (90, [(SM, 120), (PTX, 120)], []),  # nothing of it could run
        (120, [(SM, 100), (SM, 120), (OTHER, 0)], [(SM, 120), (OTHER, 0)]),
    ],
)
def test_what_a_gpu_runs_stays(sm, held, kept):
    content, _ = fat_binary([(kind, architecture, b"code") for kind, architecture in held])
    (entries,) = slim_cuda.fat_binaries(b"before" + content + b"after")
    assert [(e.kind, e.architecture) for e in entries] == held
    dropped = slim_cuda.unused(entries, sm)
    assert [(e.kind, e.architecture) for e in entries if e not in dropped] == kept


def test_what_only_looks_like_device_code_is_none():
    content, _ = fat_binary([(SM, 90, b"code" * 10)])
    assert not list(slim_cuda.fat_binaries(content[:-1]))  # cut
    assert not list(slim_cuda.fat_binaries(struct.pack("<I", 0xBA55ED50) * 9))
    assert not list(slim_cuda.fat_binaries(content[:4] + b"\2" + content[5:]))  # another version


SOURCE = r"""
#include <stddef.h>
__asm__(".section .nv_fatbin,\"a\"\n.balign 8\n.globl fatbin\nfatbin:\n.incbin \"fat.bin\"\n.previous\n");
extern const unsigned char fatbin[];
const unsigned char *const wrapped = fatbin; /* relocated, as the wrapper of a fat binary is */
static char zeros[100000];
static int counter = 41;
_Thread_local int local = 7;
const unsigned char *data(void) { zeros[99999] = 1; counter += local - 6; return wrapped + counter - 42 + zeros[5]; }
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="a C compiler is needed to make a library")
def test_a_shortened_library_has_the_same_memory(tmp_path):
    """All bytes of the fat binary, read through a relocated pointer, are the old ones or, where dropped, zeros."""
    random.seed(0)
    code = [random.randbytes(size) for size in (300_001, 200_000, 5_000, 700_000, 150_000, 90_000)]
    kinds = [(SM, 80), (SM, 90), (SM, 100), (SM, 120), (PTX, 120), (SM, 90)]
    content, ranges = fat_binary([(*kind, payload) for kind, payload in zip(kinds, code, strict=True)])
    (tmp_path / "fat.bin").write_bytes(content * 2)
    (tmp_path / "lib.c").write_text(SOURCE)
    library = tmp_path / "libcode.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o"]
    subprocess.run([*command, library, "lib.c"], cwd=tmp_path, check=True)
    names = "\n".join(f"static int name_{i}_{'x' * 100}(void) {{ return {i}; }}" for i in range(800))
    uses = "".join(f"+ name_{i}_{'x' * 100}()" for i in range(800))
    (tmp_path / "plain.c").write_text(f"{names}\nint total(void) {{ return 0 {uses}; }}")
    plain = tmp_path / "plain.so"
    subprocess.run([*command[:3], "-g", "-o", plain, "plain.c"], cwd=tmp_path, check=True)
    before, plain_before = library.stat().st_size, plain.stat().st_size
    (tmp_path / "link.so").symlink_to(library)
    (tmp_path / "text.so").write_text("not a library")
    (tmp_path / "sub/backends/amd/lib").mkdir(parents=True)
    unused, used = tmp_path / "sub/backends/amd/lib/codegen.so", tmp_path / "sub/backends/codegen.so"
    unused.write_bytes(bytes(1000))
    used.write_bytes(bytes(10))
    report = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, TOOL, "--sm", "90", tmp_path, "--report", report], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("1,000 bytes of unused files removed\n2 libraries, 1 with device code: ")
    assert used.exists() and not unused.exists()
    sizes = json.loads(report.read_text())
    assert sizes["before"] == before + plain_before
    assert sizes["after"] == library.stat().st_size + plain.stat().st_size
    assert plain.stat().st_size < plain_before / 2  # its debug information is gone, and it runs
    script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).total())"
    run = subprocess.run([sys.executable, "-c", script, plain], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 800 * 799 // 2
    dropped = 2 * (300_001 + 5_000 + 700_000 + 150_000)
    kept = before - dropped
    assert kept - 20_000 < library.stat().st_size < kept + 20_000 + 2 * (5_000 + 4 * 2 * 4096)

    expected = bytearray(content)  # what the library holds twice
    for (first, last), kind in zip(ranges, kinds, strict=True):
        if kind != (SM, 90):
            expected[first:last] = bytes(last - first)
    script = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.data.restype = ctypes.c_void_p; "
        "sys.stdout.buffer.write(ctypes.string_at(library.data(), int(sys.argv[2])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, library, str(2 * len(content))], capture_output=True, check=True
    )
    assert run.stdout == bytes(expected) * 2
    content = library.read_bytes()
    again = subprocess.run([sys.executable, TOOL, "--sm", "80", library], capture_output=True, text=True, check=True)
    assert "0 libraries, 0 with" in again.stdout and library.read_bytes() == content  # once is enough


@pytest.mark.skipif(not shutil.which("gcc"), reason="a C compiler is needed to make a library")
def test_a_library_that_captions_do_not_call_keeps_no_code(tmp_path):
    random.seed(0)
    code = [random.randbytes(size) for size in (300_000, 100_000, 4_000)]
    content, _ = fat_binary([(SM, 90, code[0]), (PTX, 75, code[1]), (8, 75, code[2])])
    (tmp_path / "fat.bin").write_bytes(content)
    (tmp_path / "lib.c").write_text(SOURCE)
    libraries = [tmp_path / "libcurand.so.10", tmp_path / "libother.so"]
    for library in libraries:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, "lib.c"], cwd=tmp_path, check=True)
    (tmp_path / "libcusolverMg.so.12").write_bytes(bytes(500))
    run = subprocess.run([sys.executable, TOOL, "--sm", "90", tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("500 bytes of unused files removed\n2 libraries, 2 with device code: ")
    kept = [[part in library.read_bytes() for part in code] for library in libraries]
    assert kept == [[False] * 3, [True, False, True]]
    for library in libraries:
        subprocess.run([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", library], check=True)
