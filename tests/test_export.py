"""Programs that are recorded and run elsewhere: torch.export, run_decompositions, torch.jit.trace."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    functional,
    keep_operators,
)
from hyperconv_ext.modules import HyperConvNd

from .conftest import FUSED, swept
from .oracle import relative_error

BACKENDS = ("auto", "reference", "composite", *FUSED)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DIMS = {"b": torch.export.Dim("batch", max=64), "h": torch.export.Dim("height", min=4, max=1024)}


def _model(backend: str, device, weight_norm: str | None = None) -> nn.Module:
    options = {"backend": backend, "device": device}
    layers = (
        HyperConv2d(3, 6, 3, padding=1, weight_norm=weight_norm, **options),
        nn.BatchNorm2d(6, device=device),
        nn.ReLU(),
        HyperConvTranspose2d(6, 4, 3, stride=2, output_padding=1, **options),
        HyperConv2d(4, 4, 4, padding="same", groups=2, **options),
    )
    return nn.Sequential(*layers).eval()


def _input(device, batch: int = 2, height: int = 7) -> Tensor:
    return torch.randn(batch, 3, height, 6, device=device)


def _check(program: torch.nn.Module, model: nn.Module, input: Tensor) -> None:
    """Against the model on the reference: what a backend computes is tested elsewhere."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, HyperConvNd):
            layer.backend = "reference"
    with torch.no_grad():
        assert relative_error(program(input), twin(input).double()) <= 2e-2  # TF32, if on a GPU


def _targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@swept(lambda row: row["dynamic"] == (row["weight_norm"] is None))
@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_an_exported_program_is_plain_aten(
    backend: str, dynamic: bool, weight_norm: str | None, device
) -> None:
    model, input = _model(backend, device, weight_norm), _input(device)
    shapes = ({0: DIMS["b"], 2: DIMS["h"]},) if dynamic else None
    exported = torch.export.export(model, (input,), dynamic_shapes=shapes)
    for program in (exported, exported.run_decompositions()):
        targets = _targets(program)
        assert targets and all(target.startswith("aten.") for target in targets if "." in target)
        _check(program.module(), model, input)
        if dynamic:
            _check(program.module(), model, _input(device, 5, 9))


@pytest.mark.parametrize("kind", [HyperConv1d, HyperConv3d])
def test_other_dimensions(kind: type[HyperConv1d], device) -> None:
    model = kind(3, 4, 3, device=device)
    input = torch.randn(2, 3, *(5, 6, 7)[: model.dims], device=device)
    program = torch.export.export(model, (input,))
    assert not any("hyperconv" in target for target in _targets(program))
    _check(program.module(), model, input)


def test_functions_are_exported_too(device) -> None:
    class Functions(nn.Module):
        def forward(self, input: Tensor, coefficients: Tensor, basis: Tensor) -> Tensor:
            return functional.basis_conv2d(input, coefficients, basis, backend="composite")

    operands = [torch.randn(s, device=device) for s in ((1, 3, 5, 6), (4, 3, 2), (2, 3, 3))]
    program = torch.export.export(Functions(), tuple(operands))
    assert not any("hyperconv" in target for target in _targets(program))


@every_backend
def test_constants_of_the_mlp_are_exported_too(backend: str, device) -> None:
    class Function(nn.Module):
        def forward(
            self, input: Tensor, coefficients: Tensor, *mlp: Tensor, name: str = backend
        ) -> Tensor:
            operands = (input, coefficients, mlp[:2], mlp[2:], 3)
            return functional.hyper_conv2d(
                *operands, activation="sine", weight_gain=0.3, linear_output=True, backend=name
            )

    shapes = ((1, 3, 5, 6), (4, 3, 3), (5, 2), (2, 5), (5,), (2,))
    operands = [torch.randn(shape, device=device) for shape in shapes]
    program = torch.export.export(Function(), tuple(operands))
    assert not any("hyperconv" in target for target in _targets(program))
    exact = Function()(*(t.double() for t in operands), name="reference")
    assert relative_error(program.module()(*operands), exact) <= 2e-2  # TF32, if on a GPU


_LOAD = """
import sys, torch
program, input, output = torch.load(sys.argv[1], weights_only=False)
import io
module = torch.export.load(io.BytesIO(program)).module()
assert "hyperconv_ext" not in sys.modules
torch.testing.assert_close(module(input), output, rtol=2e-2, atol=2e-2)
print("loaded")
"""


def test_loads_where_the_package_is_not_imported(device, tmp_path: Path) -> None:
    model, input = _model("auto", device), _input(device)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (input,)), buffer)
    with torch.no_grad():
        torch.save((buffer.getvalue(), input, model(input)), tmp_path / "program.pt")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "program.pt")]
    options = {"env": {**os.environ, "PYTHONPATH": ""}, "cwd": tmp_path}
    result = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert result.stdout.split() == ["loaded"], result.stderr


@every_backend
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_is_not_tied_to_its_size(backend: str, grad: bool, device) -> None:
    model, input = _model(backend, device), _input(device)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (input,), check_trace=False)
    assert "hyperconv_ext::" not in str(traced.inlined_graph)
    for other in (input, _input(device, 5, 9)):
        _check(traced, model, other)


@pytest.mark.parametrize("backend", ["composite", *FUSED])
def test_the_operators_can_be_kept(backend: str, device) -> None:
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device)
    input = _input(device)
    with keep_operators():
        program = torch.export.export(layer, (input,))
    assert any(target.startswith("hyperconv_ext.") for target in _targets(program))
    _check(program.module(), layer, input)
    assert not any("hyperconv" in target for target in _targets(torch.export.export(layer, (input,))))
