"""Loops, counts and clocks of small listings, against arithmetic by hand; the comparison with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import bounds_file, machine_code
from .machine_code import HotLoop, Instruction, demand, hot_loops, instructions, loops, resident_warps


def listing(*lines: str) -> list[Instruction]:
    """Instructions as `cuobjdump -sass` prints them, 16 bytes each, with the lines of their encoding."""
    text = "\t\tFunction : kernel\n"
    for number, line in enumerate(lines):
        code = f"/* 0x{number:016x} */"
        text += f"        /*{16 * number:04x}*/                   {line} ;   {code}\n{'':80}{code}\n"
    return instructions(text)


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
# Addresses: 0x0 - 0x20 before, 0x30 outer loop, 0x60 - 0x90 inner loop, 0xc0 its end.
NESTED = (
    "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
    "S2R R0, SR_TID.X",
    "@P0 EXIT",
    "LDG.E.128 R8, [R2.64]",  # 0x30, outer
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P1 BRA 0xb0",
    "LDSM.16.MT88.4 R8, [R20]",  # 0x60, inner
    MMA,
    "IADD3 R20, R20, 0x10, RZ",
    "@!P2 BRA 0x60",
    MMA,
    "ISETP.GE.AND P0, PT, R3, R4, PT",  # 0xb0
    "@!P0 BRA 0x30",
    "STG.E [R2.64], R4",
    "EXIT",
    "BRA 0xf0",
)


def opcodes(own: tuple[Instruction, ...]) -> list[str]:
    return [x.opcode.partition(".")[0] for x in own]


def test_a_listing_is_read() -> None:
    code = listing(*NESTED)
    assert len(code) == len(NESTED)
    assert code[9] == Instruction(0x90, "!P2", "BRA", "0x60")
    assert code[3].operands == "R8, [R2.64]"
    assert [x.target for x in code if x.target is not None] == [0xB0, 0x60, 0x30, 0xF0]
    assert [x.continues for x in code if x.opcode in ("EXIT", "BRA")] == [True] * 4 + [False] * 2


def test_loops_hold_what_is_not_nested() -> None:
    outer, inner, end = loops(listing(*NESTED))
    assert (outer.start, outer.depth) == (0x30, 1)
    assert opcodes(outer.own) == ["LDG", "BAR", "BRA", "HMMA", "ISETP", "BRA"]
    assert (inner.start, inner.depth) == (0x60, 2)
    assert opcodes(inner.own) == ["LDSM", "HMMA", "IADD3", "BRA"]
    assert opcodes(end.own) == ["BRA"]  # the trap behind the end


def test_blocks_out_of_line_belong_to_their_loop() -> None:
    """A body that continues behind the branch back, a way out in the middle, and two branches back."""
    code = listing(
        "MOV R0, RZ",
        "@P0 BRA 0x60",  # 0x10, the loop's start
        "@P1 BRA 0x90",  # out
        "@P2 BRA 0x10",
        "FADD R1, R1, R2",
        "BRA 0x10",
        "FMUL R1, R1, R2",  # 0x60: in the loop, after its last branch back
        "@P3 BRA 0x40",
        "NOP",  # 0x80: not in the loop, leads out
        "EXIT",
    )
    (loop,) = loops(code)
    assert loop.start == 0x10
    assert opcodes(loop.own) == ["BRA", "BRA", "BRA", "FADD", "BRA", "FMUL", "BRA"]


def test_a_region_with_two_ways_in_is_no_loop() -> None:
    code = listing("@P0 BRA 0x20", "FADD R0, R0, R1", "FMUL R0, R0, R1", "@P1 BRA 0x10", "EXIT")
    assert loops(code) == []


def test_a_way_out_is_not_in_the_loop() -> None:
    code = listing("@P0 BRA 0x30", "NOP", "BRA 0x50", "FADD R0, R0, R1", "@P1 BRA 0x0", "EXIT")
    assert [opcodes(loop.own) for loop in loops(code)] == [["BRA", "FADD", "BRA"]]


def test_calls_are_jumps_too() -> None:
    """What ptxas sometimes makes of a branch; a call that returns goes on behind it."""
    code = listing("FADD R0, R0, R1", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "EXIT")
    assert [opcodes(loop.own) for loop in loops(code)] == [["FADD", "CALL", "BRA"]]
    code = listing("FADD R0, R0, R1", "@P0 CALL.REL.NOINC 0x0", "EXIT")
    assert [opcodes(loop.own) for loop in loops(code)] == [["FADD", "CALL"]]


@pytest.mark.parametrize(
    ("opcode", "kind", "read"),
    [
        ("LDS", "shared", 128),
        ("LDS.U16", "shared", 128),  # a lane's bank is 4 bytes wide
        ("LDS.64", "shared", 256),
        ("LDS.128", "shared", 512),
        ("LDSM.16.M88", "shared", 128),
        ("LDSM.16.M88.2", "shared", 256),
        ("LDSM.16.MT88.4", "shared", 512),
        ("SHFL.IDX", "shared", 128),
        ("LDG.E.64.CONSTANT", "global", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128", "global", 512),
        ("LDGSTS.E.LTC128B", "global", 128),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "global", 128),
        ("UTMALDG.2D", "global", 0),
        ("ST.E.64", "generic", 256),
    ],
)
def test_widths(opcode: str, kind: str, read: int) -> None:
    """128 bytes a clock for the four sub-partitions together."""
    instruction = Instruction(0, "", opcode, "R0, [R2]")
    assert instruction.kind == kind
    for rates in machine_code.RATES.values():
        assert demand(instruction, rates) == {"issue": 1, "memory": 4 * read / 128}


@pytest.mark.parametrize(
    ("opcode", "kind", "ampere", "hopper"),
    [
        ("FFMA", "fma", {"fma": 2}, {"fma": 1}),
        ("IMAD.WIDE", "fma", {"fma": 2, "imad": 2}, {"fma": 1, "imad": 2}),
        ("HFMA2.MMA", "fma", {"fma": 1}, {"fma": 1}),
        ("LOP3.LUT", "alu", {"alu": 2}, {"alu": 2}),
        ("PLOP3.LUT", "alu", {"alu": 2}, {"alu": 2}),
        ("F2FP.BF16.F32.PACK_AB", "alu", {"alu": 2}, {"alu": 2}),
        ("MUFU.RCP", "special", {"special": 8}, {"special": 8}),
        ("I2F.RP", "convert", {"special": 8}, {"special": 8}),
        ("BAR.SYNC.DEFER_BLOCKING", "control", {}, {}),
        ("LDGDEPBAR", "control", {}, {}),
        ("UIADD3", "other", {}, {}),
        # 2,048 multiply-adds at 256 a clock and sub-partition, at 0.62 of 512 on sm_90
        ("HMMA.16816.F32", "tensor", {"tensor": 8}, {"tensor": 4 / 0.62}),
        ("HMMA.1688.F32.TF32", "tensor", {"tensor": 8}, {"tensor": 4 / 0.62}),
        ("HMMA.1688.F32.BF16", "tensor", {"tensor": 4}, {"tensor": 2 / 0.62}),
    ],
)
def test_clocks(opcode: str, kind: str, ampere: dict[str, float], hopper: dict[str, float]) -> None:
    instruction = Instruction(0, "", opcode, "R0, R1, R2")
    assert instruction.kind == kind
    assert demand(instruction, machine_code.RATES[80]) == pytest.approx({"issue": 1} | ampere)
    assert demand(instruction, machine_code.RATES[90]) == pytest.approx({"issue": 1} | hopper)


@pytest.mark.parametrize(
    ("opcode", "operands", "tensor", "memory"),
    [
        # 64 x 128 x 16 at 2,048 a clock; 128 x 16 of 2 bytes at 128 a clock
        ("HGMMA.64x128x16.F32.BF16", "R24, R88, gdesc[UR4].tnspB, R24, gsb0", 64, 32),
        ("HGMMA.64x128x16.F32", "R24, gdesc[UR4].tnspB, R24", 64, 48),  # and 64 x 16 of the left operand
        ("HGMMA.64x16x8.F32.TF32", "R24, gdesc[UR4], R24", 8, 20),
    ],
)
def test_clocks_of_a_group_of_warps(opcode: str, operands: str, tensor: int, memory: int) -> None:
    """Four warps, one in each sub-partition, share the product and what it reads."""
    found = demand(Instruction(0, "", opcode, operands), machine_code.RATES[90])
    assert found == {"issue": 1, "tensor": tensor, "memory": memory}


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(ValueError, match="QGMMA"):
        demand(Instruction(0, "", "QGMMA.64x8x32.F32", "R0"), machine_code.RATES[90])


def body(*lines: str, architecture: int = 80) -> HotLoop:
    """The one hot loop of these lines and a branch back."""
    (found,) = hot_loops(listing(*lines, "@P0 BRA 0x0", "EXIT"), architecture)
    return found


def test_the_busiest_resource_bounds_a_loop() -> None:
    loads = ["LDS.128 R8, [R20]"] * 2
    loop = body(*loads, *[MMA] * 4, "IADD3 R20, R20, 0x10, RZ")
    assert loop.counts == {"shared": 2, "tensor": 4, "alu": 1, "control": 1}
    assert loop.clocks == {"issue": 8, "memory": 32, "tensor": 32, "alu": 2}
    assert (loop.fraction, loop.issued_per_product) == (1, 2)
    assert body(*loads, "LDS R8, [R20]", *[MMA] * 4).fraction == 32 / 36
    assert body(*loads, "LDS R8, [R20]", *[MMA] * 4).binding == "memory"
    assert body(*loads, *[MMA] * 3).fraction == 24 / 32
    assert body(MMA, *["UIADD3 UR4, UR4, 0x1, URZ"] * 30).binding == "issue"
    assert body(MMA, architecture=90).fraction == pytest.approx(0.62)


def test_without_tensor_cores_the_float32_products_count() -> None:
    loop = body("FFMA R0, R1, R2, R0", "FFMA R3, R1, R2, R3", "FMUL R4, R4, R4", "IMAD R5, R5, R6, RZ")
    assert (loop.unit, loop.products, loop.clocks["fma"], loop.fraction) == ("FFMA", 2, 8, 0.5)
    assert body(MMA, "FFMA R0, R1, R2, R0").products == 1
    assert hot_loops(listing("FADD R0, R0, R1", "@P0 BRA 0x0", "EXIT"), 80) == []


def test_only_loops_that_multiply_themselves_are_hot() -> None:
    assert [loop.depth for loop in hot_loops(listing(*NESTED), 80)] == [1, 2]
    without = [line for line in NESTED if line != MMA]
    code = listing(*without[:7], MMA, *without[7:])  # the inner loop's alone
    assert [loop.depth for loop in hot_loops(code, 80)] == [2]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 8, 0, 64),
        (128, 8, 0, 16),
        (129, 8, 0, 8),  # 136 of each thread: 15 warps, one block of 8
        (136, 4, 0, 12),
        (255, 4, 0, 8),
        (24, 1, 0, 32),  # 32 blocks
        (32, 8, 53 * 1024, 24),  # 3 blocks of 54 KB in 164
        (32, 8, 53 * 1024 + 768, 16),
    ],
)
def test_resident_warps(registers: int, warps: int, shared: int, expected: int) -> None:
    assert resident_warps(80, registers, warps, shared) == expected


COMPILER = "compiler 1.0"
COMMAND = "python -m tests.cubin --update 80"


def row(*found: HotLoop, name: str = "conv_kernel<Half, 4>", spilled: int = 0, warps: int = 8) -> str:
    """A row of a table."""
    head = f"sm_80   {name}   212 regs {spilled:>4} B spilled      0 B shared {warps:>3} warps/SM"
    return "\n".join([head, *machine_code.loop_lines(found)])


LOOP = body("LDS.128 R8, [R20]", *[MMA] * 4)
BUSIER = body("LDS.128 R8, [R20]", *[MMA] * 4, "NOP")
SLOWER = body(*["LDS.128 R8, [R20]"] * 3, *[MMA] * 4)
SMALL = row(name="prepare_kernel")


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    path = tmp_path / "bounds" / "cuda_sm_80.txt"
    rows = (row(LOOP, LOOP, BUSIER), SMALL)
    text, wrong = bounds_file.settle([(x, []) for x in rows], path, COMPILER, COMMAND, update=True)
    assert (text, wrong) == ("\n".join([*rows, ""]), False)
    assert path.read_text() == f"{COMPILER}\n{rows[0]}\n"
    return path


def settle(path: Path, *rows: str, compiler: str = COMPILER) -> tuple[str, bool]:
    return bounds_file.settle([(x, []) for x in rows], path, compiler, COMMAND, update=False)


@pytest.mark.parametrize(
    "now", [row(LOOP, LOOP, BUSIER), row(LOOP, LOOP, LOOP), row(LOOP, LOOP, BUSIER, warps=16)]
)
def test_what_is_not_worse_passes(committed: Path, now: str) -> None:
    assert settle(committed, now, SMALL) == (f"{now}\n{SMALL}\n", False)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([row(LOOP, SLOWER, BUSIER)], "loop 2: 0.667 of peak, committed 1.000"),
        ([row(LOOP, BUSIER, BUSIER)], "loop 2: 1.75 issued per product, committed 1.50"),
        ([row(LOOP, BUSIER)], "2 hot loops, committed 3"),
        ([row()], "no hot loop now, or not compiled"),
        ([SMALL], "no hot loop now, or not compiled"),
        ([row(LOOP, LOOP, BUSIER, spilled=8)], "8 bytes spilled, committed 0"),
        ([row(LOOP, LOOP, BUSIER, warps=4)], "4 warps/SM, committed 8"),
        ([row(LOOP, LOOP, BUSIER), row(LOOP, name="conv_kernel<Half, 4> new")], "not in the file"),
    ],
)
def test_what_is_worse_is_marked(committed: Path, now: list[str], message: str) -> None:
    """By the kernel, both figures, and the command that commits the new ones."""
    text, wrong = settle(committed, *now)
    assert wrong
    (marked,) = [line for line in text.splitlines() if "<-" in line]
    assert "conv_kernel<Half, 4>" in marked
    assert message in marked
    assert marked.endswith(COMMAND)


def test_faults_of_a_table_stay(committed: Path) -> None:
    table = [(row(LOOP, LOOP, BUSIER), ["8 bytes of stack"])]
    text, wrong = bounds_file.settle(table, committed, COMPILER, COMMAND, update=True)
    assert wrong
    assert text.splitlines()[0].endswith("warps/SM  <- 8 bytes of stack")


def test_another_compiler_is_not_compared(committed: Path) -> None:
    text, wrong = settle(committed, row(SLOWER), compiler="compiler 2.0")
    assert not wrong
    assert text.splitlines()[-1].startswith(bounds_file.NOT_COMPARED)
    assert all(name in text for name in (COMPILER, "compiler 2.0", committed.name))


def test_a_missing_file_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cuda_sm_80"):
        settle(tmp_path / "cuda_sm_80.txt", row(LOOP))
    assert settle(tmp_path / "cuda_sm_100.txt", row()) == (f"{row()}\n", False)  # no loop, no file
