"""The shared library with the kernels of csrc/: found and loaded when first asked for.

`HYPERCONV_CUDA_LIBRARY` names another library to load in its place.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

_VARIABLE = "HYPERCONV_CUDA_LIBRARY"
_BUILT = Path(__file__).parents[2] / "_cuda.abi3.so"
_HOST = "host"


@lru_cache
def _load() -> tuple[str, str]:
    """(the architectures in the library, why there is no library): one of them is ''."""
    named = os.environ.get(_VARIABLE)
    path = Path(named) if named else _BUILT
    if not path.exists():
        if named:
            return "", f"{_VARIABLE}={named} does not exist; correct it or unset it"
        how = "with nvcc on the PATH: pip install . --no-build-isolation, in the source"
        return "", f"the CUDA extension is not built; {how}"
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
        library.hyperconv_architectures.restype = ctypes.c_char_p
        return library.hyperconv_architectures().decode(), ""
    except (OSError, AttributeError) as error:
        cause = error.__cause__ or error  # torch's own says no more than the path
        return "", f"the CUDA extension {path.name} cannot be loaded: {cause}; rebuild it"


def reason() -> str:
    """'' if the library is loaded (the first call loads it), else why it is not and the remedy."""
    return _load()[1]


def executes_on_cpu() -> bool:
    """Whether the library is one that executes the kernels on the CPU, for tests."""
    return _load()[0] == _HOST


def architectures() -> tuple[str, ...]:
    """What the library was compiled for, as `'80'`, `'90a'` or `'100+PTX'`; empty without one."""
    names = _load()[0]
    return () if names in ("", _HOST) else tuple(names.split(","))


def supports(capability: int) -> bool:
    """Whether the library has code for a GPU of this compute capability (sm_90 is 90).

    Machine code runs on its own and later minor versions of one major version (with a suffix on its own
    alone), PTX on everything from its version on.
    """
    for name in architectures():
        machine, _, ptx = name.partition("+")
        number = int(machine.rstrip("af"))
        suffixed = not machine.isdigit()
        if number == capability or (ptx and not suffixed and number < capability):
            return True
        if not suffixed and number // 10 == capability // 10 and number < capability:
            return True
    return False


def describe() -> str:
    """One line for people: what the library was compiled for, or why there is none."""
    if reason():
        return reason()
    if executes_on_cpu():
        return "executes the kernels on the CPU"
    return "built for " + ", ".join(f"sm_{name}" for name in architectures())
