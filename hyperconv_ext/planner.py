"""Which backend, algorithm and tile compute a problem: pure functions of numbers."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from .backends import BACKENDS
from .problem import JOINT, Device, Plan, Problem, WeightShape

BACKEND_NAMES = ("auto", "reference", *BACKENDS)
ALGORITHM_NAMES = ("auto", *dict.fromkeys(a for b in BACKENDS.values() for a in b.ALGORITHMS))
_VARIABLE = "HYPERCONV_BACKEND"


class PlanError(RuntimeError):
    """An explicitly named backend or algorithm cannot compute this problem."""


def requested(backend: str) -> str:
    """`backend`, or what the environment variable HYPERCONV_BACKEND puts in the place of `'auto'`.

    Raises:
        ValueError: the variable names no backend.
    """
    if backend != "auto":
        return backend
    name = os.environ.get(_VARIABLE, "auto")
    if name not in BACKEND_NAMES:
        raise ValueError(
            f"{_VARIABLE}: expected one of {', '.join(BACKEND_NAMES)}, got {name!r}; "
            f"set it to one of these or unset it"
        )
    return name


def _has_engine(device_kind: str) -> bool:
    """Whether the backend named like the kind of device, if there is one, runs."""
    return device_kind in BACKENDS and BACKENDS[device_kind].joins_on(Device(device_kind))


# Dynamo is to ask, not to follow how a library is loaded; as `torch.compiler.assume_constant_result`
# marks it, which takes seconds of imports.
_has_engine._dynamo_marked_constant = True  # type: ignore[attr-defined]


def prefers_dense(device_kind: str, weight: WeightShape) -> bool:
    """Whether `'auto'` builds W for the library convolution: off the GPU, for small kernels.

    Where a backend of the device says what it outruns (`outruns_dense`), that decides. Else composite is
    the alternative: per input channel and position the dense convolution takes K * C_out multiply-adds
    and the composite R * (K + C_out), each of which costs it more, since z travels through memory.
    Measured on one x86 core (forward and training step, 16 to 128 channels, k = 3 to 31) the composite
    won both ways from a ratio of about 7 on, or with more than 400 taps. On 22 other shapes in one to
    three dimensions this picked the faster way, or one within 10% of it, in 38 of 44 rows.
    """
    if device_kind == "cuda":
        return False
    if _has_engine(device_kind):
        return not BACKENDS[device_kind].outruns_dense(weight)
    taps, outputs, rank = weight.taps, weight.outputs, weight.rank
    return taps <= 400 and taps * outputs < 7 * rank * (taps + outputs)


def resolve(backend: str, algorithm: str, device_kind: str, weight: WeightShape) -> str:
    """As `requested`, and `'reference'` where `'auto'` builds W for the library convolution."""
    name = requested(backend)
    dense = name == algorithm == "auto" and prefers_dense(device_kind, weight)
    return "reference" if dense else name


def check_reference(algorithm: str) -> None:
    """Raise PlanError unless the algorithm is left to the reference, which has but one."""
    if algorithm != "auto":
        raise PlanError(
            f"algorithm={algorithm!r} is not one of backend='reference', which builds W and calls "
            f"the library convolution; name another backend, or leave the algorithm 'auto'"
        )


def candidates(problem: Problem, backend: str, algorithm: str) -> list[tuple[str, str, str]]:
    """Every (backend, algorithm, reason it cannot run or '') that the two names admit.

    Of a joint problem only backends that compute gradients together.
    """
    rows = []
    for name, module in BACKENDS.items():
        if backend not in ("auto", name) or (problem.wanted and not hasattr(module, JOINT)):
            continue
        for choice in module.ALGORITHMS:
            if algorithm in ("auto", choice):
                ok, reason = module.can_run(problem, choice)
                rows.append((name, choice, "" if ok else reason))
    return rows


def _cheapest(problem: Problem, rows: list[tuple[str, str, str]]) -> Plan | None:
    """Of those `candidates` that can run, by their own estimates; None if none can."""
    plans = [
        Plan(problem, name, choice, *BACKENDS[name].configure(problem, choice))
        for name, choice, reason in rows
        if not reason
    ]
    return min(plans, key=lambda p: p.seconds) if plans else None


@lru_cache(maxsize=4096)
def plan(problem: Problem, backend: str = "auto", algorithm: str = "auto") -> Plan:
    """The cheapest runnable candidate by the backends' own cost models.

    A backend or algorithm that is named is used or refused, never replaced.

    Raises:
        PlanError: no admitted candidate can run; the message gives each one's reason.
    """
    rows = candidates(problem, backend, algorithm)
    found = _cheapest(problem, rows)
    if found is not None:
        return found
    if not rows:
        known = ", ".join(f"{name}: {'/'.join(BACKENDS[name].ALGORITHMS)}" for name in BACKENDS)
        raise PlanError(
            f"algorithm={algorithm!r} is not one of backend={backend!r} ({known}); "
            f"name another, or leave it 'auto'"
        )
    reasons = "; ".join(f"{name}/{choice}: {reason}" for name, choice, reason in rows)
    raise PlanError(
        f"{problem.op} cannot run with backend={backend!r}, algorithm={algorithm!r} ({reasons}); "
        f"use backend='auto', 'composite' or 'reference'"
    )


@lru_cache(maxsize=4096)
def joint(problem: Problem, backend: str = "auto", algorithm: str = "auto") -> Plan | None:
    """The plan of a joint problem; None where operators of their own are no dearer by the estimates.

    Raises:
        PlanError: those operators cannot run (see `plan`): what is named is used or refused here, too.
    """
    found = _cheapest(problem, candidates(problem, backend, algorithm))
    if found is None:
        return None
    alone = [replace(problem, op=op, wanted=None) for op in problem.ops]
    apart = sum(plan(each, backend, algorithm).seconds for each in alone)
    return found if found.seconds < apart else None


def joins_on(device: Device, backend: str) -> bool:
    """Whether an admitted backend computes gradients together on this device, for some problem at least.

    A graph is recorded by this, since its sizes may be unknown: with `basis_conv_bwd`, which plans when
    it is run, or else with the operator of each gradient.
    """
    admitted = BACKENDS.values() if backend == "auto" else (BACKENDS[backend],)
    return any(hasattr(module, JOINT) and module.joins_on(device) for module in admitted)


def mlp_backend(widths: tuple[int, ...], dtype: str, device: Device, backend: str) -> tuple[str, str]:
    """(the backend whose kernel evaluates a coordinate MLP, why none does): one of them is ''."""
    engines = {name: module for name, module in BACKENDS.items() if hasattr(module, "can_evaluate")}
    if backend == "auto":  # where a CPU executes the GPU's kernels, that is for tests
        on_gpu = device.kind == "cuda"
        engines = {name: module for name, module in engines.items() if (name != "cpu") == on_gpu}
    elif backend not in engines:
        return "", f"backend={backend!r} evaluates it by PyTorch"
    else:
        engines = {backend: engines[backend]}
    reasons = []
    for name, module in engines.items():
        ok, reason = module.can_evaluate(widths, dtype, device)
        if ok:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return "", "; ".join(reasons)
