"""Keep the device code of one GPU architecture: python deploy/docker/slim_cuda.py --sm 90 /opt/vlv [--report FILE]

CUDA libraries hold the same kernels for many architectures. In every shared library below the folders this removes
what a GPU of compute capability SM would not run, and what no loader reads, such as debug information, and shortens the
file. Memory looks as before, but for zeros in place of the removed code: a library is a list of segments, and a segment
may be longer in memory than in its file, so that each removed range splits a segment in two. A debugger finds less in
such a library. Only the standard library is needed; the image's build runs it.

Of each fat binary (magic 0xBA55ED50; an entry has its kind at byte 0, the sizes of its header and payload at 4 and 8,
and its architecture at 28) these entries stay: the machine code of the highest architecture with the major number of SM
that is not above SM; without one, the PTX of the highest architecture that is not above SM; and entries of other kinds.
Libraries of NO_CODE keep none.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# what a server on one NVIDIA GPU with CUDA 13 does not open: archives for profilers, code for CUDA 12 and AMD's GPUs, a
# second build of NVRTC, solvers on several GPUs, and vLLM's other HTTP server
UNUSED = (
    "cupti/*.a",
    "nvidia_cutlass_dsl/cu12/lib/*.so",
    "_cutlass_ir.cu12.*.so",
    "backends/amd/lib/*.so",
    "libnvrtc*.alt.so.*",
    "libcusolverMg.so.*",
    "vllm/vllm-rs",
)
# torch links to these, and calls cuFFT in torch.fft alone and nothing of cuRAND: no device code stays
NO_CODE = ("libcufft.so.*", "libcurand.so.*")
MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, CUBIN = 1, 2  # kinds of entries
MIN_HOLE = 1 << 16  # bytes; smaller ranges become zeros in the file
PAGES = {62: 4096, 183: 65536}  # largest page by ELF machine: x86-64, AArch64
ELF64 = b"\x7fELF\x02\x01"  # little-endian
LOAD, PROGRAM_HEADERS, NO_SEGMENT = 1, 6, 0  # ELF's PT_LOAD, PT_PHDR, PT_NULL
SHARED = 3  # ELF's ET_DYN
SECTION_HEADER = 64  # bytes
SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, address, physical address, file size, memory size, align
Range = tuple[int, int]  # offsets in a file: the first byte, and the one after the last


@dataclass(frozen=True)
class Entry:
    """One entry of a fat binary."""

    kind: int
    architecture: int  # such as 90
    payload: Range


def fat_binaries(content: bytes) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary in a file's content."""
    at = content.find(MAGIC)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", content, at + 4) if at + 16 <= len(content) else (0, 0, 0)
        entries = _entries(content, at + header, at + header + size) if version == 1 and header == 16 else None
        if entries:
            yield entries
        at = content.find(MAGIC, at + header + size if entries else at + 4)


def _entries(content: bytes, at: int, end: int) -> list[Entry] | None:
    """Return the entries between two offsets; None if they do not hold a list of entries."""
    entries = []
    while at < end <= len(content) and at + 64 <= len(content):
        kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
        (architecture,) = struct.unpack_from("<I", content, at + 28)
        if header < 32 or at + header + size > end:
            return None
        entries.append(Entry(kind, architecture, (at + header, at + header + size)))
        at += header + size
    return entries if at == end else None


