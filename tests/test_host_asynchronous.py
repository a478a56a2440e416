"""The twins of csrc/ptx_sm90.cuh against the PTX ISA, and the faults that they are to notice."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests import host_build

from .test_host_runtime import LANE, LAUNCH_FAILURE, G, Leaf, T, fragment

SOURCE = host_build.RUNTIME / "asynchronous_tests.cpp"
NONE, BY_32, BY_64, BY_128 = range(4)  # swizzles


@pytest.fixture(scope="module")
def loaded() -> Leaf:
    return Leaf(host_build.library("libasynchronous_tests.so", [SOURCE], "plain"))


@pytest.fixture(params=["late", "eager"])
def leaf(loaded: Leaf, request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaf]:
    monkeypatch.delenv("HYPERCONV_HOST_SKIP", raising=False)
    monkeypatch.setenv("HYPERCONV_HOST_EAGER", str(int(request.param == "eager")))
    loaded.call("last_error")
    yield loaded
    assert loaded.call("last_error") == 0


@pytest.fixture
def late(loaded: Leaf, monkeypatch: pytest.MonkeyPatch) -> Leaf:
    monkeypatch.delenv("HYPERCONV_HOST_EAGER", raising=False)
    return loaded


def aligned(size: int, dtype: type) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes."""
    memory = np.zeros(size * np.dtype(dtype).itemsize + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size * np.dtype(dtype).itemsize].view(dtype)


# Products. Warp w of the four holds rows 16 w to 16 w + 15, as m16n8k16 has them.


