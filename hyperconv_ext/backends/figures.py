"""What a GPU can do, in one table: the only figures of machines that any estimate uses.

They are leads from documents, none of them measured by this project. Where one compute capability covers
several products each figure is the fastest one's, so that a roofline drawn with it bounds all of them.

Sources: CUDA C++ Programming Guide (shared memory, FP32 rates); NVIDIA's architecture white papers and
data sheets of A100, GA102 (RTX 3090, RTX A6000), Jetson AGX Orin, Ada (RTX 4090, L40S), H100, H200,
B200, RTX PRO 6000 Blackwell and GB10 (clocks, dense tensor-core rates, memory bandwidth); arXiv
2402.13499 (mma.sync on Hopper); "Getting Started with CUDA Graphs", NVIDIA Technical Blog (launches).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from ..problem import Device, Problem

Number = Literal["half", "tf32", "ieee"]


class Rates(NamedTuple):
    """Multiply-adds per clock and multiprocessor of dense products, by number format."""

    half: float
    tf32: float
    ieee: float


@dataclass(frozen=True)
class Figures:
    """One compute capability.

    `clock` in Hz is that of the data sheet's peak. `products` are the rates by `mma.sync` (`ieee`: by
    ordinary FMA units), `library` the peak, by each generation's own instructions. Bandwidths are bytes
    per clock and multiprocessor, `dram_bandwidth` bytes per second. `block_memory` are the bytes of
    shared memory that a block may use, `shared_memory` those of a multiprocessor. `launch` is the time
    in seconds between the end of a kernel and the start of one that waits for it.
    """

    clock: float
    products: Rates
    library: Rates
    dram_bandwidth: float
    block_memory: int
    shared_memory: int
    shared_bandwidth: float = 128
    # A100: 5120 bytes a clock over 108 multiprocessors. Not published for the others, taken to be this.
    cache_bandwidth: float = 47
    launch: float = 0.9e-6


def _figures(
    clock: float, rates: Rates, dram_bandwidth: float, kilobytes: int, library: Rates | None = None
) -> Figures:
    """Of each multiprocessor's shared memory the system keeps 1 KiB for every block."""
    block_memory, shared_memory = (kilobytes - 1) * 1024, kilobytes * 1024
    return Figures(clock, rates, library or rates, dram_bandwidth, block_memory, shared_memory)


# GeForce products of 8.6, 8.9 and 12.0 sum 16-bit products in float32 at half this rate.
_CONSUMER = Rates(512, 256, 128)
# mma.sync reaches 62% of the peak, which is wgmma's. No figure for 10.0 is known: taken to be the same.
_HOPPER = Rates(0.62 * 2048, 0.62 * 1024, 128)
_RTX_PRO_6000 = _figures(2.6e9, _CONSUMER, 1.792e12, 100)
_TABLE = {
    80: _figures(1.41e9, Rates(1024, 512, 64), 2.039e12, 164),
    86: _figures(1.8e9, _CONSUMER, 0.936e12, 100),
    87: _figures(1.3e9, Rates(1024, 512, 128), 0.2048e12, 164),
    89: _figures(2.52e9, _CONSUMER, 1.008e12, 100),
    90: _figures(1.83e9, _HOPPER, 4.8e12, 228, Rates(2048, 1024, 128)),
    100: _figures(1.85e9, _HOPPER, 8e12, 228, Rates(4096, 2048, 128)),
    120: _RTX_PRO_6000,
    121: replace(_RTX_PRO_6000, clock=2.5e9, dram_bandwidth=0.273e12),
}


@lru_cache
def figures(device: Device) -> Figures:
    """Those of the nearest listed capability that is not above the device's.

    Below them all is the CPU, where kernels are executed for tests: it plays a Hopper.
    """
    return _TABLE[max((known for known in _TABLE if known <= device.capability), default=90)]


def number(problem: Problem) -> Number:
    """The arithmetic of the products: 16-bit operands, TF32, or IEEE (float64 priced as float32)."""
    if problem.dtype in ("float16", "bfloat16"):
        return "half"
    return "tf32" if problem.tf32 and problem.dtype == "float32" else "ieee"
