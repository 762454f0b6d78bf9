"""GPU operations of VLV, one a file, each with its plain PyTorch reference.

Hugging Face's optional library `kernels` has the same import name. Where it is installed, transformers and
diffusers find its metadata, and then `import kernels` gives them this folder. So this package also provides that
library: its submodules are found after ours, and a name that we lack comes from its `__init__.py`, which runs at the
first access to such a name. No file here may have the name of one of its modules, and this package has no
`__version__`, by which transformers would take it for the library; both are tested.
"""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from threading import RLock

_OURS = list(__path__)
_THEIR_NAME = f"{__name__}._huggingface"
_loading = RLock()

try:
    # by its metadata, not by sys.path, where this very folder would be found
    _their_init = distribution("kernels").locate_file("kernels/__init__.py")
    __path__.append(str(_their_init.parent))
except PackageNotFoundError:
    _their_init = None


def __getattr__(name: str):
    """Return a name that this package does not define from Hugging Face's library, if it is installed."""
    # `from kernels import window_attention` asks here first; AttributeError sends Python on to our file
    if _their_init is None or PathFinder.find_spec(f"{__name__}.{name}", _OURS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _loading:
        if _THEIR_NAME not in sys.modules:
            # a plain module inside this package, so that its relative imports mean `kernels.*`, as its absolute ones do
            spec = spec_from_file_location(_THEIR_NAME, _their_init)
            module = sys.modules[_THEIR_NAME] = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[_THEIR_NAME]
                raise
    return getattr(sys.modules[_THEIR_NAME], name)
