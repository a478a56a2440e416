"""How the sums over all outputs are dealt out, within what the memory contract leaves for their slices.

The coefficient and the basis gradient are such sums. Their work is dealt to blocks in fixed shares;
each share's sum has a slice of its own in a workspace, and the slices are added up in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem


def total(partial: Tensor) -> Tensor:
    """The slices `[shares, ...]` added up, in their fixed order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def _wanted(processors: int, programs: int, work: int, alone: bool) -> int:
    """Shares that give every multiprocessor two programs, or one at most, none of them empty."""
    wanted = processors // programs if alone else -(-2 * processors // programs)
    wanted = max(1, min(work, wanted))
    return -(-work // -(-work // wanted))


def _shares(
    problem: Problem, programs: int, work: int, slices: int, alone: bool = False
) -> tuple[int, bool]:
    """(shares, whether they are summed by atomic additions).

    `programs` run for each share, each `alone` on its multiprocessor or not; `work` is what can be
    shared; `slices` of the sum may be in memory. Where these are too few to fill the machine, atomic
    additions to a single one take over, unless deterministic algorithms are demanded.
    """
    wanted = _wanted(problem.device.processors, programs, work, alone)
    if wanted <= slices:
        return wanted, False
    if problem.deterministic:
        return -(-work // -(-work // slices)), False
    return wanted, True


def coefficient_shares(
    problem: Problem, programs: int, work: int, alone: bool = False
) -> tuple[int, bool]:
    """`_shares` of the coefficient gradient: slices of C_out * C_in/groups * R numbers, less than W."""
    slices = max(1, (problem.geometry.taps - 1) // problem.rank)
    return _shares(problem, programs, work, slices, alone)


def basis_shares(
    problem: Problem, programs: int, work: int, pieces: int, alone: bool = False
) -> tuple[int, bool]:
    """`_shares` of the basis gradient: `pieces` slices of R * K numbers each, in all less than W."""
    weights = problem.out_channels * problem.in_channels // problem.geometry.groups
    slices = max(1, (weights - 1) // (problem.rank * pieces))
    return _shares(problem, programs, work, slices, alone)
