"""What a layer costs besides its kernels: how many launches, and the host's time."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d, planner
from hyperconv_ext.backends import describe, tf32_allowed
from hyperconv_ext.backends.cpu import library as cpu_library
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.problem import OPS, Device

from .conftest import FUSED, ON_GPU, needs
from .planning import H200, problem, shares_of

every_fused_backend = pytest.mark.parametrize("backend", FUSED)
# Operators of PyTorch that launch nothing.
_FREE = {
    "detach",
    "empty",
    "expand",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "t",
    "unsqueeze",
    "view",
    "alias",
}
_CALLS = ("convolve", "mlp_forward", "mlp_backward")  # of the CPU engine
# Seconds of host time beyond those of nn.Conv2d: of a forward pass, and of one with all gradients.
_HOST_LIMITS = {"no_grad": 25e-6, "grad": 27e-6, "step": 150e-6}
# What nn.Conv2d itself took on the idle CPU (an AMD EPYC) for which the limits were set: one that is
# slower, or busy with other work, is allowed as many times more.
_REFERENCE = {"no_grad": 13e-6, "grad": 14e-6, "step": 51e-6}


class _Library(TorchDispatchMode):
    """Counts the operators of PyTorch itself that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, _ = str(function).split(".")
        before = [argument for argument in args if isinstance(argument, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        same = any(result is argument for argument in before)
        if namespace == "aten" and name not in _FREE and not same:
            self.names.append(name)
        return result


def _own_launches(backend: str, work: Callable[[], object]) -> int:
    if backend == "cuda":
        count = ctypes.CDLL(os.environ["HYPERCONV_CUDA_LIBRARY"]).hyperconv_host_launches
        count.restype = ctypes.c_uint64
        before = count()
        work()
        return count() - before
    if backend == "cpu":
        with ExitStack() as stack:
            functions = {name: getattr(cpu_library, name) for name in _CALLS}
            patches = [mock.patch.object(cpu_library, n, wraps=f) for n, f in functions.items()]
            calls = [stack.enter_context(patch) for patch in patches]
            work()
        return sum(call.call_count for call in calls)
    from hyperconv_ext.backends.triton import launch

    with mock.patch.object(launch, "launch", side_effect=launch.launch) as launched:
        work()
    return launched.call_count


def launches(backend: str, work: Callable[[], object]) -> tuple[int, list[str]]:
    """(launches of the backend's kernels, PyTorch's operators that launch); on a GPU all in one list.

    Of the CPU engine, its calls.
    """
    work()  # what happens once is not counted
    if torch.cuda.is_available() and backend != "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return 0, [event.name for event in profile.events() if event.device_type == on_device]
    with _Library() as log:
        work()
    return _own_launches(backend, work), log.names


@every_fused_backend
@pytest.mark.parametrize("kind", [HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d])
def test_a_forward_pass_is_two_launches(kind, backend: str, device) -> None:
    layer = kind(3, 4, 3, backend=backend, device=device)
    input = torch.randn(2, 3, *(5, 4, 6)[: layer.dims], device=device)
    own, names = launches(backend, lambda: layer(input))
    assert own + len(names) == 2, names


def _sums(backend: str, device: Device) -> list[str]:
    """What PyTorch launches for the gradients of A and phi of the layer below.

    Several shares of the work need a sum, or memory of zeros if they are added atomically.
    """
    found = []
    for op in OPS[2:]:
        changes = {"batch": 2, "dtype": "float32", "tf32": tf32_allowed(), "device": device}
        step = problem(channels=16, size=9, kernel=5, op=op, **changes)
        shares, atomic = shares_of(planner.plan(step, backend))
        found += ["zeros"] if atomic else ["sum"] if shares > 1 else []
    return found


@pytest.mark.parametrize("backend", ON_GPU)
def test_shares_on_an_h200(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 132 multiprocessors A's gradient is added atomically, phi's in a workspace: 12 launches."""
    monkeypatch.setattr(library, "reason", lambda: "")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: False)
    monkeypatch.setattr(library, "architectures", lambda: ("90",))
    planner.plan.cache_clear()
    assert _sums(backend, H200) == ["zeros", "sum"]
    planner.plan.cache_clear()


def _step(layer: torch.nn.Module, device: torch.device) -> Callable[[], object]:
    """A training step of a layer with 16 channels."""
    input = torch.randn(2, 16, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    input.requires_grad_()
    grad = torch.randn_like(input)
    leaves = (input, *layer.parameters())
    return lambda: torch.autograd.grad(layer(input), leaves, grad)


def test_calls_of_a_training_step_on_a_cpu() -> None:
    """Forward 2, the three gradients together 1, the MLP's 1; a sum for the bias's."""
    if reason := cpu_library.reason():
        pytest.skip(reason)
    layer = HyperConv2d(16, 16, 5, padding=2, backend="cpu")
    assert launches("cpu", _step(layer, torch.device("cpu"))) == (4, ["sum"])


@pytest.mark.parametrize("backend", ON_GPU)
def test_launches_of_a_training_step(backend: str, device) -> None:
    """Forward 2; two for each of three gradients, one for the MLP's; a sum for the bias's; `_sums`."""
    layer = HyperConv2d(16, 16, 5, padding=2, backend=backend, device=device)
    own, names = launches(backend, _step(layer, device))
    if torch.cuda.is_available():
        assert len(names) == 2 + 3 * 2 + 1 + 1 + len(_sums(backend, describe(device))), names
    else:  # where what an operator calls itself is not seen
        assert (own, names) == (2 + 3 * 2 + 1, ["sum"])


def _host_seconds(works: list[Callable[[], object]]) -> list[float]:
    """The least time until a call returns, of each work, in turns so that all meet the same machine.

    Rounds are shorter than the time that a busy machine gives another process in between.
    """
    best = [float("inf")] * len(works)
    for _ in range(500):
        for number, work in enumerate(works):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(4):
                work()
            best[number] = min(best[number], (time.perf_counter() - start) / 4)
    return best


@needs("cuda")
@pytest.mark.alone
@pytest.mark.parametrize("phase", _HOST_LIMITS)
def test_host_time(phase: str, device) -> None:
    """Where the host executes the kernels they are only counted: all else is what a GPU's host does."""
    sizes = (16, 16, 3)
    input = torch.randn(1, 16, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    input.requires_grad_(phase != "no_grad")
    layers = (
        torch.nn.Conv2d(*sizes, padding=1, device=device),
        HyperConv2d(*sizes, padding=1, backend="cuda", device=device),
    )
    grad = torch.randn_like(input)

    def work(layer: torch.nn.Module) -> Callable[[], object]:
        leaves = (input, *layer.parameters())
        if phase == "step":
            return lambda: torch.autograd.grad(layer(input), leaves, grad)
        return lambda: layer(input)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, {"HYPERCONV_HOST_EXECUTE": "0"}),
            torch.set_grad_enabled(phase != "no_grad"),
        ):
            for _ in range(3):  # what else the machine does only adds
                dense, own = _host_seconds([work(layer) for layer in layers])
                slower = 1.0 if device.type == "cuda" else max(1.0, dense / _REFERENCE[phase])
                if own - dense < slower * _HOST_LIMITS[phase]:
                    break
    finally:
        torch.set_num_threads(threads)
    measured = f"{own * 1e6:.1f} us, nn.Conv2d {dense * 1e6:.1f} us"
    print(f"{phase}: {measured}")
    assert own - dense < slower * _HOST_LIMITS[phase], measured


@needs("cuda")
def test_the_host_executes_unless_told_not_to(device) -> None:
    if device.type == "cuda":
        pytest.skip("the kernels run on the GPU")
    layer = HyperConv2d(3, 4, 3, backend="cuda", padding=1)
    with torch.no_grad():
        layer.bias.fill_(7)
        layer.coefficients.zero_()
        assert (layer(torch.randn(1, 3, 5, 5)) == 7).all()
        with mock.patch.dict(os.environ, {"HYPERCONV_HOST_EXECUTE": "0"}):
            own = _own_launches("cuda", lambda: layer(torch.randn(1, 3, 5, 5)))
    assert own == 2
