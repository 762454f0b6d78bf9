"""Open what --ckpt names: a checkpoint folder, or published weights, which are converted once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from vlv.checkpoints.folder import Checkpoint, MissingCheckpoint
from vlv.checkpoints.names import is_hub_id, missing_reason
from vlv.checkpoints.published_config import download
from vlv.checkpoints.published_read import convert
from vlv.checkpoints.tensor_files import weight_files
from vlv.common.command import say
from vlv.common.files import OutputExists


def fetch(source: str | Path) -> Path:
    """Return the source's path; a hub id is downloaded, or taken from the cache. Raises CheckpointError."""
    if is_hub_id(str(source)):
        return download(str(source), weights=True)
    if reason := missing_reason(source):
        raise MissingCheckpoint(reason)
    return Path(source)


def resolve(ckpt: str | Path) -> Checkpoint:
    """Open a checkpoint folder; published weights are converted once, into the cache. Raises CheckpointError.

    The cache is $XDG_CACHE_HOME/vlv/published (default ~/.cache); its key is the weight files' paths, sizes and times.
    """
    if (Path(ckpt) / "vlv.json").is_file():
        return Checkpoint.open(ckpt)
    source = fetch(ckpt).resolve()
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(source)]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlv" / "published"
    out = cache / f"{str(ckpt).strip('/').replace('/', '--')[-60:]}-{key}"
    if not (out / "vlv.json").is_file():
        say(f"converting {ckpt} once, to {out}")
        try:
            return convert(source, out)
        except OutputExists:  # another process converted it in the meantime
            pass
    return Checkpoint.open(out)
