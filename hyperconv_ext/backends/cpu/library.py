"""The shared library with the engine of csrc/cpu/: found and loaded when first asked for.

`HYPERCONV_CPU_LIBRARY` names another library to load in its place; `HYPERCONV_CPU_CAPABILITY` the
instructions to use in place of the best that the processor has, one of `CAPABILITIES`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from struct import pack
from typing import NamedTuple

import torch

from .. import lattice

_LIBRARY = "HYPERCONV_CPU_LIBRARY"
_CAPABILITY = "HYPERCONV_CPU_CAPABILITY"
_BUILT = Path(__file__).parents[2] / "_cpu.abi3.so"
_NOT_BUILT = (
    "the CPU engine is not built; install a C++ compiler (Debian, Ubuntu: apt-get install g++), then: "
    "pip install . in the source; if there is one, HYPERCONV_BUILD_CPU=1 pip install . shows its error"
)

# What follows is csrc/cpu/engine.h.
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "baseline")  # best first
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
ALGORITHMS = {"basis": 0, "fft": 1}
PLANES = 2  # an algorithm to the engine, a kind of tile to the planner
OUTPUT, COEFFICIENTS, BASIS = 1, 2, 4
MAX_LAYERS = 16
_NO_MEMORY = 1


class Axis(ctypes.Structure):
    """One spatial axis: `Axis(*lattice.Axis)`."""

    _fields_ = [(name, c_int32) for name in lattice.Axis._fields]


class Circle(ctypes.Structure):
    """Points along an axis, and the radices of the transform's stages."""

    _fields_ = [("size", c_int32), ("radices", c_int32 * 4)]


class Strides(ctypes.Structure):
    """Of an activation `[B, C, D, H, W]`, in elements."""

    _fields_ = [("batch", c_int64), ("axis", c_int64 * 3), ("channel", c_int64)]


class Convolution(ctypes.Structure):
    """One convolution and its gradients; pointers are addresses."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "algorithm", "wanted")),
        *((name, c_int32) for name in ("batch", "groups", "source_channels", "target_channels", "rank")),
        *((name, c_int32) for name in ("slices", "parts", "threads")),
        ("axis", Axis * 3),
        ("circle", Circle * 3),
        *((name, Strides) for name in ("source_strides", "target_strides", "output_strides")),
        *((f"coefficient_{name}", c_int64) for name in ("group", "target", "source", "rank")),
        *((name, c_void_p) for name in ("source", "target", "coefficients", "basis", "bias", "roots")),
        *((name, c_void_p) for name in ("output", "coefficients_gradient", "basis_gradient")),
    ]


class Mlp(ctypes.Structure):
    """The coordinate MLP, forward or backward; pointers are addresses."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "taps", "layers", "activation", "linear_output")),
        *((name, c_int32) for name in ("constant", "threads", "windowed")),
        ("widths", c_int32 * (MAX_LAYERS + 1)),
        *((name, c_double) for name in ("slope", "gain")),
        ("coordinates", c_void_p),
        *((name, c_void_p * MAX_LAYERS) for name in ("weight", "bias")),
        *((name, c_void_p) for name in ("basis", "gradient")),
        *((name, c_void_p * MAX_LAYERS) for name in ("weight_gradient", "bias_gradient")),
    ]


class _Loaded(NamedTuple):
    """The library and what it runs on, or why there is none."""

    library: ctypes.CDLL | None = None
    capability: str = ""
    threaded: bool = False
    reason: str = ""


@lru_cache
def _load() -> _Loaded:
    named = os.environ.get(_LIBRARY)
    path = Path(named) if named else _BUILT
    if not path.exists():
        why = f"{_LIBRARY}={named} does not exist; correct it or unset it" if named else _NOT_BUILT
        return _Loaded(reason=why)
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return _Loaded(reason=f"the CPU engine {path.name} cannot be loaded: {error}; rebuild it")
    for which, structure in enumerate((Axis, Circle, Strides, Convolution, Mlp)):
        expected, size = ctypes.sizeof(structure), library.hyperconv_cpu_size(which)
        if size != expected:
            why = f"expected {expected} bytes for its {structure.__name__}, got {size}"
            remedy = "rebuild it: pip install . in the source"
            return _Loaded(reason=f"the CPU engine {path.name} is of another version: {why}; {remedy}")
    return _start(library)


