"""Call llama.cpp: prompt embeddings and tokens of many sequences in one batch, and its quantizer. Needs only NumPy.

    llama = Llama(Path("llm.gguf"), sequences=8, positions=512, threads=2)
    logits = llama.step([Entry(0, 0, embeds)])           # embeds: float32 [queries, width]; logits: [1, vocabulary]
    logits = llama.step([Entry(0, 77, token), Entry(1, 0, other)])     # [2, vocabulary]
    llama.release(0)
    llama.close()

The library is the extension module of the wheel `xllamacpp`, which exports llama.cpp's C functions; its own Python
interface takes no embeddings. C structures carry no version, and a field that moves would be read as another one, so
any version but PINNED is refused. llama.cpp ends the process on some wrong arguments: `step` checks them before.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import deque
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlv.common.command import INSTALL, UserError

PACKAGE, PINNED = "xllamacpp", "2026.10.11549"
BUILDER = f"{PACKAGE} {PINNED}"
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
CELLS = 256  # the cache's size is a multiple of it
DECODE = 1  # LLAMA_PROCESS_TYPE_DECODE
PROBLEMS = (3, 4)  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR

_POINTER, _INT32, _UINT32, _FLOAT, _BOOL = (
    ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool,
)  # fmt: skip


class LlamaError(UserError, RuntimeError):
    """Raised where llama.cpp is missing or of another version, or fails; the message gives the reason."""


class _ModelParams(ctypes.Structure):
    """llama_model_params of PINNED."""

    _fields_ = (
        ("devices", _POINTER),
        ("tensor_buft_overrides", _POINTER),
        ("n_gpu_layers", _INT32),
        ("split_mode", _INT32),
        ("load_mode", _INT32),
        ("lazy_mode", _INT32),
        ("main_gpu", _INT32),
        ("tensor_split", _POINTER),
        ("progress_callback", _POINTER),
        ("progress_callback_user_data", _POINTER),
        ("kv_overrides", _POINTER),
        ("vocab_only", _BOOL),
        ("check_tensors", _BOOL),
        ("use_extra_bufts", _BOOL),
        ("no_host", _BOOL),
        ("no_alloc", _BOOL),
        ("load_mtp", _BOOL),
    )


class _ContextParams(ctypes.Structure):
    """llama_context_params of PINNED."""

    _fields_ = (
        ("n_ctx", _UINT32),
        ("n_batch", _UINT32),
        ("n_ubatch", _UINT32),
        ("n_seq_max", _UINT32),
        ("n_rs_seq", _UINT32),
        ("n_outputs_max", _UINT32),
        ("n_outputs_max_per_seq", _UINT32),
        ("n_threads", _INT32),
        ("n_threads_batch", _INT32),
        ("ctx_type", _INT32),
        ("rope_scaling_type", _INT32),
        ("pooling_type", _INT32),
        ("attention_type", _INT32),
        ("flash_attn_type", _INT32),
        ("rope_freq_base", _FLOAT),
        ("rope_freq_scale", _FLOAT),
        ("yarn_ext_factor", _FLOAT),
        ("yarn_attn_factor", _FLOAT),
        ("yarn_beta_fast", _FLOAT),
        ("yarn_beta_slow", _FLOAT),
        ("yarn_orig_ctx", _UINT32),
        ("defrag_thold", _FLOAT),
        ("cb_eval", _POINTER),
        ("cb_eval_user_data", _POINTER),
        ("type_k", _INT32),
        ("type_v", _INT32),
        ("moe_cache_size", ctypes.c_size_t),
        ("abort_callback", _POINTER),
        ("abort_callback_data", _POINTER),
        ("embeddings", _BOOL),
        ("offload_kqv", _BOOL),
        ("no_perf", _BOOL),
        ("op_offload", _BOOL),
        ("swa_full", _BOOL),
        ("kv_unified", _BOOL),
        ("samplers", _POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _POINTER),
    )


class _Batch(ctypes.Structure):
    """llama_batch of PINNED."""

    _fields_ = (
        ("n_tokens", _INT32),
        ("token", _POINTER),
        ("embd", _POINTER),
        ("pos", _POINTER),
        ("n_seq_id", _POINTER),
        ("seq_id", _POINTER),
        ("logits", _POINTER),
    )


class _Embd(ctypes.Structure):
    """llama_embd of PINNED: one row of embeddings."""

    _fields_ = (("data", _POINTER), ("n_rows", ctypes.c_size_t), ("n_embd", ctypes.c_size_t))


_FUNCTIONS = {  # name: result, arguments
    "llama_backend_init": (None,),
    "llama_model_default_params": (_ModelParams,),
    "llama_context_default_params": (_ContextParams,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, _ModelParams),
    "llama_model_free": (None, _POINTER),
    "llama_model_n_embd": (_INT32, _POINTER),
    "llama_model_n_ctx_train": (_INT32, _POINTER),
    "llama_model_meta_val_str": (_INT32, _POINTER, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT32, _POINTER),
    "llama_init_from_model": (_POINTER, _POINTER, _ContextParams),
    "llama_free": (None, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT32, _INT32),
    "llama_n_ctx": (_UINT32, _POINTER),
    "llama_n_batch": (_UINT32, _POINTER),
    "llama_n_ubatch": (_UINT32, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_seq_rm": (_BOOL, _POINTER, _INT32, _INT32, _INT32),
    "llama_batch_ext_init": (_POINTER, _POINTER),
    "llama_batch_ext_free": (None, _POINTER),
    "llama_batch_ext_clear": (None, _POINTER),
    "llama_batch_ext_add_token": (_INT32, _POINTER, _INT32, _INT32),
    "llama_batch_ext_add_embd": (_INT32, _POINTER, _INT32, _Embd),
    "llama_batch_ext_set_pos": (_BOOL, _POINTER, _INT32, ctypes.POINTER(_INT32)),
    "llama_batch_ext_set_output_logits": (_BOOL, _POINTER, _INT32, _BOOL),
    "llama_process": (_INT32, _POINTER, _INT32, _POINTER),
    "llama_decode": (_INT32, _POINTER, _Batch),
    "llama_get_logits": (_POINTER, _POINTER),
    "ggml_quantize_chunk": (
        ctypes.c_size_t, _INT32, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _POINTER,
    ),
    "ggml_row_size": (ctypes.c_size_t, _INT32, ctypes.c_int64),
    "ggml_validate_row_data": (_BOOL, _INT32, _POINTER, ctypes.c_size_t),
}  # fmt: skip
# these return at once; another thread that takes Python's lock during each of them would delay a step by milliseconds
_KEEP_LOCK = {name for name in _FUNCTIONS if name.startswith(("llama_batch_ext", "llama_get", "llama_memory"))}
_LOG = ctypes.CFUNCTYPE(None, _INT32, ctypes.c_char_p, _POINTER)
_warnings: deque[str] = deque(maxlen=4)  # the last ones, for the message of a failure
_show_log = False


@_LOG
def _log(level: int, text: bytes, _) -> None:
    if _show_log:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
    elif level in PROBLEMS:
        _warnings.append(text.decode(errors="replace").strip())


@functools.cache
def library() -> ctypes.CDLL:
    """Load llama.cpp and declare its functions. Raises LlamaError."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise LlamaError(f"{PACKAGE} is not installed: {INSTALL[PACKAGE]}") from None
    if found != PINNED:
        raise LlamaError(
            f"xllamacpp {found} is installed, and the structures of its C functions are known for {PINNED} only: "
            f"{INSTALL[PACKAGE]}"
        )
    spec = find_spec(PACKAGE)
    files = sorted(Path(spec.submodule_search_locations[0]).glob(f"{PACKAGE}*.so")) if spec else []
    if not files:
        raise LlamaError(f"{PACKAGE} {found} holds no library: {INSTALL[PACKAGE]}")
    try:
        lib, keeping = ctypes.CDLL(str(files[0])), ctypes.PyDLL(str(files[0]))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(keeping if name in _KEEP_LOCK else lib, name)
            function.restype, function.argtypes = result, arguments
            setattr(lib, name, function)
    except (OSError, AttributeError) as error:
        raise LlamaError(f"{files[0]} cannot be loaded: {error}") from error
    lib.llama_backend_init()
    return lib