def cores(b: np.ndarray, k_stride: int, n_stride: int, transposed: bool) -> np.ndarray:
    """b [16, N] as unswizzled 8x8 cores: 8 rows (columns of b) of 8 numbers along k, or along N."""
    memory = aligned(b.shape[1] * 16, np.int16)
    for k in range(16):
        for n in range(b.shape[1]):
            inner, outer = (n, k) if transposed else (k, n)
            place = k // 8 * k_stride + n // 8 * n_stride + outer % 8 * 16 + inner % 8 * 2
            memory[place // 2] = b[k, n]
    return memory


def sums(matrix: np.ndarray) -> np.ndarray:
    """[128, N / 2]: what each thread holds of d [64, N]."""
    warps = []
    for warp in range(4):
        rows = [16 * warp + G + 8 * (i % 4 // 2) for i in range(matrix.shape[1] // 2)]
        columns = [8 * (i // 4) + 2 * T + i % 2 for i in range(matrix.shape[1] // 2)]
        warps.append(fragment(matrix, rows, columns))
    return np.ascontiguousarray(np.concatenate(warps))


def swizzled_rows(b: np.ndarray) -> np.ndarray:
    """b [16, 64] as rows of eight 16-byte chunks, that of columns 8 c at place c XOR the row mod 8."""
    memory = aligned(b.size, np.int16)
    rows = memory.reshape(16, 8, 8)
    for k in range(16):
        for c in range(8):
            rows[k, c ^ k % 8] = b[k, 8 * c : 8 * c + 8]
    return memory


# (width, transposed, bytes between cores along k and along N; none of them: swizzled)
RIGHTS = [
    *((width, 0, (width * 16, 128)) for width in (32, 48, 64, 80, 128)),
    *((width, transposed, (128, 256)) for width, transposed in ((80, 0), (64, 1))),
    (64, 1, (1024, 128)),
    (64, 1, (0, 0)),
]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("width", "transposed", "strides"), RIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_wgmma(leaf: Leaf, dtype, width: int, transposed: int, strides, accumulate: bool) -> None:
    torch.manual_seed(0)
    a, b, d = torch.randn(64, 16).to(dtype), torch.randn(16, width).to(dtype), torch.randn(64, width)
    left = []
    for warp in range(4):
        rows = [16 * warp + G + 8 * (i // 2 % 2) for i in range(8)]
        columns = [2 * T + i % 2 + 8 * (i // 4) for i in range(8)]
        left.append(fragment(a.view(torch.int16).numpy(), rows, columns))
    lanes, before = sums(d.numpy()), np.zeros((128, width // 2), np.float32)
    bits = b.view(torch.int16).numpy()
    right = cores(bits, *strides, bool(transposed)) if any(strides) else swizzled_rows(bits)
    kind = (int(dtype is torch.float16), width, transposed)
    leaf.run("wgmma", *kind, np.concatenate(left), right, *strides, accumulate, lanes, before)
    expected = 2 * (a.double() @ b.double()) + (d.double() if accumulate else 0)
    np.testing.assert_allclose(lanes, sums(expected.numpy()), rtol=0, atol=1e-4)


def test_sums_are_nan_until_waited_for(late: Leaf) -> None:
    zeros = np.zeros((128, 4), np.uint32)
    d, before = np.ones((128, 32), np.float32), np.ones((128, 32), np.float32)
    late.run("wgmma", 1, 64, 0, zeros, aligned(1024, np.int16), 1024, 128, True, d, before)
    assert np.isnan(before).all() and (d == 1).all()


# Matrices in registers.


def test_movmatrix(leaf: Leaf) -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)

    def pairs(m: np.ndarray) -> np.ndarray:
        return m[G, 2 * T].astype(np.uint32) | m[G, 2 * T + 1].astype(np.uint32) << 16

    turned = np.zeros(32, np.uint32)
    leaf.run("movmatrix", pairs(matrix), turned)
    assert (turned == pairs(matrix.T)).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix(leaf: Leaf, transpose: bool) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.zeros((32, 4), np.uint32)
    for m in range(4):
        low, high = matrices[m][G, 2 * T], matrices[m][G, 2 * T + 1]
        registers[:, m] = low.astype(np.uint32) | high.astype(np.uint32) << 16
    rows = np.random.default_rng(0).permutation(32).astype(np.int32)
    stored = np.zeros((32, 4), np.uint32)
    leaf.run("stmatrix", transpose, rows, registers, stored)
    if transpose:
        matrices = matrices.transpose(0, 2, 1)
    assert (stored.view(np.uint16)[rows[LANE]] == matrices[LANE // 8, LANE % 8]).all()


# Copies.


class Tensor:
    """Numbers [n, h, w, c] in memory, and the map of a box [1, h, w, c] of them."""

    def __init__(self, leaf: Leaf, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: int) -> None:
        self.data = aligned(int(np.prod(sizes)), np.uint16).reshape(sizes)
        self.data[:] = np.arange(1, self.data.size + 1).reshape(sizes)
        self.map, self.box, self.swizzle = aligned(128, np.uint8), box, swizzle
        strides = np.array(self.data.strides[2::-1], np.uint64)
        extents = np.array(sizes[::-1], np.uint64)
        sides = np.array(box[::-1], np.uint32)
        assert leaf.call("encode", self.map, self.data, extents, strides, sides, swizzle) == 0

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * 2

    def expected(self, place: tuple[int, int, int, int]) -> np.ndarray:
        """The box at [n, h, w, c], zeros outside."""
        result = np.zeros(self.box, np.uint16)
        for index in np.ndindex(*self.box):
            at = tuple(p + i for p, i in zip(place, index, strict=True))
            if all(0 <= a < s for a, s in zip(at, self.data.shape, strict=True)):
                result[index] = self.data[at]
        return result

    def swizzled(self, box: np.ndarray) -> np.ndarray:
        """As it lies at a multiple of 1024: the PTX ISA's tables of 16-byte chunks by row."""
        chunks = box.reshape(-1, 8)
        result = np.empty_like(chunks)
        for i, chunk in enumerate(chunks):
            line, column = divmod(i, 8)  # of 128 bytes
            column ^= line % {NONE: 1, BY_32: 2, BY_64: 4, BY_128: 8}[self.swizzle]
            result[8 * line + column] = chunk
        return result.reshape(box.shape)


PLACES = [(0, 0, 0, 0), (1, 2, 3, 8), (0, -2, -1, 0), (1, 4, 5, 0), (2, 0, 0, 0), (0, 0, 0, -8)]
SWIZZLES = [(64, BY_128), (32, BY_64), (16, BY_32), (24, NONE)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("channels", "swizzle"), SWIZZLES)
def test_tensor_load(leaf: Leaf, channels: int, swizzle: int, place, monkeypatch) -> None:
    tensor = Tensor(leaf, (2, 6, 7, channels), (1, 4, 8, channels), swizzle)
    issued, landed = np.zeros(tensor.box, np.uint16), np.zeros(tensor.box, np.uint16)
    at = np.array(place[::-1], np.int32)
    leaf.run("load", tensor.map, at, tensor.bytes, issued, landed)
    expected = tensor.swizzled(tensor.expected(place))
    assert (landed == expected).all()
    monkeypatch.setenv("HYPERCONV_HOST_EAGER", "0")
    leaf.run("load", tensor.map, at, tensor.bytes, issued, landed)
    assert (landed == expected).all() and (issued == 0xFFFF).all()


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("channels", "swizzle"), SWIZZLES)
def test_tensor_store(leaf: Leaf, channels: int, swizzle: int, place) -> None:
    tensor = Tensor(leaf, (2, 6, 7, channels), (1, 4, 8, channels), swizzle)
    box = np.arange(1, tensor.bytes // 2 + 1, dtype=np.uint16).reshape(tensor.box) + 10000
    before = tensor.data.copy()
    leaf.run("store", tensor.map, np.array(place[::-1], np.int32), tensor.bytes, tensor.swizzled(box), 0)
    for index in np.ndindex(*tensor.box):
        at = tuple(p + i for p, i in zip(place, index, strict=True))
        if all(0 <= a < s for a, s in zip(at, tensor.data.shape, strict=True)):
            before[at] = box[index]
    assert (tensor.data == before).all()


def test_a_store_reads_when_it_is_waited_for(late: Leaf) -> None:
    tensor = Tensor(late, (1, 4, 8, 64), (1, 4, 8, 64), BY_128)
    place = np.zeros(4, np.int32)
    late.run("store", tensor.map, place, tensor.bytes, np.zeros(tensor.box, np.uint16), 1)
    assert (tensor.data == 0x0101).all()


@pytest.mark.parametrize(
    ("sizes", "strides", "box", "swizzle"),
    [
        ((64, 7, 6, 0), (128, 896, 5376), (64, 8, 4, 1), BY_128),  # an empty axis
        ((64, 7, 6, 2), (120, 896, 5376), (64, 8, 4, 1), BY_128),  # a stride no multiple of 16
        ((64, 7, 6, 2), (128, 896, 1 << 40), (64, 8, 4, 1), BY_128),  # too far
        ((64, 7, 6, 2), (128, 896, 5376), (64, 257, 4, 1), BY_128),  # too wide a box
        ((64, 7, 6, 2), (128, 896, 5376), (64, 8, 4, 1), BY_64),  # more than the swizzle spans
        ((64, 7, 6, 2), (128, 896, 5376), (12, 8, 4, 1), BY_128),  # rows of 24 bytes
    ],
)
def test_a_map_that_the_driver_refuses(late: Leaf, sizes, strides, box, swizzle: int) -> None:
    memory, map = aligned(64, np.uint8), aligned(128, np.uint8)
    numbers = (np.array(sizes, np.uint64), np.array(strides, np.uint64), np.array(box, np.uint32))
    assert late.call("encode", map, memory, *numbers, swizzle) == 1


# Barriers.


def test_phases(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        read = np.full((2, 9), -1, np.int32)
        leaf.run("phases", 9, read)
        assert (read == np.arange(9)).all()


def test_named_barrier(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        read = np.zeros((4, 96), np.int32)
        leaf.run("named", 4, read)
        assert (read == 3 * np.arange(1, 5)[:, None]).all()


# Faults, in the order of their numbers. Some are found in one of the modes only: (message, modes).
BOTH, LATE = ("late", "eager"), ("late",)
FAULTS = [
    ("", BOTH),
    ("no mbarrier was initialised", BOTH),
    ("initialised without a fence_proxy_async", BOTH),
    ("mbarrier_init .*: a count of 0", BOTH),
    ("mbarrier_init .*: .*not a multiple of 8", BOTH),
    ("mbarrier_init .*: 8 bytes at", BOTH),
    ("more than 1 arrivals|a phase ended before this thread went on|waits for ever", BOTH),
    ("barrier .*: waits for ever", BOTH),
    ("a phase ended before this thread went on|waits for ever", BOTH),
    ("more bytes landed than were announced", BOTH),
    ("ended with 2048 bytes under way to the mbarrier", LATE),
    ("bulk_load .*: 2040 bytes", BOTH),
    ("bulk_load .*: shared memory address not a multiple of 16", BOTH),
    ("bulk_load .*: global memory address not a multiple of 16", BOTH),
    ("bulk_load .*: 2048 bytes at", BOTH),
    ("ldmatrix_x4_trans .*: reads what a copy brings", BOTH),
    ("thread .5|thread .37|thread .69|thread .101", BOTH),
    ("tensor_load .*: shared memory address not a multiple of 128", BOTH),
    ("tensor_store .*: reads what threads have written", BOTH),
    ("stmatrix_x4 .*: a store has yet to read", BOTH),
    ("stmatrix_x4 .*: a store has yet to read", BOTH),
    ("stmatrix_x4 .*: a store has yet to read", BOTH),
    ("stmatrix_x4 .*: no __syncwarp", BOTH),
    ("stmatrix_x4 .*: (no named_barrier|a store has yet to read)", BOTH),
    ("tensor_load .*: a store has yet to read", BOTH),
    ("wgmma .*: no wgmma_fence", BOTH),
    ("exited with 1 groups of wgmma", BOTH),
    ("exited with 1 wgmma that it never committed", BOTH),
    ("wgmma .*: its left operand changed", LATE),
    ("wgmma .*: an accumulator was written to", LATE),
    ("wgmma .*: a descriptor with another swizzle", BOTH),
    ("wgmma .*: the right operand reaches outside", BOTH),
    ("wgmma .*: reads what threads have written", BOTH),
    ("wgmma .*: a swizzled right operand that does not begin", BOTH),
    ("wgmma .*: lanes disagree", BOTH),
    ("warps 0 and 3 with other wgmma", BOTH),
    ("setmaxnreg .*: 100 registers", BOTH),
    ("warps 0 and 2 with other registers", BOTH),
    ("barrier .*: waits for ever", BOTH),
    ("named_barrier .*: .* threads where others expect", BOTH),
    ("named_barrier .*: number 16", BOTH),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)), ids=lambda i: f"{i}-{FAULTS[i][0][:30]}")
@pytest.mark.parametrize("mode", BOTH)
def test_a_fault_is_noticed(loaded: Leaf, fault: int, mode: str, monkeypatch) -> None:
    monkeypatch.setenv("HYPERCONV_HOST_EAGER", str(int(mode == "eager")))
    message, modes = FAULTS[fault]
    tensor = Tensor(loaded, (1, 2, 8, 64), (1, 1, 8, 64), BY_128)
    for _ in range(8):  # each time the lanes and warps go on in another order
        error = loaded.call("faulty", fault, aligned(2048, np.uint8), tensor.map)
        assert loaded.call("last_error") == error
        if not message or mode not in modes:
            assert error == 0, loaded.message(error)
        else:
            assert error == LAUNCH_FAILURE
            assert re.search(message, loaded.message(error)), loaded.message(error)


def test_threads_of_a_failed_launch_are_forgotten(loaded: Leaf) -> None:
    """Those that a smaller block has not, too: what they waited for may be where its barriers are."""
    tensor = Tensor(loaded, (1, 2, 8, 64), (1, 1, 8, 64), BY_128)
    waits_for_ever = next(i for i, row in enumerate(FAULTS) if row[0] == "barrier .*: waits for ever")
    for _ in range(4):
        assert loaded.call("faulty", waits_for_ever, aligned(2048, np.uint8), tensor.map) != 0
        loaded.call("last_error")
        read = np.full((2, 9), -1, np.int32)
        loaded.run("phases", 9, read)
        assert (read == np.arange(9)).all()


def test_every_fault_is_listed() -> None:
    names = SOURCE.read_text().split("enum class Fault {")[1].split("}")[0].split()
    assert len(names) == len(FAULTS)
