"""The engines, and the machine they run on.

A backend is a module with `ALGORITHMS`, `can_run(problem, algorithm) -> (ok, reason)`,
`configure(problem, algorithm) -> (tile or None, estimated seconds)`, `flops(plan)`, and one function
per operator in `problem.OPS`. `flops` counts two for each multiply-add that the plan executes, those
with the zeros of banded products and of channels rounded up among them, and those that build W on chip.
One with `can_evaluate(widths, dtype, device) -> (ok, reason)` also evaluates the coordinate MLP:
`coordinate_mlp_fwd`, `coordinate_mlp_bwd`, and `hyper_conv_fwd`, the forward operator or the input
gradient whose basis is an MLP's.

One with `basis_conv_bwd(plan, grad, input, coefficients, basis, wanted)` also computes several gradients
of a layer together, sharing what they have in common. `grad` is that of the layer's output, `input` the
layer's; `wanted` has at least two. It returns the gradients of (input, coefficients, basis), None for
what is not wanted: the first is what the operator `plan.problem.op` gives for (grad, coefficients,
basis), and dtypes and layouts are those of the operators of each. `can_run`, `configure` and `flops` are
then also asked about problems with `wanted`, and `joins_on(device) -> bool` whether there is any such
problem there that it takes.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from ..problem import Device
from . import composite, cpu, cuda
from . import triton as triton_backend

# In order of preference where estimates are equal or there are none, as for the coordinate MLP. A launch
# through PyTorch's dispatcher does less on the host than one through Triton's. `reference`, the oracle,
# is no backend of planned operators: it is plain PyTorch, differentiated by autograd itself.
BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": triton_backend,
    "cpu": cpu,
    "composite": composite,
}

_CONVOLUTIONS = torch.backends.cudnn.conv  # type: ignore[attr-defined]


def tf32_allowed() -> bool:
    """Whether the framework lets float32 convolutions use TF32.

    `cudnn.conv.fp32_precision` follows the older switch `cudnn.allow_tf32` too, which itself cannot be
    read where convolutions and RNNs differ.
    """
    return _CONVOLUTIONS.fp32_precision == "tf32"


@lru_cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as `Problem` has it: `'bfloat16'`."""
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device) -> Device:
    """The facts about `device` that planning needs."""
    if device.type != "cuda":
        return _describe_other(device.type)
    return _describe_cuda(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _describe_other(kind: str) -> Device:
    return Device(kind)


@lru_cache
def _describe_cuda(index: int) -> Device:
    if not torch.cuda.is_available():  # fake tensors need no GPU
        return Device("cuda")
    properties = torch.cuda.get_device_properties(index)
    return Device(
        kind="cuda",
        capability=properties.major * 10 + properties.minor,
        processors=properties.multi_processor_count,
    )