def quantize(values: np.ndarray, kind: int) -> np.ndarray:
    """Return float32 values [rows, width] in a block type of ggml, as uint8 [rows, bytes a row], by llama.cpp's code.

    kind: number of the type; its block size must divide the width. Raises LlamaError.
    """
    lib = library()
    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    out = np.empty((rows, lib.ggml_row_size(kind, width)), np.uint8)
    written = lib.ggml_quantize_chunk(kind, values.ctypes.data, out.ctypes.data, 0, rows, width, None)
    if written != out.nbytes or not lib.ggml_validate_row_data(kind, out.ctypes.data, out.nbytes):
        raise LlamaError(f"llama.cpp cannot quantize a tensor {list(values.shape)}: are all its values finite?")
    return out


class Entry(NamedTuple):
    """What one sequence adds in a step: its prompt embeddings, or its last token. The step gives its next logits."""

    sequence: int
    position: int  # of the first row
    rows: np.ndarray | int  # float32 [positions, width], or a token


class Llama:
    """A model in GGUF, with a cache that its sequences share."""

    def __init__(
        self, file: Path, sequences: int, positions: int, threads: int, batch: int = 512, show_log: bool = False
    ):
        """Load a model.

        `positions` are those of all sequences together; `batch` rows are computed at once, at least as many as one
        entry has; `show_log` prints llama.cpp's own messages. Raises LlamaError.
        """
        global _show_log
        self._model = self._context = self._batch = None
        self._lib = lib = library()
        _show_log = show_log
        _warnings.clear()
        lib.llama_log_set(_log, None)  # another user of the library in this process may have set its own
        if not 0 < sequences <= MAX_SEQUENCES:
            raise LlamaError(f"{sequences} sequences: llama.cpp decodes 1 to {MAX_SEQUENCES} together")
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise LlamaError(f"llama.cpp cannot load {file}: {_last_warning()}")
        self.width = lib.llama_model_n_embd(self._model)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.max_position = lib.llama_model_n_ctx_train(self._model)
        self.sequences, self.batch = sequences, max(batch, sequences)
        self.cells = -(-max(positions, self.batch) // CELLS) * CELLS
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.kv_unified = self.cells, sequences, True
        context.n_batch = context.n_ubatch = self.batch  # one part, so that tokens and embeddings stay together
        context.n_outputs_max = sequences
        context.n_threads = context.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise LlamaError(f"llama.cpp cannot make a cache of {self.cells} positions: {_last_warning()}")
        sizes = (lib.llama_n_ctx(self._context), lib.llama_n_batch(self._context), lib.llama_n_ubatch(self._context))
        if sizes != (self.cells, self.batch, self.batch):
            self.close()
            raise LlamaError(f"llama.cpp made a cache of {sizes}, expected {(self.cells, self.batch, self.batch)}")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_ext_init(self._context)
        self._last = _LastTokens(sequences)
        self._logits = 0, np.empty((0, 0), np.float32)  # the address that llama.cpp gave last, and a view of it

    def metadata(self, key: str) -> str | None:
        """Return a single value of the file's metadata as text, None where it has no such key."""
        buffer = ctypes.create_string_buffer(4096)
        length = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode()

    def step(self, entries: Sequence[Entry]) -> np.ndarray:
        """Add the entries to their sequences; return the logits after each, float32 [entries, vocabulary].

        The result is a view that the next step overwrites. Raises ValueError for entries that llama.cpp must not get,
        LlamaError where it fails.
        """
        self._check(entries)
        if any(isinstance(entry.rows, np.ndarray) for entry in entries):
            code = self._process(entries)
        else:  # in one call
            code = self._lib.llama_decode(self._context, self._last.filled(entries))
        if code:
            raise LlamaError(f"llama.cpp fails in a step of {len(entries)} sequences ({code}): {_last_warning()}")
        address = self._lib.llama_get_logits(self._context)
        if address != self._logits[0]:
            values = (_FLOAT * (self.sequences * self.vocabulary)).from_address(address)
            self._logits = address, np.frombuffer(values, np.float32).reshape(self.sequences, self.vocabulary)
        return self._logits[1][: len(entries)]

    def _process(self, entries: Sequence[Entry]) -> int:
        """Compute a batch of embeddings and tokens; return llama.cpp's code."""
        lib, batch = self._lib, self._batch
        lib.llama_batch_ext_clear(batch)
        place = _INT32()
        where = ctypes.byref(place)
        for entry in entries:
            place.value = entry.position
            if isinstance(entry.rows, np.ndarray):
                data, stride = entry.rows.ctypes.data, entry.rows.strides[0]
                for i in range(len(entry.rows)):
                    row = _Embd(data + i * stride, 1, self.width)
                    index = lib.llama_batch_ext_add_embd(batch, entry.sequence, row)
                    lib.llama_batch_ext_set_pos(batch, index, where)
                    place.value += 1
            else:
                index = lib.llama_batch_ext_add_token(batch, entry.sequence, entry.rows)
                lib.llama_batch_ext_set_pos(batch, index, where)
            if index < 0 or not lib.llama_batch_ext_set_output_logits(batch, index, True):
                raise LlamaError(f"llama.cpp refuses an entry of a batch ({index}): {_last_warning()}")
        return lib.llama_process(self._context, DECODE, batch)

    def _check(self, entries: Sequence[Entry]) -> None:
        rows = 0
        for entry in entries:
            if not 0 <= entry.sequence < self.sequences:
                raise ValueError(f"sequence {entry.sequence}: expected 0 to {self.sequences - 1}")
            if isinstance(entry.rows, np.ndarray):
                if entry.rows.ndim != 2 or entry.rows.shape[1] != self.width or entry.rows.dtype != np.float32:
                    raise ValueError(
                        f"embeddings {entry.rows.dtype} {list(entry.rows.shape)}: expected float32 [n, {self.width}]"
                    )
                if entry.rows.strides[1] != 4 or not np.isfinite(entry.rows).all():
                    raise ValueError("embeddings: expected finite numbers, each row contiguous")
                count = len(entry.rows)
            elif not 0 <= entry.rows < self.vocabulary:
                raise ValueError(f"token {entry.rows}: expected 0 to {self.vocabulary - 1}")
            else:
                count = 1
            if not 0 <= entry.position <= self.max_position - count:
                raise ValueError(f"position {entry.position + count - 1}: the model takes {self.max_position}")
            rows += count
        if not 0 < rows <= self.batch or len({entry.sequence for entry in entries}) < len(entries):
            raise ValueError(f"a step of {rows} rows: expected 1 to {self.batch}, and each sequence once")

    def set_threads(self, threads: int) -> None:
        """Compute the next steps with so many threads."""
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def release(self, sequence: int) -> None:
        """Free what a sequence has in the cache."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        """Free the model; also a second time."""
        if self._batch:
            self._lib.llama_batch_ext_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = self._batch = None


class _LastTokens:
    """A batch of one token for each of some sequences, in arrays that are filled again for every step."""

    def __init__(self, sequences: int):
        self._tokens, self._positions, self._sequences = np.zeros((3, sequences), np.int32)
        self._ones = np.ones(sequences, np.int32), np.ones(sequences, np.int8)
        first, stride = self._sequences.ctypes.data, self._sequences.itemsize
        self._addresses = np.arange(first, first + sequences * stride, stride, np.uint64)
        arrays = (self._positions, self._ones[0], self._addresses, self._ones[1])
        self._batch = _Batch(0, self._tokens.ctypes.data, None, *(array.ctypes.data for array in arrays))

    def filled(self, entries: Sequence[Entry]) -> _Batch:
        """Return the batch of these entries, which llama.cpp reads before the next call of this."""
        count = self._batch.n_tokens = len(entries)
        self._sequences[:count], self._positions[:count], self._tokens[:count] = zip(*entries, strict=True)
        return self._batch


def _last_warning() -> str:
    return "; ".join(_warnings)[:300] or "it gives no reason"
