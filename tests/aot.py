"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

The kernels are launched through the package's own `launch.py`, on tensors that are never computed
with, under a driver that only names a target: what is compiled is what a GPU would be given, argument
specialisation included. As a program: print the table for the capabilities named (all if none), each
kernel with the bounds of its hot loops (`tests/machine_code.py`); the status is 1 if a row is marked, as
it is for bounds worse than those committed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hyperconv_ext.backends.triton import MLP_WIDTH, launch, tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Device, Op, Plan, Problem

from . import bounds_file, machine_code

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
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
    warps: int  # that a multiprocessor holds, by registers and shared memory
    tensor_core: int
    loops: tuple[str, ...]  # lines about the hot ones, where the capability's rates are known

    @property
    def multiplies(self) -> bool:
        return self.kernel not in ("prepare_kernel", "mlp_kernel", "mlp_backward_kernel")

    def __str__(self) -> str:
        row = (
            f"sm_{self.capability:<4}{self.kernel:<22}{self.tile:<56}{self.layout:<17}"
            f"{self.registers:>5} regs {self.spill_bytes:>5} B spilled {self.shared:>7} B shared "
            f"{self.warps:>3} warps/SM {self.tensor_core:>4} tensor-core instructions"
        )
        return "\n".join([row, *self.loops])


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


@cache  # several configurations share a kernel
def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _problem(tile: tiles.Tile, layout: str, capability: int) -> Problem:
    """A problem that `tile` fits: aligned channels, or odd ones in the slow layout."""
    channels = 37 if layout == "odd" else 128
    taps = {16: (3, 3), 32: (1, 9), 64: (5, 5), 128: (7, 7)}[max(tile.patch, 16)]
    if tile.kernel == "direct":
        taps = (3, 3)
    elif not tile.resident:
        taps = (15, 15)
    size, ones = (56, 56), (1, 1)
    if layout == "volume":
        size, taps, ones = (8, 8, 56), (1, *taps), (1, 1, 1)
    geometry = Geometry.conv(size, taps, ones, "same", ones, 1)
    half = "float16" if layout == "aligned, float16" else "bfloat16"
    return Problem(
        op=_RUNS[tile.kernel],
        geometry=geometry,
        batch=8,
        in_channels=channels,
        out_channels=channels,
        rank=tile.rank if tile.kernel == "direct" else 5,
        dtype=half if tile.number == "half" else "float32",
        device=Device("cuda", capability, 132),
        aligned=layout != "odd",
        tf32=tile.number == "tf32",
    )


_RUNS: dict[str, Op] = {
    "basis": "basis_conv_fwd",
    "direct": "basis_conv_fwd",
    "coefficients": "basis_conv_bwd_coeff",
    "basis_gradient": "basis_conv_bwd_basis",
}


def layouts(tile: tiles.Tile, capability: int) -> tuple[str, ...]:
    """What to compile a tile for: vector or scalar accesses, three axes; both 16-bit types once."""
    both: tuple[str, ...] = ("aligned",)
    if tile.number == "half":
        both += ("volume", "aligned, float16") if capability == 90 else ("volume",)
    return both if tile.aligned else (*both, "odd")


def compile_tile(tile: tiles.Tile, capability: int, layout: str) -> list[Compiled]:
    """Compile what one configuration launches."""
    problem = _problem(tile, layout, capability)
    if not tiles.fits(problem, tile):
        raise ValueError(f"{tile.name} does not fit the problem it is to be compiled for")
    plan = Plan(problem, "triton", "basis", tile, 0.0)
    dtype = getattr(torch, problem.dtype)
    image = torch.empty(8, problem.in_channels, *problem.geometry.input_size, dtype=dtype)
    if problem.aligned:
        image = image.movedim(1, -1).contiguous().movedim(-1, 1)
    coefficients = torch.empty(problem.out_channels, problem.in_channels, problem.rank, dtype=dtype)
    basis = torch.empty(problem.rank, *problem.geometry.kernel_size)
    operands = {
        "basis_conv_fwd": (image, coefficients, basis, torch.empty(problem.out_channels, dtype=dtype)),
        "basis_conv_bwd_coeff": (image, image, basis),
        "basis_conv_bwd_basis": (image, image, coefficients),
    }[problem.op]
    with _compiling(capability) as compiled:
        getattr(launch, problem.op)(plan, *operands)
    return [_row(name, tile.name, layout, capability, result) for name, result in compiled]


