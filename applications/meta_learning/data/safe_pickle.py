"""Pickles of NumPy arrays and plain containers, read without running anything that a pickle could ask for."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from applications.meta_learning.data.classes import DataError


def _dtype(*arguments: Any) -> np.dtype[Any]:
    dtype = np.dtype(*arguments)
    if dtype.kind not in "biufSU":
        raise pickle.UnpicklingError(f"it has an array of {dtype}; expected numbers or text")
    return dtype


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it has bytes in the encoding {encoding!r}")
    return text.encode("latin-1")


_array, _scalar = np.zeros(1).__reduce__()[0], np.uint8(0).__reduce__()[0]
_buffer = np.zeros(1).__reduce_ex__(5)[0]

_CORE: dict[str, Any] = {
    "multiarray._reconstruct": _array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _buffer,
}
ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": _dtype,
    "_codecs.encode": _bytes,
    "collections.OrderedDict": OrderedDict,
    **{f"numpy.core.{name}": made for name, made in _CORE.items()},
    **{f"numpy._core.{name}": made for name, made in _CORE.items()},  # of NumPy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {full}, which is neither an array nor a plain container")
        return ALLOWED[full]


def read_pickle(path: Path) -> Any:
    """What a pickle holds: arrays of numbers and text, and dict, list, tuple, str, int, float of them.

    Raises:
        DataError: it is damaged, or holds anything else; nothing in it was run.
    """
    try:
        with path.open("rb") as file:
            # latin-1: how NumPy's bytes come out of a pickle of Python 2
            return _Unpickler(file, encoding="latin-1").load()
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error})") from error
    # A damaged pickle makes the unpickler and NumPy raise nearly anything.
    except Exception as error:
        raise DataError(
            f"{path}: refused, or damaged ({str(error) or type(error).__name__}); expected a pickle of NumPy arrays and plain "
            "containers, and nothing in it was run. Get the file again from a source that you trust"
        ) from error
