"""What runs here, and what the planner would do: for people, not for programs."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch
from torch import Tensor

from . import backends, ops, planner
from ._version import __version__
from .backends.cpu import library as cpu_library
from .geometry import Geometry
from .modules import HyperConvNd
from .ops.mlp import widths_of
from .problem import JOINT, OPS, Plan, Problem


def explain(conv: HyperConvNd, input: Tensor) -> str:
    """Which backend, algorithm and tile each operator of `conv` on `input` gets, and why.

    Args:
        conv: the layer.
        input: x, `[B, C_in, *S]` or `[C_in, *S]`; only its shape, dtype, strides and device count.
            Of a layer in evaluation (`conv.eval()`) what is described is a call without gradients.

    Returns:
        Text: how the hyper-network is evaluated; then for the forward operator and each gradient the
        plan and, for every other candidate, why not: the reason it cannot run, or its estimated time.

    Raises:
        TypeError, ValueError: the layer does not take this input.
        PlanError: the layer's backend cannot compute it.
    """
    name = planner.requested(conv.backend)
    lines = [f"{type(conv).__name__}({conv.extra_repr()})"]
    lines.append(f"input {list(input.shape)}, {input.dtype}, {input.device}, backend={name!r}")
    lines.append(f"hyper-network: {_hypernet_line(conv, name)}")
    with torch.set_grad_enabled(conv.training):
        kept = conv.keeps_kernel()
    builds = "keeps the weight between calls" if kept else "builds the weight"
    if name == "reference":
        return "\n".join([*lines, f"reference: {builds} and calls the library convolution"])
    with torch.no_grad():
        coefficients, basis = conv.kernel()
        batched, geometry = conv.geometry(input)
    operands = (batched, coefficients, geometry)
    with torch.set_grad_enabled(conv.training):
        chosen = ops.resolve(*operands, name, conv.algorithm, conv.transposed, kept)
    if chosen == "reference":
        rank = coefficients.shape[2]
        cheaper = f"cheaper at {geometry.taps} taps of rank {rank} on {input.device.type}"
        return "\n".join([*lines, f"reference: {builds}, {cheaper}"])
    forward = ops.problem_of(int(conv.transposed), (batched, coefficients, basis), geometry)
    for op in OPS:
        lines += _operator_lines(replace(forward, op=op), name, conv.algorithm)
    through_input = OPS[int(not conv.transposed)]
    every = replace(forward, op=through_input, wanted=(True, True, True))
    together = planner.joint(every, name, conv.algorithm)
    if together is not None:
        lines.append(f"{JOINT}, all gradients together: {_planned(together)}")
    return "\n".join(lines)


def _hypernet_line(conv: HyperConvNd, backend: str) -> str:
    mlp = conv._mlp()
    if mlp is None:
        return f"{type(conv.hypernet).__name__}, run by PyTorch as the module it is"
    device = backends.describe(conv.taps.device)
    dtype = backends.dtype_name(conv.coefficients.dtype)
    widths = widths_of(mlp.weights)
    engine, reason = planner.mlp_backend(widths, dtype, device, backend)
    if not engine:
        return f"PyTorch ({reason})"
    if engine == "cpu":
        return "one call of cpu"
    if conv.weight_norm is not None or dtype == "float16":  # needs phi before the convolution
        return f"one fused kernel of {engine}"
    return f"fused into the first of the forward operator's two launches by {engine}"


def _operator_lines(problem: Problem, backend: str, algorithm: str) -> list[str]:
    plan = planner.plan(problem, backend, algorithm)
    lines = [f"{problem.op}: {_planned(plan)}"]
    for name, choice, reason in planner.candidates(problem, backend, algorithm):
        if (name, choice) == (plan.backend, plan.algorithm):
            continue
        why = reason
        if not reason:
            _, seconds = backends.BACKENDS[name].configure(problem, choice)
            why = f"not cheaper{_estimate(seconds)}"
        lines.append(f"    not {name}/{choice}: {why}")
    return lines


def _planned(plan: Plan) -> str:
    tile = "" if plan.tile is None else f", tile {plan.tile.name}"
    return f"{plan.backend}/{plan.algorithm}{tile}{_estimate(plan.seconds)}"


def _estimate(seconds: float) -> str:
    return f", estimated {seconds * 1e6:.1f} us" if seconds < 1 else ""


def environment() -> str:
    """Versions, devices, and for each backend and device whether it runs and if not why."""
    lines = [
        f"hyperconv_ext {__version__}",
        f"python        {platform.python_version()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton        {backends.BACKENDS['triton'].installed() or 'not installed'}",
        f"cpu library   {cpu_library.describe()}",
        f"cuda library  {backends.BACKENDS['cuda'].library.describe()}",
    ]
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        label = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        lines.append(f"{device} ({label})")
        lines.append("    reference: yes")
        for name, module in backends.BACKENDS.items():
            ok, reason = module.can_run(_sample(device), module.ALGORITHMS[0])
            lines.append(f"    {name}: {'yes' if ok else f'no, {reason}'}")
    return "\n".join(lines)


def _sample(device: torch.device) -> Problem:
    """A convolution that every backend takes where it runs at all."""
    geometry = Geometry.conv((16, 16), (5, 5), (1, 1), (2, 2), (1, 1), 1)
    return Problem(OPS[0], geometry, 1, 16, 16, 5, "float32", backends.describe(device))