def compile_mlp(width: int, capability: int) -> list[Compiled]:
    """Compile the MLP's two kernels for hidden layers of this width."""
    widths = (2, width, width, 4)
    weights = [torch.empty(b, a) for a, b in pairwise(widths)]
    biases = [torch.empty(b) for b in widths[1:]]
    with _compiling(capability) as compiled:
        mlp = (torch.empty(49, 2), weights, biases)
        launch.coordinate_mlp_fwd(*mlp, "leaky_relu", 0.5, False, True)
        launch.coordinate_mlp_bwd(torch.empty(5, 49), *mlp, "gelu", 0.5, False)
    return [_row(name, f"width {width}", "", capability, result) for name, result in compiled]


def _row(kernel: str, tile: str, layout: str, capability: int, result: Any) -> Compiled:
    cubin = result.asm["cubin"]
    report = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {report!r}")
    registers, shared = int(found[1]), result.metadata.shared
    row = Compiled(
        kernel,
        tile,
        layout,
        capability,
        registers,
        spill_bytes=int(found[2]),
        shared=shared,
        warps=machine_code.resident_warps(capability, registers, result.metadata.num_warps, shared),
        tensor_core=len(re.findall(_TENSOR_CORE, result.asm["ptx"])),
        loops=(),
    )
    if not row.multiplies or capability not in machine_code.RATES:
        return row
    code = machine_code.instructions(_cuobjdump("-sass", cubin))
    loops = machine_code.hot_loops(code, capability)
    return replace(row, loops=tuple(machine_code.loop_lines(loops)))


def compile_all(capability: int, every: int = 1) -> list[Compiled]:
    """Every configuration the planner can return, or one in so many; the MLP, narrowest and widest."""
    rows = [row for width in (16, MLP_WIDTH) for row in compile_mlp(width, capability)]
    for tile in tiles.ALL[::every]:
        for layout in layouts(tile, capability):
            rows += compile_tile(tile, capability, layout)
    return rows


# Bytes of local memory that a kernel without a loop of products may use: Triton 3.6 spills up to so many
# of the widest MLP's backward pass, once for each tap.
SPARED = 24


def faults(row: Compiled) -> list[str]:
    """What is wrong with a compiled kernel: spills, too much shared memory, no tensor cores."""
    found = []
    if row.spill_bytes > (0 if row.multiplies else SPARED):
        found.append(f"{row.spill_bytes} bytes of local memory")
    if row.shared > machine_code.SHARED_MEMORY[row.capability] - machine_code.BLOCK_SHARED:
        found.append(f"{row.shared} bytes of shared memory")
    if row.multiplies and "-ieee-" not in row.tile and not row.tensor_core:
        found.append("no tensor-core instruction")
    return found


def compiler() -> str:
    """Triton's version, and that of the assembler in it."""
    command = [TOOLS / "ptxas", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"triton {triton.__version__}, ptxas {re.findall(r'V[0-9.]+', text)[-1]}"


def main(arguments: list[str]) -> int:
    """Print the table; 1 if any row is at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--update", action="store_true", help="write the committed bounds anew")
    parser.add_argument("--every", type=int, default=1, help="compile one tile in so many")
    options = parser.parse_args(arguments)
    if options.update and options.every != 1:
        parser.error("--update: expected every tile, got --every; leave out one of them")
    status = 0
    for capability in options.capabilities:
        table = [(str(row), faults(row)) for row in compile_all(capability, options.every)]
        committed = bounds_file.FOLDER / f"triton_sm_{capability}.txt"
        command = f"python -m tests.aot --update {capability}"
        text, wrong = bounds_file.settle(
            table, committed, compiler(), command, options.update, options.every > 1
        )
        status |= wrong
        print(text, end="", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
