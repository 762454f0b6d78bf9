"""Find a checkpoint by what --ckpt names: a folder of ours, or published weights, which are converted once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from vlv.checkpoints.folder import Checkpoint, CheckpointError


def fetch(source: str | Path) -> Path:
    """The source's path; a hub id is downloaded, or taken from the cache. Raises CheckpointError."""
    from vlv.checkpoints.published_config import download, is_hub_id

    if is_hub_id(str(source)):
        return download(str(source), weights=True)
    if not Path(source).exists():
        raise CheckpointError(
            f"no checkpoint at {source}: expected a folder with vlv.json, published weights, or a hub id (owner/model)"
        )
    return Path(source)


def resolve(ckpt: str | Path) -> Checkpoint:
    """A checkpoint folder of ours, opened; or a published one, converted once into the cache and opened.

    The cache is $XDG_CACHE_HOME/vlv/published (default ~/.cache); its key is the weight files' paths, sizes and times.
    """
    if (Path(ckpt) / "vlv.json").is_file():
        return Checkpoint.open(ckpt)
    from vlv.checkpoints.published_read import convert
    from vlv.checkpoints.tensor_files import weight_files
    from vlv.common.files import OutputExists

    source = fetch(ckpt).resolve()
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(source)]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlv" / "published"
    out = cache / f"{str(ckpt).strip('/').replace('/', '--')[-60:]}-{key}"
    if not (out / "vlv.json").is_file():
        print(f"converting {ckpt} once, to {out}", file=sys.stderr)
        try:
            return convert(source, out)
        except OutputExists:  # another process was faster
            pass
    return Checkpoint.open(out)
