"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

The kernels are launched through the package's own `launch.py`, on tensors that are never computed
with, under a driver that only names a target: what is compiled is what a GPU would be given, argument
specialisation included. Run as a program, it prints the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hyperconv_ext.backends.triton import launch, tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Device, Op, Plan, Problem

# Shared memory a block may use, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CAPABILITIES = tuple(SHARED_MEMORY)
_TENSOR_CORE = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"


class _Driver:
    """The part of Triton's driver interface that compiling uses."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the key of the kernels' compile cache

    def get_current_stream(self, device: int) -> int:
        return 0


# Layouts to compile a tile for, by whether it needs alignment.
LAYOUTS = {True: ("aligned",), False: ("aligned", "odd")}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    kernel: str
    tile: str
    layout: str
    capability: int
    registers: int
    spill_bytes: int
    shared: int
    tensor_core: int

    def __str__(self) -> str:
        return (
            f"sm_{self.capability:<4}{self.kernel:<22}{self.tile:<56}{self.layout:<9}"
            f"{self.registers:>5} regs {self.spill_bytes:>5} B spilled "
            f"{self.shared:>7} B shared {self.tensor_core:>4} tensor-core instructions"
        )


@contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Within this, launches compile for `capability` and collect (kernel name, result)."""
    compiled: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        result = kernel.warmup(*args, grid=(programs,), **options)
        compiled.append((kernel.fn.__name__, result))

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(launch, "launch", compile_only):
            yield compiled
    finally:
        triton.runtime.driver._active = previous


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a kernel, as the machine code's own header says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {report!r}")
    return int(found[1]), int(found[2])


def _problem(tile: tiles.Tile, op: Op, layout: str, capability: int) -> Problem:
    """A problem that `tile` fits: aligned channels, or odd ones in the slow layout."""
    channels = 128 if layout == "aligned" else 37
    kernel = {16: 3, 32: 3, 64: 5, 128: 7}[max(tile.patch, 16)] if tile.resident else 15
    kernel = 3 if tile.kernel == "direct" else kernel
    size = (kernel, kernel) if tile.patch != 32 else (1, 9)
    geometry = Geometry.conv((56, 56), size, (1, 1), tuple(k // 2 for k in size), (1, 1), 1)
    return Problem(
        op=op,
        geometry=geometry,
        batch=8,
        in_channels=channels,
        out_channels=channels,
        rank=tile.rank if tile.kernel == "direct" else 5,
        dtype="bfloat16" if tile.number == "half" else "float32",
        device=Device("cuda", capability, 132, SHARED_MEMORY[capability]),
        aligned=layout == "aligned",
        tf32=tile.number == "tf32",
    )


_OPS: dict[str, tuple[Op, ...]] = {
    "basis": ("basis_conv_fwd",),
    "direct": ("basis_conv_fwd",),
    "coefficients": ("basis_conv_bwd_coeff",),
    "basis_gradient": ("basis_conv_bwd_basis",),
}


def compile_tile(tile: tiles.Tile, capability: int, layout: str) -> list[Compiled]:
    """Compile what one configuration launches; `layout` is `'aligned'` or `'odd'`."""
    rows = []
    for op in _OPS[tile.kernel]:
        problem = _problem(tile, op, layout, capability)
        if not tiles.fits(problem, tile):
            raise ValueError(f"{tile.name} does not fit the problem it is to be compiled for")
        plan = Plan(problem, "triton", "basis", tile, 0.0)
        dtype = getattr(torch, problem.dtype)
        image = torch.empty(8, problem.in_channels, 56, 56, dtype=dtype)
        if layout == "aligned":
            image = image.to(memory_format=torch.channels_last)
        coefficients = torch.empty(problem.out_channels, problem.in_channels, problem.rank, dtype=dtype)
        basis = torch.empty(problem.rank, *problem.geometry.kernel_size)
        bias = torch.empty(problem.out_channels, dtype=dtype)
        operands = {
            "basis_conv_fwd": (image, coefficients, basis, bias),
            "basis_conv_bwd_input": (image, coefficients, basis),
            "basis_conv_bwd_coeff": (image, image, basis),
            "basis_conv_bwd_basis": (image, image, coefficients),
        }[op]
        with _compiling(capability) as compiled:
            getattr(launch, op)(plan, *operands)
        for name, result in compiled:
            registers, stack = _resources(result.asm["cubin"])
            tensor_core = len(re.findall(_TENSOR_CORE, result.asm["ptx"]))
            rows.append(
                Compiled(
                    name,
                    tile.name,
                    layout,
                    capability,
                    registers,
                    stack,
                    result.metadata.shared,
                    tensor_core,
                )
            )
    return rows


if __name__ == "__main__":
    wanted = [int(a) for a in sys.argv[1:] if a.isdigit()] or list(CAPABILITIES)
    names = [a for a in sys.argv[1:] if not a.isdigit()]
    for tile in tiles.ALL:
        if names and not any(name in tile.name for name in names):
            continue
        for capability in wanted:
            for layout in LAYOUTS[tile.aligned]:
                for row in compile_tile(tile, capability, layout):
                    if row.kernel != "prepare_kernel":
                        print(row, flush=True)
