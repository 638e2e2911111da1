"""Runs a compiled loop on PyTorch's own threads.

vLLM binds the threads of PyTorch's OpenMP library to cores, and a thread started later inherits a single core. So all
threads of a second pool, such as numba's, would share one core. Therefore the loops use PyTorch's threads. They are
reached by ``GOMP_parallel``, the function that GCC compiles every parallel region to. LLVM's and Intel's libraries have
it too. Without it a loop runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import os
from glob import glob
from typing import Any

import torch

_LIBRARIES = ("libgomp", "libiomp5", "libomp")


def _library() -> Any | None:
    """PyTorch's OpenMP library. A preloaded one comes first, because PyTorch uses it too."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    beside = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "torch.libs")
    found = [path for name in _LIBRARIES for where in (folder, beside) for path in glob(f"{where}/{name}*.so*")]
    for path in (None, *found):
        try:
            library = ctypes.CDLL(path)
            for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
                getattr(library, name)
        except (OSError, AttributeError):
            continue
        return library
    return None


_LIBRARY = _library()
if _LIBRARY is not None:
    _parallel = _LIBRARY.GOMP_parallel
    _parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _parallel.restype = None
    thread_index = _LIBRARY.omp_get_thread_num
    num_threads = _LIBRARY.omp_get_num_threads
else:  # without the library: one thread
    thread_index = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    num_threads = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
for _function in (thread_index, num_threads):  # so that compiled loops can call them
    _function.argtypes = []
    _function.restype = ctypes.c_int


def on_all_threads(body: int, parameters: int) -> None:
    """Calls the function at address ``body`` with address ``parameters`` once on each thread, and waits for all."""
    if _LIBRARY is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)(parameters)
    else:
        _parallel(body, parameters, 0, 0)  # 0: as many threads as the library is set to
