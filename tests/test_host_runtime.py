"""The runtime that executes csrc/'s kernels on the CPU: its schedule, its errors, its leaf functions."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import host_build

SOURCE = host_build.RUNTIME / "leaf_tests.cpp"
INVALID_VALUE, INVALID_CONFIGURATION, LAUNCH_FAILURE = 1, 9, 719
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # the PTX ISA's groupID and threadID_in_group
KILO = 1024


def leaf_library(variant: str, *flags: str) -> Path:
    return host_build.library("libleaf_tests.so", [SOURCE], variant, flags=flags)


class Leaf:
    """The entry points of leaf_tests.cpp; arrays go as pointers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.leaf_error_string.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> Any:
        def native(argument: Any) -> Any:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                return ctypes.c_void_p(argument.ctypes.data)
            return argument

        return getattr(self.library, f"leaf_{name}")(*map(native, arguments))

    def run(self, name: str, *arguments: Any) -> None:
        error = self.call(name, *arguments)
        assert error == 0, self.message(error)

    def message(self, error: int) -> str:
        return self.call("error_string", error).decode()


@pytest.fixture(scope="module")
def loaded() -> Leaf:
    return Leaf(leaf_library("plain"))


@pytest.fixture
def leaf(loaded: Leaf, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaf]:
    monkeypatch.delenv("HYPERCONV_HOST_SKIP", raising=False)
    loaded.call("last_error")
    yield loaded
    assert loaded.call("last_error") == 0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Leaf functions. The layouts are written down as the PTX ISA gives them: a row and a column for every
# element of a lane's fragment.


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(leaf: Leaf, rng: np.random.Generator, transpose: bool) -> None:
    stored = (np.arange(32)[:, None] * 8 + np.arange(8)).astype(np.uint16)
    rows = rng.permutation(32).astype(np.int32)
    registers = np.zeros((32, 4), np.uint32)
    leaf.run("ldmatrix", transpose, stored, rows, registers)
    for m in range(4):
        matrix = stored[rows[8 * m : 8 * m + 8]]
        if transpose:
            matrix = matrix.T
        assert (registers[:, m] & 0xFFFF == matrix[G, 2 * T]).all()
        assert (registers[:, m] >> 16 == matrix[G, 2 * T + 1]).all()


