"""The package imports anywhere, and says what is missing and what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from hyperconv_ext import HyperConv2d, explain

_NO_TRITON = """
import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
import torch, hyperconv_ext
conv = hyperconv_ext.HyperConv2d(3, 4, 5)
conv(torch.randn(1, 3, 8, 8)).sum().backward()
try:
    conv.backend = "triton"
    conv(torch.randn(1, 3, 8, 8))
except hyperconv_ext.PlanError as error:
    print(error)
"""


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


def test_without_triton_and_without_a_gpu() -> None:
    output = _python("-c", _NO_TRITON, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "triton is not installed; pip install triton" in output


def test_importing_starts_nothing() -> None:
    """Neither triton nor CUDA is touched by the import."""
    code = (
        "import hyperconv_ext, sys, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert _python("-c", code, TRITON_INTERPRET="0").split() == ["False", "False"]


def test_environment_report() -> None:
    output = _python("-m", "hyperconv_ext", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "reference: yes" in output and "composite: yes" in output
    assert "triton: no, the tensors are on cpu; move them to a CUDA device" in output
    assert torch.__version__ in output


def test_explain_names_the_choice_and_the_reasons(device) -> None:
    conv = HyperConv2d(16, 32, 7, padding=3, backend="triton", device=device)
    text = explain(conv, torch.randn(2, 16, 14, 14, device=device))
    assert text.count("triton/basis, tile basis-") == 2  # forward and input gradient
    assert "tile coefficients-" in text and "tile basis_gradient-" in text
    assert "not triton/direct" in text and "hyper-network: one fused kernel" in text
    conv.backend = "composite"
    assert "basis_conv_fwd: composite/composite" in explain(conv, torch.randn(16, 14, 14, device=device))


def test_explain_off_the_gpu() -> None:
    small = HyperConv2d(3, 4, 3)
    assert "reference: builds the weight, cheaper" in explain(small, torch.randn(1, 3, 8, 8))
    large = HyperConv2d(64, 64, 31, padding=15)
    text = explain(large, torch.randn(1, 64, 32, 32, dtype=torch.float32))
    assert "basis_conv_fwd: composite/composite" in text
    assert "PyTorch (there is no fused kernel for cpu)" in text
