"""What the loops of a kernel demand of a GPU, from its machine code: pure functions of a listing.

The listing is what `cuobjdump -sass` prints. A loop is charged with the instructions it holds itself,
without those of the loops nested in it, in a pass where every condition in it holds. All four
sub-partitions of a multiprocessor are taken to run such warps. Each resource then needs some clocks of a
sub-partition for one pass of one warp; the longest of these times bounds the pass, and the products'
time at their unit's peak over it is the fraction of the peak in reach. Latency, bank conflicts and
misses are left out: a GPU only does worse.

Rates are lanes (multiply-adds, bytes) per clock and multiprocessor. Sources:
- CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": float32, integers, special
  functions, shuffles, conversions; two floats packed into a pair count as integer arithmetic.
- the same, compute capabilities 8.x and 9.0: 32 banks of 4 bytes a clock, of the one memory that is both
  shared memory and L1; registers, threads, blocks.
- NVIDIA A100 and H100 white papers: dense 16-bit multiply-adds, half as many in TF32.
- arXiv 2402.13499: `mma.sync` reaches about 62% of that peak on an H100, only `wgmma` all of it. `HMMA`
  on sm_90 is charged at this rate; the fraction is of the whole peak.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

SUBPARTITIONS = 4
WARP = 32


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does in a clock."""

    products: int  # dense 16-bit multiply-adds of its tensor cores
    synchronous: float  # share of them that HMMA reaches; HGMMA reaches all
    floats: int


RATES = {
    80: Rates(products=1024, synchronous=1.0, floats=64),
    90: Rates(products=2048, synchronous=0.62, floats=128),
}
INTEGERS, SPECIAL, MEMORY_BYTES = 64, 16, 128
# What a multiprocessor holds; a block can have all of its shared memory but the 1 KB set aside for each.
REGISTERS, WARPS, BLOCKS, BLOCK_SHARED = 65536, 64, 32, 1024
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

# Opcodes by kind. What is in none of them is "other": uniform registers, constants, special registers.
KINDS = {
    "tensor": r"[A-Z]G?MMA|UTC\w*MMA",
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2",
    "alu": r"IADD3?|IABS|P?LOP3|LEA|SHF|SGXT|BMSK|PRMT|MOV|SEL|VIADD|VIADDMNMX|VABSDIFF"
    r"|[FHI]SETP2?|FSEL|[FHIV]I?MNMX2?|F2FP|I2FP|P2R|R2P",
    "special": r"MUFU|POPC|FLO|BREV",
    "convert": r"F2[FI]|I2[FI]|FRND",
    "shared": r"LDSM?|STSM?|ATOMS|SHFL",
    "global": r"LDG|STG|LDGSTS|REDG?|ATOMG?|UTMA\w+|UBLKCP",
    "generic": r"LD|ST|LDL|STL",  # through pointers of unknown memory, or local
    "control": r"U?BRA|BRX|JMP|CALL|RET|EXIT|BREAK|BSSY|BSYNC|BMOV|YIELD|WARPSYNC|WARPGROUP|NOP"
    r"|BAR|B2R|(?:LDG)?DEPBAR|MEMBAR|ERRBAR|FENCE|SYNCS|CCTL|NANOSLEEP|ELECT",
}
_KIND = re.compile("|".join(f"(?P<{kind}>{opcodes})" for kind, opcodes in KINDS.items()))
RESOURCES = ("issue", "tensor", "fma", "imad", "alu", "special", "memory")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_SHAPE = re.compile(r"HMMA\.(?P<m>16)(?P<n>8)(?P<k>8|16)|HGMMA\.(?P<M>64)x(?P<N>\d+)x(?P<K>8|16)")


