"""Where the tests run, and that no kernel gets away with an element it never wrote."""

from __future__ import annotations

import os

import torch

# Before triton is imported: without a GPU its kernels are executed by the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest

from hyperconv_ext import backends


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (floats) or a huge number (integers)."""
    new_empty = torch.Tensor.new_empty

    def poison(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        fresh = new_empty(self, *args, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 1 << 29)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def backend_algorithms() -> list[tuple[str, str]]:
    """Every (backend, algorithm) there is to test."""
    return [(name, a) for name, module in backends.BACKENDS.items() for a in module.ALGORITHMS]


def dtypes_of(backend: str, device: torch.device) -> list[torch.dtype]:
    """The dtypes a backend can be tested in on this machine."""
    if backend == "composite":
        return [torch.float64, torch.float32, torch.bfloat16]
    if device.type == "cuda":
        return [torch.float32, torch.float16, torch.bfloat16]
    return [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 wrongly