def fragment(matrix: np.ndarray, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """[32, elements]: what each lane holds of a matrix."""
    elements = [matrix[row, column] for row, column in zip(rows, columns, strict=True)]
    return np.ascontiguousarray(np.stack(elements, axis=1))


def accumulator(matrix: np.ndarray) -> np.ndarray:
    rows = [G + (0 if i < 2 else 8) for i in range(4)]
    return fragment(matrix, rows, [2 * T + (i & 1) for i in range(4)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_m16n8k16(leaf: Leaf, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    a_rows = [G if i < 2 or 4 <= i < 6 else G + 8 for i in range(8)]
    a_columns = [2 * T + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
    b_rows = [2 * T + (i & 1) + (8 if i >= 2 else 0) for i in range(4)]
    a_lanes = fragment(a.view(torch.int16).numpy(), a_rows, a_columns)
    b_lanes = fragment(b.view(torch.int16).numpy(), b_rows, [G] * 4)
    c_lanes = accumulator(c.numpy())
    leaf.run("mma", 0 if dtype == torch.float16 else 1, a_lanes, b_lanes, c_lanes)
    expected = c.double() + a.double() @ b.double()
    np.testing.assert_allclose(c_lanes, accumulator(expected.numpy()), rtol=0, atol=1e-5)


def test_mma_m16n8k8_tf32(leaf: Leaf, rng: np.random.Generator) -> None:
    a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    a_rows = [G if i in (0, 2) else G + 8 for i in range(4)]
    a_lanes = fragment(a, a_rows, [T if i < 2 else T + 4 for i in range(4)])
    b_lanes = fragment(b, [T, T + 4], [G, G])
    c_lanes = accumulator(c)
    leaf.run("mma", 2, a_lanes, b_lanes, c_lanes)
    a, b = ((m.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for m in (a, b))
    np.testing.assert_allclose(c_lanes, accumulator(c + a @ b), rtol=0, atol=1e-5)


def test_copies_land_when_waited_for(leaf: Leaf, rng: np.random.Generator) -> None:
    threads = 64
    memory = rng.integers(1 << 30, size=4 * threads + 3, dtype=np.int32)
    first = -memory.ctypes.data // 4 % 4
    source = memory[first : first + 4 * threads].reshape(threads, 4)
    assert source.ctypes.data % 16 == 0
    issued, landed = np.zeros_like(source), np.zeros_like(source)
    leaf.run("copy", threads, source, issued, landed)
    assert (issued == -1).all()
    assert (landed[::2] == source[::2]).all()
    assert (landed[1::2] == 0).all()


def floats_of_all_kinds(rng: np.random.Generator) -> np.ndarray:
    """Random bits, every bfloat16, every float16, the ties between neighbours, and their neighbours."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    coarse = np.arange(1 << 16, dtype=np.uint32) << 16
    exact = np.concatenate([halves, coarse, coarse | 0x2000])
    ties = np.concatenate([halves | 0x1000, coarse | 0x8000, coarse | 0x1000, coarse | 0x3000])
    steps = np.arange(1, 2048, dtype=np.float32) * 2.0**-25  # halfway between subnormal float16
    steps = np.concatenate([steps, -steps]).view(np.uint32)
    base = np.concatenate([exact, ties, steps])
    bits = np.concatenate([base, base + np.uint32(1), base - np.uint32(1)])
    return np.concatenate([bits, rng.integers(1 << 32, size=100_000, dtype=np.uint32)]).view(np.float32)


def nearest_tf32(values: np.ndarray) -> np.ndarray:
    """Ten bits after the leading one, ties away from zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(values.astype(np.float64))
        place = np.ldexp(1.0, np.maximum(exponent, -125) - 11)
        rounded = np.trunc(np.abs(values) / place + 0.5) * place
        return np.copysign(rounded, values).astype(np.float32)


def test_conversions_from_float(leaf: Leaf, rng: np.random.Generator) -> None:
    values = floats_of_all_kinds(rng)
    count, nan = len(values), np.isnan(values)
    results = {torch.float16: np.zeros(count, np.uint16), torch.bfloat16: np.zeros(count, np.uint16)}
    tf32 = np.zeros(count, np.uint32)
    packed = {dtype: np.zeros(count, np.uint32) for dtype in results}
    leaf.run("convert", count, values, *results.values(), tf32, *packed.values())
    for dtype, got in results.items():
        expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (got[~nan] == expected[~nan]).all()
        assert (got[nan] == 0x7FFF).all()
        assert (packed[dtype] & 0xFFFF == got).all()
        assert (packed[dtype] >> 16 == np.roll(got, -1)).all()
    assert (tf32[~nan] == nearest_tf32(values[~nan]).view(np.uint32)).all()
    assert np.isnan(tf32[nan].view(np.float32)).all()


def test_conversions_to_float(leaf: Leaf) -> None:
    halves, bfloats = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    leaf.run("widen", halves, bfloats)
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(halves, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloats, (bits.astype(np.uint32) << 16).view(np.float32))
    signs = np.signbit(halves), np.signbit(bfloats)
    assert all((sign == (bits >= 1 << 15)).all() for sign in signs)


@pytest.mark.parametrize("width", [32, 8, 1])
@pytest.mark.parametrize("kind", ["index", "down", "xor"])
def test_shuffles(leaf: Leaf, rng: np.random.Generator, kind: str, width: int) -> None:
    values = rng.standard_normal(32, np.float32)
    operands = rng.integers(32, size=32, dtype=np.int32)
    shuffled = np.zeros(32, np.float32)
    leaf.run("shuffle", ("index", "down", "xor").index(kind), width, operands, values, shuffled)
    begin = LANE // width * width
    source = {"index": begin + operands % width, "down": LANE + operands, "xor": LANE ^ operands}[kind]
    source = np.where(source < begin + width, source, LANE)
    assert (shuffled == values[source]).all()


# The schedule.


def barrier_line(comment: str) -> int:
    lines = SOURCE.read_text().splitlines()
    (line,) = (n for n, text in enumerate(lines, 1) if f"__syncthreads();  // {comment}" in text)
    return line


def exchange(leaf: Leaf, threads: int = 256, rounds: int = 3) -> bool:
    """Whether every number went `rounds` places around and grew by 1 at each."""
    numbers = np.arange(threads, dtype=np.float32)
    leaf.run("exchange", threads, rounds, numbers)
    return bool((numbers == np.roll(np.arange(threads), -rounds) + rounds).all())


def test_barriers_order_a_block(leaf: Leaf) -> None:
    assert exchange(leaf)
    assert exchange(leaf, threads=80)  # the last warp has 16 lanes


@pytest.mark.parametrize("barrier", ["written", "read"])
@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_shows(
    leaf: Leaf, monkeypatch: pytest.MonkeyPatch, barrier: str, seed: int
) -> None:
    monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
    monkeypatch.setenv("HYPERCONV_HOST_SKIP", f"leaf_tests.cpp:{barrier_line(barrier)}")
    assert not exchange(leaf)


@pytest.mark.parametrize(
    "place",
    ["leaf_tests.cpp:1", "leaf_tests.c:{}", "leaf_kernel.cu:{}", "tests.cpp:{}", "leaf_tests.cpp"],
)
def test_other_barriers_are_not_skipped(leaf: Leaf, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("HYPERCONV_HOST_SKIP", place.format(barrier_line("written")))
    assert exchange(leaf)


@pytest.mark.parametrize("synchronized", [True, False])
def test_a_missing_syncwarp_shows(leaf: Leaf, synchronized: bool) -> None:
    numbers = np.arange(32, dtype=np.float32)
    leaf.run("warp_exchange", synchronized, 3, numbers)
    assert (numbers == np.roll(np.arange(32), -3) + 3).all() == synchronized


def schedule(leaf: Leaf, grid: tuple[int, int, int], block: tuple[int, int, int]) -> np.ndarray:
    """[blocks, threads]: when each thread ran; every one did once, at its own coordinates."""
    blocks, threads = np.prod(grid), np.prod(block)
    clock, order, runs = (np.zeros(n, np.int32) for n in (1, blocks * threads, blocks * threads))
    block_index, thread_index = (np.zeros((blocks, threads, 3), np.uint32) for _ in range(2))
    shapes = np.array(grid, np.uint32), np.array(block, np.uint32)
    leaf.run("order", *shapes, clock, order, runs, block_index, thread_index)
    assert (runs == 1).all()
    for index, shape, axis in ((block_index, grid, 0), (thread_index, block, 1)):
        place = np.arange(blocks * threads).reshape(blocks, threads)
        place = place // threads if axis == 0 else place % threads
        x, y, z = np.moveaxis(index, -1, 0)
        assert (x + shape[0] * (y + shape[1] * z) == place).all()
        assert (x < shape[0]).all()
        assert (y < shape[1]).all()
    return order.reshape(blocks, threads)


def test_blocks_warps_and_lanes_run_in_random_order(leaf: Leaf) -> None:
    times = schedule(leaf, (3, 2, 2), (4, 8, 5))
    starts = times.min(axis=1)
    assert (times - starts[:, None] < 160).all()  # blocks run one after another
    assert (np.diff(starts) < 0).any()
    warps = times.reshape(12, 5, 32)
    assert (np.ptp(warps, axis=2) == 31).all()  # so do warps
    assert len({tuple(np.argsort(block)) for block in warps.min(axis=2)}) > 6
    assert len({tuple(np.argsort(lanes)) for lanes in warps.reshape(-1, 32)}) > 30


def test_a_seed_repeats_a_schedule(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(seed: int) -> np.ndarray:
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        return schedule(leaf, (4, 1, 1), (64, 1, 1))

    first = times(1000)
    assert (times(999) == first).all()  # the same seed once the launches in between are added
    assert (times(999) != first).any()


def test_shared_memory_starts_as_nan_in_every_block(leaf: Leaf) -> None:
    found = np.zeros((4, 100), np.float32)
    leaf.run("poison", 4, 100, found)
    assert np.isnan(found).all()


def test_atomic_add(leaf: Leaf) -> None:
    total, before = np.zeros(1, np.float32), np.zeros(640, np.float32)
    leaf.run("add", 10, 64, total, before)
    assert total == 320
    assert (np.sort(before) == np.arange(640) / 2).all()


def test_threads_of_the_operating_system_take_turns(leaf: Leaf) -> None:
    faulted, looked = threading.Barrier(4), threading.Barrier(4)

    def work(number: int) -> tuple[bool, int]:
        right = all(exchange(leaf, threads=32 * (number + 1)) for _ in range(20))
        if number == 0:
            leaf.call("faulty", FAULTS.index("exception"))
        faulted.wait(60)
        if number == 0:
            looked.wait(60)
        error = leaf.call("last_error")
        if number != 0:
            looked.wait(60)
        return right, error

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results == [(True, LAUNCH_FAILURE), *[(True, 0)] * 3]


def test_fibers_without_assembly() -> None:
    assert exchange(Leaf(leaf_library("plain", "-DHYPERCONV_HOST_UCONTEXT")))


# Errors.

MESSAGES = {
    "barrier lines": "divergent barrier: 64 threads wait at different lines, one of them leaf_tests",
    "barrier exited": "divergent barrier: 32 threads wait at leaf_tests.cpp:",
    "barrier exited in warp": "divergent barrier: 63 threads wait at leaf_tests.cpp:",
    "collective barrier": "divergent collective: 16 lanes wait at __syncwarp (leaf_tests.cpp:",
    "collectives": "divergent collective: 32 lanes wait at different collectives, one of them __shfl_",
    "collective lines": "divergent collective: 32 lanes wait at different collectives",
    "collective exited": "0 at a barrier, 16 have exited",
    "partial warp": "divergent collective: 16 lanes wait at __syncwarp (leaf_tests.cpp:",
    "partial mask": "only the mask of all lanes",
    "copy unwaited": "thread (40, 0, 0): exited with 1 cp_async_16 that it never waited for",
    "copy misaligned shared": "cp_async_16 (leaf_tests.cpp:",
    "copy misaligned global": "global memory address not a multiple of 16",
    "copy outside": "16 bytes at offset ",
    "ldmatrix misaligned": "thread (9, 0, 0): ldmatrix_x4 (leaf_tests.cpp:",
    "ldmatrix outside": "16 bytes at offset -16 of 512 bytes of shared memory",
    "exception": "block (0, 0, 0), thread (40, 0, 0): exception: thrown by thread 40",
}
FAULTS = [*MESSAGES, "overrun", "misaligned load"]  # as leaf_tests.cpp numbers them


@pytest.mark.parametrize("fault", MESSAGES)
def test_faults_are_reported(leaf: Leaf, fault: str) -> None:
    assert leaf.call("faulty", FAULTS.index(fault)) == LAUNCH_FAILURE
    assert leaf.call("peek_error") == LAUNCH_FAILURE
    assert leaf.call("last_error") == LAUNCH_FAILURE
    assert leaf.call("last_error") == 0
    assert MESSAGES[fault] in leaf.message(LAUNCH_FAILURE)
    assert exchange(leaf)  # the next launch is none the worse


def configure(leaf: Leaf, grid: tuple[int, ...], block: tuple[int, ...], shared: int = 0) -> int:
    shapes = np.array(grid, np.uint32), np.array(block, np.uint32)
    error = leaf.call("configure", *shapes, ctypes.c_uint64(shared))
    assert leaf.call("last_error") == error
    return error


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ((1, 1, 1), (1024, 1, 1), 0),
        ((1, 1, 1), (8, 4, 32), 0),
        ((0, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1 << 16, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1 << 31, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 33, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), INVALID_CONFIGURATION),
    ],
)
def test_launch_configurations(
    leaf: Leaf, grid: tuple[int, ...], block: tuple[int, ...], error: int
) -> None:
    assert configure(leaf, grid, block) == error


def test_shared_memory_must_be_allowed(leaf: Leaf) -> None:
    def launch(kilobytes: float) -> int:
        return configure(leaf, (1, 1, 1), (32, 1, 1), int(kilobytes * KILO))

    def allow(other: bool, kilobytes: int) -> int:
        return leaf.call("allow", other, kilobytes * KILO)

    assert launch(48.5) == INVALID_VALUE
    assert allow(False, 0) == 0  # 48 KiB never need to be asked for
    assert launch(48) == 0
    assert launch(48.5) == INVALID_VALUE
    assert allow(True, 100) == 0  # another kernel
    assert launch(48.5) == INVALID_VALUE
    assert allow(False, 100) == 0
    assert launch(100) == 0
    assert launch(101) == INVALID_VALUE
    assert allow(False, 227) == 0
    assert launch(227) == 0
    assert allow(False, 228) == INVALID_VALUE
    assert leaf.call("last_error") == INVALID_VALUE
    assert str(228 * KILO) in leaf.message(INVALID_VALUE)
    assert launch(228) == INVALID_VALUE


# Sanitizers, each in a process of its own.

SANITIZED = """
import ctypes, sys
leaf = ctypes.CDLL(sys.argv[1])
numbers = (ctypes.c_float * 256)(*range(256))
for fault in map(int, sys.argv[2].split(",")):
    assert leaf.leaf_faulty(fault) == 719, fault
    assert leaf.leaf_exchange(256, 3, numbers) == 0
registers = (ctypes.c_uint32 * 128)()
for format in range(3):
    assert leaf.leaf_mma(format, registers, registers, (ctypes.c_float * 128)()) == 0
assert leaf.leaf_ldmatrix(1, registers, (ctypes.c_int * 32)(), registers) == 0
values = (ctypes.c_float * 3)(1e-6, 70000, float("nan"))
assert leaf.leaf_convert(3, values, *((ctypes.c_uint32 * 3)() for _ in range(5))) == 0
assert numbers[0] > 0
print("fine so far", flush=True)
for fault in map(int, sys.argv[3:]):
    leaf.leaf_faulty(fault)
print("reached the end")
"""


def sanitized(*faults: str) -> subprocess.CompletedProcess[str]:
    harmless = ",".join(str(FAULTS.index(fault)) for fault in MESSAGES)
    wanted = [str(FAULTS.index(fault)) for fault in faults]
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, leaf_library("sanitized"), harmless, *wanted],
        env={**os.environ, **host_build.preload("sanitized")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_runtime_itself_passes_the_sanitizers() -> None:
    run = sanitized()
    assert run.returncode == 0, run.stderr
    assert "reached the end" in run.stdout
    assert "ERROR" not in run.stderr


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("overrun", "heap-buffer-overflow"),
        ("misaligned load", "load of misaligned address"),
    ],
)
def test_sanitizers_see_into_kernels(fault: str, report: str) -> None:
    run = sanitized(fault)
    assert run.returncode != 0
    assert "fine so far" in run.stdout
    assert "reached the end" not in run.stdout
    assert report in run.stderr
    assert "faulty_kernel" in run.stderr


# The build.


def test_a_build_error_says_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_build, "BUILDS", tmp_path / "builds")
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel(int unused) { undeclared(); }\n")
    with pytest.raises(host_build.BuildError, match="undeclared"):
        host_build.library("libbroken.so", [source], "plain")
    assert not list((tmp_path / "builds").rglob("*.so"))


def test_a_build_is_made_once_for_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_build, "BUILDS", tmp_path / "builds")
    compiled: list[str] = []
    produce = host_build._produce

    def watch(target: Path, command: list[str]) -> None:
        compiled.append(target.name.split("-")[0])
        produce(target, command)

    monkeypatch.setattr(host_build, "_produce", watch)
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cu").write_text('#include "header.cuh"\nint one() { return number; }\n')
    (sources / "two.cu").write_text("int two() { return 2; }\n")
    (sources / "header.cuh").write_text("constexpr int number = 1;\n")

    def built() -> list[str]:
        compiled.clear()
        files = [sources / "one.cu", sources / "two.cu"]
        assert host_build.library("lib.so", files, "plain", sources).exists()
        return sorted(compiled)

    assert built() == ["asynchronous", "lib.so", "one", "runtime", "two", "warp", "warpgroup"]
    assert built() == []
    (sources / "two.cu").write_text("int two() { return 3; }\n")
    assert built() == ["lib.so", "two"]
    (sources / "header.cuh").write_text("constexpr int number = 11;\n")
    assert built() == ["asynchronous", "lib.so", "one", "runtime", "two", "warp", "warpgroup"]
