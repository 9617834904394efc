"""llama.cpp's C interface, as the extension module of xllamacpp exports it, by ctypes.

xllamacpp itself offers llama.cpp's server. That gives no log-probabilities of a prompt, and its stream withholds tokens
until their text is whole UTF-8. So what llama.h declares is called directly. Parameters are passed by value, in structs
whose later fields change from version to version: they are kept as bytes, and the few fields that are set are checked
first, by their defaults.
"""

import ctypes
import os
import struct

import numpy

POINTER, FLOATS, INTS = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int32)
BYTES = 1024  # more than either struct of parameters has
INFO, ERROR = 2, 4  # levels of ggml's log
NO_MMAP = 0  # llama_load_mode: weights in memory of the process
# The first fields of each struct with their defaults: what is checked before any of them is set.
CONTEXT = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
MODEL = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1}
MODEL_OFFSET = 16  # bytes: two pointers come before


class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * BYTES)]

    def change(self, names, offset, **values):
        """Set some of the fields `names`, whose defaults must be there."""
        shape = f"<{len(names)}i"
        found = struct.unpack_from(shape, self.bytes, offset)
        if found != tuple(names.values()):
            raise RuntimeError(
                f"llama.cpp's parameters must begin with {names}, but hold {found}: this version has another layout; "
                "install the version of xllamacpp that the documentation names"
            )
        struct.pack_into(shape, self.bytes, offset, *(names | values).values())


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", INTS), ("embd", FLOATS), ("pos", INTS), ("n_seq_id", INTS),
        ("seq_id", ctypes.POINTER(INTS)), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


SIGNATURES = {
    "llama_backend_init": (None,),
    "llama_print_system_info": (ctypes.c_char_p,),
    "llama_model_default_params": (Parameters,),
    "llama_context_default_params": (Parameters,),
    "llama_model_load_from_file": (POINTER, ctypes.c_char_p, Parameters),
    "llama_init_from_model": (POINTER, POINTER, Parameters),
    "llama_set_n_threads": (None, POINTER, ctypes.c_int32, ctypes.c_int32),
    "llama_model_get_vocab": (POINTER, POINTER),
    "llama_vocab_n_tokens": (ctypes.c_int32, POINTER),
    "llama_model_desc": (ctypes.c_int32, POINTER, ctypes.c_char_p, ctypes.c_size_t),
    "llama_batch_init": (Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    "llama_decode": (ctypes.c_int32, POINTER, Batch),
    "llama_get_logits_ith": (FLOATS, POINTER, ctypes.c_int32),
    "llama_get_memory": (POINTER, POINTER),
    "llama_memory_clear": (None, POINTER, ctypes.c_bool),
}
LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)


def _declared(path):
    """A library with the types of the functions that are called; RuntimeError if it has them not."""
    try:
        library = ctypes.CDLL(path)
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} must be a shared library of llama.cpp (libllama), but: {error}") from error
    return library


class Model:
    """A GGUF file, opened.

    Args:
        module: the path of a library that exports what llama.h declares.
        positions: of one sequence at most, prompt and generated tokens together.
        sequences: at once, at most.
        batch: tokens that one call computes, at most.

    Attributes:
        vocabulary: number of tokens.
        description: architecture, size and type of the weights, as llama.cpp words them.
        system: instruction sets and libraries that it was built for, in its words.
    """

    def __init__(self, module, path, *, threads, positions, sequences, batch):
        self.library = library = _declared(module)
        self.errors = []
        self._logger = LOGGER(self._log)  # held for as long as the library may call it
        library.llama_log_set(self._logger, None)
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.change(MODEL, MODEL_OFFSET, load_mode=NO_MMAP, n_gpu_layers=0)
        self._model = library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}: {self._words()}")
        parameters = library.llama_context_default_params()
        parameters.change(CONTEXT, 0, n_ctx=positions * sequences, n_batch=batch, n_ubatch=batch, n_seq_max=sequences)
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {positions} positions: {self._words()}")
        library.llama_set_n_threads(self._context, threads, threads)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        text = ctypes.create_string_buffer(256)
        library.llama_model_desc(self._model, text, len(text))
        self.description = text.value.decode(errors="replace")
        self.system = library.llama_print_system_info().decode(errors="replace")
        self._batch, self._size = library.llama_batch_init(batch, 0, 1), batch

    def _log(self, level, text, _):
        if level >= INFO:
            os.write(2, text)
        if level == ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def _words(self):
        return " | ".join(self.errors[-3:]) or "it gave no reason"

    def clear(self):
        """Forget all sequences."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._context), True)

    def decode(self, entries):
        """Compute entries (token, position, sequence, whether its logits are wanted), as many as a batch holds.

        Returns the logits that are wanted, in order, each a fresh array (vocabulary,) of fp32.
        """
        if len(entries) > self._size:
            raise ValueError(f"a batch must have at most {self._size} tokens, not {len(entries)}")
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        if status := self.library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode must return 0, but returned {status}: {self._words()}")
        shape = (self.vocabulary,)
        return [
            numpy.ctypeslib.as_array(self.library.llama_get_logits_ith(self._context, place), shape).copy()
            for place, entry in enumerate(entries)
            if entry[3]
        ]
