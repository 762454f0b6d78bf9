"""Serve the encoder that runs in the page: the folder web/ that `export.edge --web` writes.

The page loads it when the user asks for it, and sends embeddings to /v1/generate instead of images.
"""

from __future__ import annotations

import json
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from export.manifest import source_hash
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import Misuse

ABOUT = "web.json"
SCRIPTS = (".js", ".mjs")


class BrowserEncoder:
    """The files of one folder web/, by the paths at which web.json names them."""

    def __init__(self, folder: Path, checkpoint: Checkpoint):
        """Check that the folder is complete and of this checkpoint. Raises Misuse."""
        make = (
            f"make it: python -m export.edge --ckpt {checkpoint.folder} --out BUNDLE --web node_modules/onnxruntime-web"
        )
        try:
            about = json.loads((folder / ABOUT).read_text())
            self._files = {name: folder / name for name in (ABOUT, *about["modules"], *about["files"])}
            absent = [name for name, file in self._files.items() if not file.is_file()]
            absent += [name for name, entry in about["files"].items() if self._size(name) != entry["bytes"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Misuse(f"--web {folder}: expected the folder web/ of an edge bundle, with {ABOUT}; {make}") from error
        if absent:
            raise Misuse(f"--web {folder}: {absent[0]} is missing or not complete; {make}")
        if about["source"] != source_hash(checkpoint, "encoder"):
            raise Misuse(f"--web {folder} was made from another checkpoint's encoder; {make}")

    def _size(self, name: str) -> int:
        return self._files[name].stat().st_size if self._files[name].is_file() else -1

    def response(self, name: str) -> FileResponse:
        """Return a file. Raises HTTPException 404 for a name that web.json does not have."""
        if name not in self._files:
            raise HTTPException(404)
        # scripts have no hash in their address
        caching = "no-cache" if name == ABOUT or is_script(name) else "private, max-age=31536000"
        kind = "text/javascript" if is_script(name) else "application/octet-stream"
        return FileResponse(self._files[name], headers={"Cache-Control": caching}, media_type=kind)


def is_script(name: str) -> bool:
    """Return True for a module of JavaScript, which browsers load without a key."""
    return name.endswith(SCRIPTS)
