"""The committed bounds of the kernels that multiply: `bounds/{engine}_sm_{architecture}.txt`.

A file is the compiler's name and the rows that `tests.cubin` or `tests.aot` print for the kernels with a
hot loop. Rows are matched by their name, loops by their order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "bounds"
NOT_COMPARED = "bounds not compared"
_ROW = re.compile(
    r"sm_\S+ +(?P<name>\S.*?) +\d+ regs .*?(?P<spilled>\d+) B spilled .*?(?P<warps>\d+) warps/SM"
)
_LOOP = re.compile(
    r" +(?P<times>\d+) x depth .*?(?P<fraction>[\d.]+) of \w+ peak"
    r".*?(?P<issued>[\d.]+) issued per product"
)


@dataclass(frozen=True)
class Bounds:
    """Of a kernel: bytes spilled, resident warps, loops as (fraction of peak, issued per product)."""

    spilled: int
    warps: int
    loops: tuple[tuple[float, float], ...]


def read(rows: list[str]) -> dict[str, Bounds]:
    """The rows with hot loops, by name."""
    found = {}
    for row in rows:
        head, *lines = row.split("\n")
        match = _ROW.match(head)
        loops = [loop for line in lines if (loop := _LOOP.match(line))]
        if match and loops:
            each = [
                (float(x["fraction"]), float(x["issued"])) for x in loops for _ in range(int(x["times"]))
            ]
            name = " ".join(match["name"].split())
            found[name] = Bounds(int(match["spilled"]), int(match["warps"]), tuple(each))
    return found


def worse(committed: Bounds | None, now: Bounds | None) -> list[str]:
    """How a kernel is worse than what is committed of it."""
    if committed is None or now is None:
        return ["not in the file"] if now else ["no hot loop now, or not compiled"]
    found = []
    if now.spilled > committed.spilled:
        found.append(f"{now.spilled} bytes spilled, committed {committed.spilled}")
    if now.warps < committed.warps:
        found.append(f"{now.warps} warps/SM, committed {committed.warps}")
    if len(now.loops) != len(committed.loops):
        return [*found, f"{len(now.loops)} hot loops, committed {len(committed.loops)}"]
    for number, (old, new) in enumerate(zip(committed.loops, now.loops, strict=True), 1):
        if new[0] < old[0]:
            found.append(f"loop {number}: {new[0]:.3f} of peak, committed {old[0]:.3f}")
        if new[1] > old[1]:
            found.append(f"loop {number}: {new[1]:.2f} issued per product, committed {old[1]:.2f}")
    return found


def compare(
    path: Path, compiler: str, rows: list[str], sample: bool = False
) -> tuple[dict[str, list[str]], str]:
    """({name: how it is worse than the file}, '') or ({}, why they cannot be compared).

    The rows are those of every kernel, or a `sample`.
    """
    first, *lines = path.read_text().splitlines()
    if first != compiler:
        return {}, f"{NOT_COMPARED}: {path.name} is by {first}, this is {compiler}"
    committed, now = read(re.split(r"\n(?=sm_)", "\n".join(lines))), read(rows)
    names = now if sample else committed | now
    compared = {name: worse(committed.get(name), now.get(name)) for name in names}
    return {name: found for name, found in compared.items() if found}, ""


def settle(
    table: list[tuple[str, list[str]]],
    path: Path,
    compiler: str,
    command: str,
    update: bool,
    sample: bool = False,
) -> tuple[str, bool]:
    """The table as text, its (row, faults) marked, and whether any row is.

    Faults are also what is worse than in the file, unless `update` writes it anew, as `command` does. A
    table without hot loops, of an architecture whose rates are unknown, has no file.
    """
    rows = [row for row, _ in table]
    found: dict[str, list[str]] = {}
    reason = ""
    if read(rows) and update:
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([compiler, *(row for row in rows if read([row])), ""]))
    elif read(rows) or path.exists():
        found, reason = compare(path, compiler, rows, sample)
    marks = {name: [*against, f"if this is intended: {command}"] for name, against in found.items()}
    marked = [
        (row, faults + [x for name in read([row]) for x in marks.pop(name, [])]) for row, faults in table
    ]
    marked += marks.items()
    lines = []
    for row, faults in marked:
        head, *loops = row.split("\n")
        lines += ["  <- ".join([head, *faults]), *loops]
    return "\n".join([*lines, *filter(None, [reason]), ""]), any(faults for _, faults in marked)
