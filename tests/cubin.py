"""Compile csrc/ for GPUs that are not here, and read what the compiler made of it.

As a program: print the table for the architectures named (all if none), 80 or 90a for sm_80 or sm_90a,
each kernel with the bounds of its hot loops (`tests/machine_code.py`); the status is 1 if a row is
marked, as it is for bounds worse than those committed. What has not changed since is taken from
build/cubin/.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setup import CUDA_FLAGS, find_nvcc

from . import bounds_file, machine_code

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
EVERY = "*.cu"
CUBINS = ROOT / "build" / "cubin"
ARCHITECTURES = ("80", "90a", "100")
JOBS = 2
STRICT_FLAGS = ["-Werror=all-warnings", "-Xcompiler=-Werror", "-Xptxas=-v,-warn-spills"]

REGISTERS = 255  # of each of the 256 threads that a block has at most
BLOCK_WARPS = 8
# Kernels that multiply on tensor cores, unless by IEEE arithmetic: then on none.
MULTIPLY = ("basis_conv_kernel", "basis_gradient_kernel", "coefficient_gradient_kernel")
# The same by wgmma: (architecture, warps of a block). Elsewhere there is nothing in them.
WARPGROUPS = {
    "basis_conv_sm90_kernel": ("90a", 12),
    "coefficient_gradient_sm90_kernel": ("90a", 12),
    "basis_gradient_sm90_kernel": ("90a", 12),
    "joint_gradient_sm90_kernel": ("90a", 16),
}
# What ptxas notes where it serialises wgmma or ignores setmaxnreg, which to nvcc is no warning.
LOSS = re.compile(r"C75\d\d")
IEEE = "Ieee"
# Bytes of stack a kernel may have; the others have none.
STACK = {
    "coordinate_mlp_kernel": 32,  # sinf and cosf reduce large arguments in an array
    "prepare_kernel": 32,
    "coordinate_mlp_backward_kernel": 32,
}


@dataclass(frozen=True)
class Compiled:
    """One instantiation of a kernel for one architecture."""

    architecture: str
    name: str
    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    shared: int  # static
    warps: int  # of full blocks that a multiprocessor's registers hold
    tensor_core: int
    ldmatrix: int
    loops: tuple[str, ...]  # lines about the hot ones, where the architecture's rates are known

    @property
    def kernel(self) -> str:
        return self.name.partition("<")[0]

    def __str__(self) -> str:
        row = (
            f"sm_{self.architecture:<5}{self.name:<58}{self.registers:>4} regs {self.stack:>4} B stack "
            f"{self.spills:>4} B spilled {self.shared:>6} B shared {self.warps:>3} warps/SM "
            f"{self.tensor_core:>5} tensor-core, {self.ldmatrix:>4} ldmatrix"
        )
        return "\n".join([row, *self.loops])


def compile_source(source: Path, architecture: str) -> list[Compiled]:
    """Compile one source; a warning is an error."""
    target = CUBINS / f"{source.stem}-{_digest(source, architecture)}.cubin"
    log = target.with_suffix(".log")
    if not log.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [*_command(architecture), source, "-o", target], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{result.stderr}")
        if LOSS.search(result.stderr):
            raise RuntimeError(f"{source.name} for sm_{architecture} loses to ptxas:\n{result.stderr}")
        log.write_text(result.stderr)
    return _rows(architecture, log.read_text(), _disassembled(target))


def _command(architecture: str) -> list[str]:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return [find_nvcc() or "nvcc", "-cubin", target, *CUDA_FLAGS, *STRICT_FLAGS]


def _digest(source: Path, architecture: str) -> str:
    """Of what the machine code depends on."""
    command = _command(architecture)
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(repr([*command, version.stdout]).encode())
    for path in [source, *sorted(SOURCES.glob("*.cuh")), *sorted(SOURCES.glob("*.h"))]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _disassembled(cubin: Path) -> dict[str, str]:
    """Machine code by (mangled) kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _rows(architecture: str, log: str, code: dict[str, str]) -> list[Compiled]:
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    reports = dict(zip(parts[1::2], parts[2::2], strict=True))
    if reports.keys() != code.keys():
        raise RuntimeError(f"ptxas reports {sorted(reports)}, the machine code has {sorted(code)}")
    names = _short_names(list(reports))
    return [
        _row(architecture, name, reports[x], code[x]) for x, name in zip(reports, names, strict=True)
    ]