def _declare(library: ctypes.CDLL) -> None:
    """Say once what the functions take and return."""
    library.hyperconv_cpu_size.argtypes = [c_int32]
    library.hyperconv_cpu_size.restype = c_int64
    library.hyperconv_cpu_start.argtypes = [ctypes.c_char_p, c_void_p]
    library.hyperconv_cpu_start.restype = ctypes.c_char_p
    library.hyperconv_cpu_convolve.argtypes = [ctypes.POINTER(Convolution)]
    library.hyperconv_cpu_mlp_forward.argtypes = [ctypes.POINTER(Mlp)]
    library.hyperconv_cpu_mlp_backward.argtypes = [ctypes.POINTER(Mlp)]
    library.hyperconv_cpu_digest.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        c_int32,
    ]  # arrays of c_int64
    library.hyperconv_cpu_digest.restype = c_uint64


def _start(library: ctypes.CDLL) -> _Loaded:
    """Choose the instructions, and give the engine PyTorch's threads."""
    threads = _threads()
    wanted = os.environ.get(_CAPABILITY, "")
    taken = library.hyperconv_cpu_start(wanted.encode() if wanted else None, threads)
    if taken is None:
        runs = [name for name in CAPABILITIES if library.hyperconv_cpu_start(name.encode(), threads)]
        why = f"expected what this processor runs, {' or '.join(runs)}, got {wanted!r}"
        return _Loaded(reason=f"{_CAPABILITY}: {why}; correct it or unset it")
    return _Loaded(library, taken.decode(), threads is not None)


def _threads() -> int | None:
    """The address of PyTorch's `parallel_for`; None where a build of PyTorch does not export it.

    It is looked up in PyTorch's extension module and what that needs, so whatever is already loaded.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, c_void_p).value


def reason() -> str:
    """'' if the library is loaded (the first call loads it), else why it is not and the remedy."""
    return _load().reason


def capability() -> str:
    """The instructions that the engine uses, one of `CAPABILITIES`; '' without a library."""
    return _load().capability


def describe() -> str:
    """One line for people: the instructions and threads that the engine uses, or why there is none."""
    loaded = _load()
    if loaded.reason:
        return loaded.reason
    threads = (
        "PyTorch's threads" if loaded.threaded else "one thread: this PyTorch does not lend its own"
    )
    return f"{loaded.capability} instructions, {threads}"


@lru_cache
def _engine() -> ctypes.CDLL:
    """The library, which must be there."""
    loaded = _load()
    if loaded.library is None:
        raise RuntimeError(loaded.reason)
    return loaded.library


def convolve(call: Convolution) -> None:
    """Compute what `call.wanted` asks for.

    Raises:
        MemoryError: the workspace does not fit.
        RuntimeError: there is no library, or it does not know this kind of convolution.
    """
    status = _engine().hyperconv_cpu_convolve(call)
    if status:
        fields = (
            "dtype",
            "algorithm",
            "wanted",
            "batch",
            "groups",
            "source_channels",
            "target_channels",
        )
        _fail(status, "convolution", call, (*fields, "rank", "threads"))


def mlp_forward(call: Mlp) -> None:
    """Write `call.basis`. Raises as `convolve`."""
    status = _engine().hyperconv_cpu_mlp_forward(call)
    if status:
        _fail(status, "coordinate MLP", call, ("dtype", "taps", "layers", "activation", "threads"))


def mlp_backward(call: Mlp) -> None:
    """Write the gradients of the weights and biases, from `call.gradient`. Raises as `convolve`."""
    status = _engine().hyperconv_cpu_mlp_backward(call)
    if status:
        _fail(
            status,
            "gradient of a coordinate MLP",
            call,
            ("dtype", "taps", "layers", "activation", "threads"),
        )


def digest(addresses: Sequence[int], sizes: Sequence[int]) -> int:
    """A number that differs, but for a chance of 2^-64, where a byte of these blocks of memory does.

    Raises:
        RuntimeError: there is no library.
    """
    count = len(addresses)
    layout = f"{count}q"
    return _engine().hyperconv_cpu_digest(pack(layout, *addresses), pack(layout, *sizes), count)


def _fail(status: int, what: str, call: ctypes.Structure, fields: tuple[str, ...]) -> None:
    numbers = ", ".join(f"{name}={getattr(call, name)}" for name in fields)
    if status == _NO_MEMORY:
        remedy = "free some, or use fewer threads (torch.set_num_threads) or smaller batches"
        raise MemoryError(
            f"the CPU engine has no memory for the workspace of a {what} ({numbers}); {remedy}"
        )
    remedy = "rebuild it: pip install . in the source"
    raise RuntimeError(f"the CPU engine does not know this {what} ({numbers}); {remedy}")
