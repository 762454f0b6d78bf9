"""The VLV model: what the paper describes, its training, its checkpoints."""

from pathlib import Path

import kernels

# Hugging Face's library `kernels` may come before ours on sys.path: then ours joins it (see kernels/__init__.py)
if (_ours := str(Path(__file__).parent.with_name("kernels"))) not in kernels.__path__:
    kernels.__path__.append(_ours)