@dataclass(frozen=True)
class Instruction:
    """`@predicate opcode operands`, the opcode with its suffixes."""

    address: int
    predicate: str
    opcode: str
    operands: str = ""

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        found = _KIND.fullmatch(self.name)
        return str(found.lastgroup) if found else "other"

    @property
    def target(self) -> int | None:
        """Where a branch may go."""
        if self.name not in ("BRA", "UBRA", "JMP", "CALL"):
            return None
        found = re.findall(r"0x[0-9a-f]+", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def continues(self) -> bool:
        """Whether the next instruction may follow; that of a call may, when it returns."""
        leaves = self.name in ("BRA", "UBRA", "JMP", "BRX", "EXIT", "RET")
        return not leaves or self.predicate not in ("", "PT")


def instructions(listing: str) -> list[Instruction]:
    """Those of one kernel's listing."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in _LINE.findall(listing)
    ]


@dataclass(frozen=True)
class Loop:
    """A natural loop: first address, number of loops around it and itself, and what only it holds."""

    start: int
    depth: int
    own: tuple[Instruction, ...]


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """All natural loops, by address; those that share a start are one."""
    if not code:
        return []
    position = {instruction.address: i for i, instruction in enumerate(code)}
    targets = {i: position[x.target] for i, x in enumerate(code) if x.target in position}
    ends = {i for i, x in enumerate(code) if i in targets or not x.continues}
    starts = sorted({0, *targets.values(), *(i + 1 for i in ends if i + 1 < len(code))})
    blocks = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    before: dict[int, set[int]] = {start: set() for start in starts}
    for start, end in blocks.items():
        following = [targets[end - 1]] if end - 1 in targets else []
        for after in [*following, *([end] if code[end - 1].continues and end < len(code) else [])]:
            before[after].add(start)

    bodies: dict[int, set[int]] = {}
    for start, sources in before.items():
        for source in sources:
            body = _reaching(source, start, before)
            if start == 0 or 0 not in body:  # every way to `source` leads through `start`
                bodies.setdefault(start, set()).update(body)
    found = []
    for start, body in sorted(bodies.items()):
        nested = set().union(*(inner for at, inner in bodies.items() if at in body and at != start))
        own = [x for block in sorted(body - nested) for x in code[block : blocks[block]]]
        depth = sum(start in outer for outer in bodies.values())
        found.append(Loop(code[start].address, depth, tuple(own)))
    return found


def _reaching(source: int, start: int, before: dict[int, set[int]]) -> set[int]:
    """`start` and the blocks from which `source` is reached without it."""
    body, left = {start}, [source]
    while left:
        block = left.pop()
        if block not in body:
            body.add(block)
            left += before[block]
    return body


def multiply_adds(instruction: Instruction) -> int:
    """A warp's share of those of a tensor-core instruction; one in TF32 counts as two."""
    m, n, k = _shape(instruction)
    warps = 4 if instruction.name == "HGMMA" else 1
    return m * n * k // warps * (2 if ".TF32" in instruction.opcode else 1)


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    found = _SHAPE.match(instruction.opcode)
    if not found:
        raise ValueError(
            f"{instruction.opcode}: expected HMMA or HGMMA of a known shape; add its rate here"
        )
    m, n, k = (int(size) for size in found.groups() if size)
    return m, n, k


def memory_bytes(instruction: Instruction) -> int:
    """Bytes through shared memory or L1 for one warp, 4 a lane at least, were all of them different."""
    opcode, *suffixes = instruction.opcode.split(".")
    if opcode == "HGMMA":  # a group of four warps reads both operands once, or only the right one
        m, n, k = _shape(instruction)
        rows = n + m * bool(re.match(r"\w+, gdesc", instruction.operands))
        return rows * k * (4 if "TF32" in suffixes else 2) // 4
    if opcode.startswith("U"):  # a bulk copy, whose size is in a descriptor
        return 0
    if opcode in ("LDSM", "STSM"):
        return 128 * int(suffixes[-1] if suffixes[-1] in ("2", "4") else 1)
    return WARP * next((int(width) // 8 for width in ("128", "64") if width in suffixes), 4)


def demand(instruction: Instruction, rates: Rates) -> dict[str, float]:
    """Clocks of its sub-partition that each resource spends on one warp's instruction."""

    def lanes(rate: int) -> float:
        return WARP * SUBPARTITIONS / rate

    name, kind = instruction.name, instruction.kind
    clocks: dict[str, float] = {"issue": 1}
    if kind == "tensor":
        rate = rates.products * (rates.synchronous if name == "HMMA" else 1)
        clocks["tensor"] = multiply_adds(instruction) * SUBPARTITIONS / rate
    if kind == "fma":
        clocks["fma"] = lanes(128 if name.startswith("H") else rates.floats)  # H: two halves a lane
    if name == "IMAD":
        clocks["imad"] = lanes(INTEGERS)
    if kind == "alu":
        clocks["alu"] = lanes(INTEGERS)
    if kind in ("special", "convert"):
        clocks["special"] = lanes(SPECIAL)
    if kind in ("shared", "global", "generic") or name == "HGMMA":
        clocks["memory"] = memory_bytes(instruction) * SUBPARTITIONS / MEMORY_BYTES
    return clocks


@dataclass(frozen=True)
class HotLoop:
    """A loop that multiplies: its instructions by kind, and the clocks of one pass by resource.

    `unit` is what multiplies, "tensor" or "FFMA"; `products` how many such instructions; `peak` their
    clocks at the unit's best rate.
    """

    depth: int
    unit: str
    products: int
    peak: float
    counts: dict[str, int]
    clocks: dict[str, float]

    @property
    def binding(self) -> str:
        """The resource that is busy longest."""
        return max(RESOURCES, key=lambda resource: self.clocks.get(resource, 0.0))

    @property
    def fraction(self) -> float:
        """Of the unit's peak that the busiest resource leaves."""
        return self.peak / self.clocks[self.binding]

    @property
    def issued_per_product(self) -> float:
        return self.clocks["issue"] / self.products

    def __str__(self) -> str:
        clocks = " ".join(f"{name} {self.clocks.get(name, 0):.0f}" for name in RESOURCES)
        counts = " ".join(f"{kind} {self.counts.get(kind, 0)}" for kind in (*KINDS, "other"))
        return (
            f"depth {self.depth}: {self.fraction:.3f} of {self.unit} peak, by {self.binding}; "
            f"{self.issued_per_product:.2f} issued per product | clocks {clocks} | instructions {counts}"
        )


def hot_loops(code: Sequence[Instruction], architecture: int) -> list[HotLoop]:
    """The loops that themselves hold tensor-core instructions, or FFMA in a kernel that has none."""
    rates = RATES[architecture]
    unit = "tensor" if any(x.kind == "tensor" for x in code) else "FFMA"
    found = []
    for loop in loops(code):
        products = [x for x in loop.own if unit in (x.kind, x.name)]
        if products:
            found.append(_hot(loop, unit, products, rates))
    return found


def _hot(loop: Loop, unit: str, products: list[Instruction], rates: Rates) -> HotLoop:
    clocks: Counter[str] = Counter()
    for instruction in loop.own:
        clocks.update(demand(instruction, rates))
    if unit == "tensor":
        peak = sum(map(multiply_adds, products)) * SUBPARTITIONS / rates.products
    else:
        peak = sum(demand(x, rates)["fma"] for x in products)
    counts = Counter(x.kind for x in loop.own)
    return HotLoop(loop.depth, unit, len(products), peak, dict(counts), dict(clocks))


def loop_lines(found: Iterable[HotLoop]) -> list[str]:
    """Indented lines of a table, one for a run of loops of the same bounds: the details of the first."""
    groups = (list(alike) for _, alike in groupby(map(str, found), lambda text: text.partition("|")[0]))
    return [f"    {len(alike)} x {alike[0]}" for alike in groups]


def resident_warps(architecture: int, registers: int, warps: int, shared: int = 0) -> int:
    """Warps of a multiprocessor that blocks of `warps` warps and `shared` bytes can fill.

    Registers are given to a warp in units of 256, warps in fours, shared memory in units of 128 bytes.
    """
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256) // SUBPARTITIONS * SUBPARTITIONS
    by_memory = SHARED_MEMORY[architecture] // (-(-shared // 128) * 128 + BLOCK_SHARED)
    return warps * min(by_registers // warps, WARPS // warps, BLOCKS, by_memory)
