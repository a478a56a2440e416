"""The CPU engine's operators by name of the algorithm, each by itself or several gradients at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperconv_ext import ops, planner
from hyperconv_ext.backends import cpu
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Plan, Wanted

ALGORITHMS = cpu.ALGORITHMS
ALL = (True, True, True)


@dataclass(frozen=True)
class Layer:
    """A convolution of any number of axes with all its operands."""

    geometry: Geometry
    grad: Tensor
    input: Tensor
    coefficients: Tensor
    basis: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        tensors = (self.grad, self.input, self.coefficients, self.basis)
        return Layer(self.geometry, *(tensor.to(dtype) for tensor in tensors))

    def operands(self, slot: int) -> tuple[Tensor, ...]:
        """What operator `OPS[slot]` takes."""
        full = (self.grad, self.input, self.coefficients, self.basis)
        return tuple(tensor for other, tensor in enumerate(full) if other != slot)

    def operator(self, slot: int, algorithm: str, backend: str = "cpu") -> Tensor:
        """y, or the gradient of x, A or phi, by `slot`."""
        return ops.form(slot, self.geometry, backend, algorithm, None, *self.operands(slot))

    def plan(self, slot: int, algorithm: str) -> Plan:
        """Of operator `OPS[slot]`."""
        return planner.plan(ops.problem_of(slot, self.operands(slot), self.geometry), "cpu", algorithm)

    def joint_plan(self, algorithm: str, wanted: Wanted = ALL) -> Plan:
        """Of several gradients by one call, whether or not the estimates are for it."""
        assert not self.geometry.trimmed
        problem = replace(ops.problem_of(1, self.operands(1), self.geometry), wanted=wanted)
        chosen = ALGORITHMS if algorithm == "auto" else (algorithm,)
        plans = [Plan(problem, "cpu", name, *cpu.configure(problem, name)) for name in chosen]
        return min(plans, key=lambda plan: plan.seconds)

    def joint(self, algorithm: str, wanted: Wanted = ALL) -> list[Tensor | None]:
        """Several gradients by one call."""
        operands = (self.grad, self.input, self.coefficients, self.basis)
        return list(cpu.basis_conv_bwd(self.joint_plan(algorithm, wanted), *operands, wanted))

    def results(self, algorithm: str) -> list[Tensor]:
        """y, its gradients one by one and together; of what the algorithm takes."""
        found = [
            self.operator(slot, algorithm)
            for slot in range(4)
            if cpu.can_run(ops.problem_of(slot, self.operands(slot), self.geometry), algorithm)[0]
        ]
        return [*found, *self.joint(algorithm)]


def layer(
    batch: int,
    channels: tuple[int, int],
    rank: int,
    size: Sequence[int],
    kernel: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Layer:
    """Random operands; `arguments`: stride, padding, dilation, groups, integers for all axes."""
    dims, groups = len(size), arguments.get("groups", 1)
    stride, dilation = ((arguments.get(name, 1),) * dims for name in ("stride", "dilation"))
    padding = (arguments.get("padding", 0),) * dims
    geometry = Geometry.conv(tuple(size), tuple(kernel), stride, padding, dilation, groups)
    shapes = (
        (batch, channels[1], *geometry.output_size),
        (batch, channels[0], *size),
        (channels[1], channels[0] // groups, rank),
        (rank, *kernel),
    )
    return Layer(geometry, *(torch.randn(shape).to(dtype) for shape in shapes))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's, and so the engine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