def unused(entries: list[Entry], sm: int) -> list[Entry]:
    """Return the entries of a fat binary that a GPU of compute capability `sm` (such as 90) would not run."""
    runs = [e.architecture for e in entries if e.kind == CUBIN and e.architecture // 10 == sm // 10]
    best = max((a for a in runs if a <= sm), default=None)
    ptx = max((e.architecture for e in entries if e.kind == PTX and e.architecture <= sm), default=None)
    kept = (CUBIN, best) if best is not None else (PTX, ptx)
    return [e for e in entries if e.kind in (PTX, CUBIN) and (e.kind, e.architecture) != kept]


def merged(ranges: list[Range]) -> list[Range]:
    """Return ranges in order, those that touch or overlap as one."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def segments_of(content: bytes | bytearray) -> list[tuple]:
    """Return the segments of an ELF file, each with SEGMENT's fields."""
    offset, size, count = *struct.unpack_from("<Q", content, 32), *struct.unpack_from("<HH", content, 54)
    return [SEGMENT.unpack_from(content, offset + i * size) for i in range(count)]


def is_shortened(content: bytes) -> bool:
    """Return True if a library has no section headers, as after `shorten`."""
    return struct.unpack_from("<Q", content, 40) == (0,)


def same_memory(data: bytearray, short: bytearray) -> bool:
    """Return True if a loader makes the same memory of two libraries, but for the offsets in the ELF header."""
    before = [s for s in segments_of(data) if s[0] == LOAD]
    after = [s for s in segments_of(short) if s[0] == LOAD]
    for _, flags, offset, address, _, in_file, in_memory, _ in after:
        (old,) = (s for s in before if s[3] <= address < s[3] + s[6])
        start = old[2] + address - old[3]
        zeros = max(start + in_file, min(start + in_memory, old[2] + old[5]))
        skip = max(0, 64 - offset)
        same = memoryview(data)[start + skip : start + in_file] == memoryview(short)[offset + skip : offset + in_file]
        if not same or flags != old[1] or data.count(0, start + in_file, zeros) != zeros - start - in_file:
            return False
    return sum(s[6] for s in before) == sum(s[6] for s in after)


def shorten(content: bytes, drop: list[Range]) -> bytes | bytearray:
    """Return an ELF library without the bytes of `drop`, which are zeros in memory, and without what no loader reads.

    That is everything after the last segment: symbols, debug information and the headers of sections. A library that
    would hardly be shorter is returned with the zeros alone. Raises ValueError.
    """
    page = PAGES.get(struct.unpack_from("<H", content, 18)[0])
    if page is None:
        raise ValueError("not for x86-64 or AArch64")
    data = bytearray(content)
    for first, last in drop:
        data[first:last] = bytes(last - first)
    segments = segments_of(data)
    loaded = [(s[2], s[2] + s[5]) for s in segments if s[0] == LOAD]
    holes = []
    for first, last in drop:
        first, last = -(-first // page) * page, last // page * page
        inside = [a for a, b in loaded if a < first and last < b]  # a segment keeps its first and its last bytes
        if last - first >= max(MIN_HOLE, page) and len(inside) == 1:
            holes.append((first, last))
    end = max(s[2] + s[5] for s in segments)
    if not holes and len(data) - end < MIN_HOLE:
        return data

    def moved(old: int) -> int:
        """Return where an offset is once the holes are gone."""
        return old - sum(min(last, old) - first for first, last in holes if first < old)

    table = [piece for segment in segments for piece in _pieces(segment, holes, page, moved)]
    if len(table) >= 0xFFFF:
        raise ValueError(f"{len(table)} segments are more than ELF allows")
    short, at = bytearray(), 0
    for first, last in [*holes, (end, end)]:
        short += memoryview(data)[at:first]
        at = last
    # on a page of its own, after all others: no segment may seem to contain the table
    short += bytes(-len(short) % page)
    struct.pack_into("<QQ", short, 32, len(short), 0)
    struct.pack_into("<HHHH", short, 56, len(table), SECTION_HEADER, 0, 0)
    short += b"".join(SEGMENT.pack(*segment) for segment in table)
    if not same_memory(data, short):
        raise ValueError("its memory would not be the same")
    return short


def _pieces(segment: tuple, holes: list[Range], page: int, moved) -> Iterator[tuple]:
    """Yield a segment as the segments that it becomes: each has bytes of the file, then zeros up to the next one."""
    kind, flags, offset, address, physical, in_file, in_memory, align = segment
    if kind == PROGRAM_HEADERS:
        kind = NO_SEGMENT  # the table is in no segment any more
    mine = (
        [(first, last) for first, last in holes if offset < first and last < offset + in_file] if kind == LOAD else []
    )
    if not mine:
        yield (
            kind,
            flags,
            moved(offset),
            address,
            physical,
            in_file,
            in_memory,
            min(align, page) if kind == LOAD else align,
        )
        return
    begins = [offset, *(last for _, last in mine)]
    ends = [*(first for first, _ in mine), offset + in_file]
    for begin, end, following in zip(begins, ends, [*begins[1:], None], strict=True):
        shift = begin - offset
        memory = following - begin if following is not None else in_memory - shift
        yield kind, flags, moved(begin), address + shift, physical + shift, end - begin, memory, min(align, page)


def slim(file: Path, sm: int) -> dict | None:
    """Shorten a library in place, atomically; return its bytes before and after, and the architectures of its code.

    Returns None for other files, and for a library that was shortened before. Raises ValueError.
    """
    content = file.read_bytes()
    if content[:6] != ELF64 or struct.unpack_from("<H", content, 16) != (SHARED,) or is_shortened(content):
        return None
    drop, architectures = [], Counter()
    no_code = any(file.match(name) for name in NO_CODE)
    for entries in fat_binaries(content):
        drop += [entry.payload for entry in (entries if no_code else unused(entries, sm))]
        for entry in entries:
            kind = {PTX: "ptx", CUBIN: "sm"}.get(entry.kind, f"kind {entry.kind}, ")
            architectures[f"{kind}{entry.architecture}"] += entry.payload[1] - entry.payload[0]
    short = shorten(content, merged(drop))
    if short != content:
        temporary = file.with_name(f".{file.name}.slim")
        temporary.write_bytes(short)
        temporary.chmod(file.stat().st_mode & 0o7777)
        os.replace(temporary, file)
    return {"before": len(content), "after": len(short), "architectures": dict(architectures.most_common())}


def remove_unused(folders: list[Path]) -> int:
    """Delete the files of UNUSED below folders; return their bytes."""
    removed = 0
    for path in [path for folder in folders if folder.is_dir() for name in UNUSED for path in folder.rglob(name)]:
        removed += path.lstat().st_size
        path.unlink()
    return removed


def libraries(folders: list[Path]) -> Iterator[Path]:
    """Yield the shared libraries below folders, not through links."""
    for folder in folders:
        for path in sorted(folder.rglob("*.so*")) if folder.is_dir() else [folder]:
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    if file.read(4) == b"\x7fELF":
                        yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--sm", type=int, required=True, help="compute capability without its point, such as 90")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write sizes and architectures as JSON")
    args = parser.parse_args()
    found, removed = {}, remove_unused(args.folders)
    for path in libraries(args.folders):
        try:
            if (sizes := slim(path, args.sm)) is not None:
                found[str(path)] = sizes
        except ValueError as error:
            print(f"{path}: left as it is: {error}", file=sys.stderr)
    before, after = (sum(sizes[key] for sizes in found.values()) for key in ("before", "after"))
    print(f"{removed:,} bytes of unused files removed")
    code = sum(bool(sizes["architectures"]) for sizes in found.values())
    print(
        f"{len(found)} libraries, {code} with device code: {before:,} bytes before, {after:,} with SM {args.sm} alone"
    )
    if args.report:
        args.report.write_text(
            json.dumps({"sm": args.sm, "removed": removed, "before": before, "after": after, "files": found}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