def _row(architecture: str, name: str, report: str, listing: str) -> Compiled:
    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report)))

    generation, registers = _generation(architecture), number(r"Used (\d+) registers")
    code = machine_code.instructions(listing)
    hot = name.startswith((*MULTIPLY, *WARPGROUPS)) and generation in machine_code.RATES
    _, block_warps = WARPGROUPS.get(name.partition("<")[0], ("", BLOCK_WARPS))
    return Compiled(
        architecture,
        name,
        registers=registers,
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill (?:stores|loads)"),
        shared=number(r"(\d+) bytes smem"),
        warps=machine_code.resident_warps(generation, registers, block_warps),
        tensor_core=sum(x.kind == "tensor" for x in code),
        ldmatrix=sum(x.opcode.startswith("LDSM") for x in code),
        loops=tuple(machine_code.loop_lines(machine_code.hot_loops(code, generation))) if hot else (),
    )


def _generation(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def compiler() -> str:
    """Its name and version."""
    command = [find_nvcc() or "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.findall(r'V[0-9.]+', text)[-1]}"


def _short_names(mangled: list[str]) -> list[str]:
    """Names without namespaces and parameters."""
    names = "\n".join(mangled)
    result = subprocess.run(
        ["c++filt", "--no-params"], input=names, capture_output=True, text=True, check=True
    )
    return [re.sub(r"(\w+|\(anonymous namespace\))::", "", name) for name in result.stdout.splitlines()]


def compile_all(architecture: str, named: str = EVERY) -> list[Compiled]:
    """Every kernel in csrc/ that the architecture has, of the sources so named, sorted by name."""
    sources = sorted(SOURCES.glob(named))
    with ThreadPoolExecutor(JOBS) as pool:
        compiled = pool.map(lambda source: compile_source(source, architecture), sources)
        rows = [row for rows in compiled for row in rows]
    return sorted((row for row in rows if _exists(row.kernel, architecture)), key=lambda row: row.name)


def _exists(kernel: str, architecture: str) -> bool:
    return WARPGROUPS.get(kernel, (architecture,))[0] == architecture


def _multiplying(architecture: str) -> set[str]:
    """Kernels with tensor-core instructions."""
    return {*MULTIPLY, *(kernel for kernel in WARPGROUPS if _exists(kernel, architecture))}


def faults(row: Compiled) -> list[str]:
    """What is wrong with a compiled kernel: spills, stack, registers, the wrong arithmetic."""
    found = []
    if row.spills:
        found.append(f"{row.spills} bytes spilled")
    if row.stack > STACK.get(row.kernel, 0):
        found.append(f"{row.stack} bytes of stack")
    if not 0 < row.registers <= REGISTERS:
        found.append(f"{row.registers} registers")
    multiplying = row.kernel in _multiplying(row.architecture)
    if multiplying and IEEE not in row.name and not row.tensor_core:
        found.append("no tensor-core instruction")
    if row.tensor_core and (not multiplying or IEEE in row.name):
        found.append("tensor-core instructions")
    return found


def main(arguments: list[str]) -> int:
    """Print the table; 1 if any row is at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.cubin", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--update", action="store_true", help="write the committed bounds anew")
    parser.add_argument("--sources", default=EVERY, help="which of csrc/ to compile")
    options = parser.parse_args(arguments)
    sample = options.sources != EVERY
    if options.update and sample:
        parser.error("--update: expected every source, got --sources; leave out one of them")
    if unknown := [x for x in options.architectures if _generation(x) not in machine_code.SHARED_MEMORY]:
        parser.error(f"expected architectures of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
    status = 0
    for architecture in options.architectures:
        try:
            rows = compile_all(architecture, options.sources)
        except RuntimeError as error:
            print(f"sm_{architecture}  <- {error}", flush=True)
            status = 1
            continue
        table = [(str(row), faults(row)) for row in rows]
        missing = set() if sample else _multiplying(architecture) - {row.kernel for row in rows}
        table += [(f"sm_{architecture:<5}{kernel}", ["no such kernel"]) for kernel in sorted(missing)]
        committed = bounds_file.FOLDER / f"cuda_sm_{architecture}.txt"
        command = f"python -m tests.cubin --update {architecture}"
        text, wrong = bounds_file.settle(table, committed, compiler(), command, options.update, sample)
        status |= wrong
        printed = ROOT / "build" / "aot" / f"cuda_sm_{architecture}.txt"
        printed.parent.mkdir(parents=True, exist_ok=True)
        printed.write_text(text)
        print(text, end="", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
