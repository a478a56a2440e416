"""The package imports anywhere, and says what is missing and what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from hyperconv_ext import HyperConv2d, explain, planner
from hyperconv_ext.backends import triton as engine
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.problem import Device

from .conftest import ON_GPU, needs

# The library is looked for where there is none, whatever was built here.
_NOT_BUILT = """
import pathlib
from hyperconv_ext.backends.cuda import library
library._BUILT = pathlib.Path("/nowhere/_cuda.abi3.so")
"""
_HIDE_TRITON = """
import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
"""
_USE = """
import torch, hyperconv_ext
conv = hyperconv_ext.HyperConv2d(3, 4, 5)
conv(torch.randn(1, 3, 8, 8)).sum().backward()
for conv.backend in ("triton", "cuda"):
    try:
        conv(torch.randn(1, 3, 8, 8))
    except hyperconv_ext.PlanError as error:
        print(error)
"""
_ENVIRONMENT = """
from hyperconv_ext.report import environment
print(environment())
"""
# Without a GPU, and with no library named.
_BARE = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "HYPERCONV_CUDA_LIBRARY": ""}


def _python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_triton_cuda_library_and_gpu() -> None:
    output = _python("-c", _HIDE_TRITON + _NOT_BUILT + _USE, **_BARE)
    assert "triton is not installed; pip install triton" in output
    assert "(cuda/basis: the CUDA extension is not built; with nvcc on the PATH: pip install" in output


def test_importing_starts_nothing() -> None:
    """Neither triton, matplotlib nor CUDA, nor the CUDA library, which is there to be loaded."""
    code = (
        "import sys, torch; torch.ops.load_library = lambda path: sys.exit(f'{path} was loaded'); "
        "import hyperconv_ext; "
        "print(*(name in sys.modules for name in ('triton', 'matplotlib')), torch.cuda.is_initialized())"
    )
    environment = _BARE | {"HYPERCONV_CUDA_LIBRARY": sys.executable}
    assert _python("-c", code, **environment).split() == ["False"] * 3


def test_environment_report() -> None:
    output = _python("-c", _NOT_BUILT + _ENVIRONMENT, **_BARE)
    assert "reference: yes" in output and "composite: yes" in output
    assert "triton: no, the tensors are on cpu; move them to a CUDA device" in output
    assert "cuda library  the CUDA extension is not built; with nvcc" in output
    assert "cuda: no, the CUDA extension is not built; with nvcc" in output
    assert torch.__version__ in output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "HYPERCONV_CUDA_LIBRARY={} does not exist; correct it or unset it"),
        ("no library", "the CUDA extension kernels.so cannot be loaded: "),
    ],
)
def test_the_program_says_why_there_is_no_library(
    content: str | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "kernels.so"
    if content is not None:
        file.write_text(content)
    output = _python("-m", "hyperconv_ext", **_BARE | {"HYPERCONV_CUDA_LIBRARY": str(file)})
    assert output.count(reason.format(file)) == 2 and "composite: yes" in output


@pytest.mark.skipif(
    bool(library.reason()) or not library.executes_on_cpu(), reason="needs the library for the CPU"
)
def test_environment_report_of_the_library_for_the_cpu() -> None:
    named = {"HYPERCONV_CUDA_LIBRARY": os.environ["HYPERCONV_CUDA_LIBRARY"]}
    output = _python("-m", "hyperconv_ext", **_BARE | named)
    assert "cuda library  executes the kernels on the CPU" in output and "cuda: yes" in output


def _explain(backend: str, device: torch.device) -> str:
    conv = HyperConv2d(16, 32, 7, padding=3, backend=backend, device=device)
    return explain(conv, torch.randn(2, 16, 14, 14, device=device))


@pytest.mark.parametrize("backend", ON_GPU)
def test_explain_names_the_choice_and_the_reasons(backend: str, device) -> None:
    basis, coefficients = {
        "cuda": ("basis_conv", "coefficient_gradient"),
        "triton": ("basis", "coefficients"),
    }[backend]
    text = _explain(backend, device)
    assert text.count(f"{backend}/basis, tile {basis}-") == 2  # forward and input gradient
    assert f"tile {coefficients}-" in text and "tile basis_gradient-" in text
    assert (
        f"hyper-network: fused into the first of the forward operator's two launches by {backend}"
        in text
    )
    assert ("not triton/direct" in text) == (backend == "triton")
    assert "basis_conv_fwd: composite/composite" in _explain("composite", device)


@needs("cuda")
def test_explain_says_why_pytorch_evaluates_the_mlp(device) -> None:
    deep = HyperConv2d(16, 16, 3, hidden_features=(8,) * 7, backend="cuda", device=device)
    text = explain(deep, torch.randn(1, 16, 8, 8, device=device))
    assert "hyper-network: PyTorch (cuda: its MLP kernels take up to 8 layers, not 9)" in text


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.3.5", ""),
        ("3.6.0", "2.4.0", r"Triton 3.6.0 does not work with NumPy 2.4.0; pip install \"numpy<2.4\""),
        ("3.7.0", "2.5.5", ""),
        ("3.10.0+git1", "3.0", ""),
        ("unknown", "2.5.5", ""),
        ("3.9.0", None, "needs NumPy; pip install numpy"),
    ],
)
def test_the_interpreter_says_if_numpy_is_too_new(
    triton: str, numpy: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        assert name == "numpy"
        if numpy is None:
            raise PackageNotFoundError
        return numpy

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(engine, "installed", lambda: triton)
    monkeypatch.setattr(engine, "version", version)
    engine._interpreter_reason.cache_clear()
    can, why = engine.can_evaluate((1,), "float32", Device("cpu"))
    engine._interpreter_reason.cache_clear()
    assert can == (not reason) and re.search(reason, why) and bool(why) == bool(reason)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "reason", lambda: "the CUDA extension is not built")
    planner.plan.cache_clear()
    yield
    planner.plan.cache_clear()


def test_explain_off_the_gpu(not_built) -> None:
    small = HyperConv2d(3, 4, 3)
    assert "reference: builds the weight, cheaper" in explain(small, torch.randn(1, 3, 512, 512))
    large = HyperConv2d(64, 64, 31, padding=15)
    text = explain(large, torch.randn(1, 64, 32, 32, dtype=torch.float32))
    assert re.search("basis_conv_fwd: (cpu/fft|composite/composite)", text)
    assert re.search("hyper-network: (one call of cpu|PyTorch .cpu: )", text)
    assert text.count("not cuda/basis: the CUDA extension is not built") == 4
