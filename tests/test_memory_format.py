"""Memory formats are those of nn.ConvNd: of the output, and of a converted layer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperconv_ext
from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d, layout

from .conftest import FUSED, QUICK

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
BACKENDS = ["reference", "composite", *QUICK]
# (C_in, C_out, groups, kernel_size) of layers with one element on some axes of the weight, or on none.
SIZES = [
    *((3, 4, 1, 3), (1, 4, 1, 1), (4, 1, 1, 3), (1, 1, 1, 1)),
    *((4, 4, 4, 1), (4, 4, 4, 3), (3, 4, 1, 1)),
]


def _pair(name: str, backend: str, device, *sizes: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """nn.ConvNd on the CPU, where the rules are PyTorch's own, and the layer in its place."""
    layer = getattr(hyperconv_ext, f"Hyper{name}")(*sizes, **options, backend=backend, device=device)
    return getattr(nn, name)(*sizes, **options), layer


def _variants(shape: tuple[int, ...], device) -> Iterator[tuple[str, Tensor]]:
    """The same sizes with several strides; with one unbatched twin where there is one example."""
    form = LAST[len(shape) - 2]
    contiguous = torch.randn(shape, device=device)
    inputs = {
        "contiguous": contiguous,
        "converted": contiguous.to(memory_format=form),
        "channels as last axis": contiguous.movedim(1, -1).contiguous().movedim(-1, 1),
        "slice": torch.randn(*(2 * s for s in shape), device=device).to(memory_format=form)[
            (slice(None), slice(None, shape[1]), *(slice(None, None, 2),) * (len(shape) - 2))
        ][: shape[0]],
    }
    for name, input in inputs.items():
        yield name, input
        if shape[0] == 1:
            yield f"{name}, unbatched", input[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_output_has_the_strides_of_convnd(
    name: str, converted: bool, sizes, backend: str, device, two_threads
) -> None:
    """Over batches, images and channels of one element."""
    in_channels, out_channels, groups, kernel_size = sizes
    options = {"padding": kernel_size // 2, "groups": groups}
    pair = _pair(name, backend, device, in_channels, out_channels, kernel_size, **options)
    dense, layer = (
        module.to(memory_format=torch.channels_last) if converted else module for module in pair
    )
    for shape in itertools.product((1, 2), (in_channels,), (1, 4), (1, 4)):
        for variant, input in _variants(shape, device):
            if "slice" in variant and math.prod(shape[1:]) == 1:
                continue  # of one element an example: PyTorch makes it contiguous first, or does not
            expected, output = dense(input.cpu()), layer(input)
            assert output.shape == expected.shape
            assert output.stride() == expected.stride(), (variant, input.shape, input.stride())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose3d"])
def test_volumes_have_the_strides_of_convnd(name: str, converted: bool, backend: str, device) -> None:
    """Of sizes at which oneDNN computes nn.Conv3d: PyTorch's own code for small ones keeps no format."""
    dense, layer = _pair(name, backend, device, 3, 4, 3, padding=1)
    if converted:
        dense.to(memory_format=torch.channels_last_3d)
        layer.to(memory_format=torch.channels_last_3d)
    for variant, input in _variants((2, 3, 4, 5, 6), device):
        assert layer(input).stride() == dense(input.cpu()).stride(), variant


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (2, 1), (1, 3), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("spatial", list(itertools.product((1, 2, 3), repeat=2)), ids=str)
def test_format_is_the_one_pytorch_suggests(shape: tuple[int, ...], spatial: tuple[int, ...]) -> None:
    """Which shows in a conversion: it copies unless the format is the suggested one."""
    plain = torch.empty(*shape, *spatial)
    candidates = [
        *(plain, plain.to(memory_format=torch.channels_last), plain.movedim(1, -1).movedim(-1, 1)),
        *(plain.transpose(2, 3), plain[..., :1], plain.expand(*shape, *spatial)),
    ]
    for tensor in candidates:
        kept = tensor.to(memory_format=torch.channels_last) is tensor
        assert layout.channels_last(tensor) == kept, tensor.stride()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
def test_an_output_of_one_position_stays_contiguous(dims: int, backend: str, device) -> None:
    kind = (HyperConv1d, HyperConv2d, HyperConv3d)[dims - 1]
    layer = kind(3, 4, 1, backend=backend, device=device)
    output = layer(torch.randn(2, 3, *(1,) * dims, device=device))
    assert output.stride() == (4, *(1,) * (dims + 1))
    wide = kind(3, 4, 3, padding=2, backend=backend, device=device)
    assert wide(torch.randn(2, 3, *(1,) * dims, device=device)).is_contiguous()


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *itertools.product([HyperConv2d, HyperConvTranspose2d, HyperConv3d], BACKENDS),
        (HyperConv2d, "triton"),
    ],
)
def test_a_converted_model_gives_channels_last(kind, backend: str, device) -> None:
    layer = kind(3, 4, 3, backend=backend, device=device)
    form = LAST[layer.dims]
    input = torch.randn(2, 3, *(5,) * layer.dims, device=device)
    expected = layer(input)
    assert expected.is_contiguous()
    model = nn.Sequential(layer).to(memory_format=form)
    output = model(input)
    assert output.is_contiguous(memory_format=form) and not output.is_contiguous()
    torch.testing.assert_close(output, expected)
    single = model(input[0])
    assert single.shape == expected[0].shape and single.unsqueeze(0).stride()[1:] == output.stride()[1:]
    leaf = input.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    model.to(memory_format=torch.contiguous_format)
    assert model(input).is_contiguous()


def _last(model: nn.Module, device, dtype=torch.float32) -> bool:
    output = model(torch.randn(1, 3, 5, 5, device=device, dtype=dtype))
    return output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()


def test_what_keeps_the_format(device) -> None:
    model = nn.Sequential(HyperConv2d(3, 4, 3, padding=1), nn.ReLU()).to(
        memory_format=torch.channels_last
    )
    model.to(device)
    assert _last(model, device)
    assert _last(model.bfloat16(), device, torch.bfloat16) and _last(model.float(), device)
    assert _last(model.to(device, torch.float32), device) and _last(model.requires_grad_(False), device)
    assert _last(copy.deepcopy(model), device) and _last(pickle.loads(pickle.dumps(model)), device)
    assert _last(model[0].with_kernel_size(5, padding=2), device)
    model.load_state_dict(model.state_dict())
    assert _last(model, device)
    model.share_memory() if device.type == "cpu" else model.cpu().to(device)
    assert _last(model, device)
    assert _last(model.to("meta").to_empty(device=device), device)
    assert not _last(model.to(device, memory_format=torch.contiguous_format), device)


def test_meta_layers_are_converted_too(device) -> None:
    layer = HyperConv2d(3, 4, 3, device="meta").to(memory_format=torch.channels_last)
    output = layer(torch.empty(1, 3, 5, 5, device="meta"))
    assert output.is_contiguous(memory_format=torch.channels_last)
    layer.to_empty(device=device).reset_parameters()
    assert _last(layer, device)


@pytest.mark.parametrize(
    ("name", "form"), [("Conv2d", torch.channels_last_3d), ("Conv3d", torch.channels_last)]
)
def test_the_wrong_format_is_refused_as_convnd_refuses(name: str, form, device) -> None:
    for module in _pair(name, "auto", device, 3, 4, 3):
        with pytest.raises(RuntimeError, match="required rank"):
            module.to(memory_format=form)


@pytest.mark.parametrize("form", [torch.channels_last, torch.channels_last_3d])
def test_one_dimension_has_no_format(form, device) -> None:
    dense, layer = (module.to(memory_format=form) for module in _pair("Conv1d", "auto", device, 3, 4, 3))
    input = torch.randn(2, 3, 7, device=device)
    assert layer(input).stride() == dense(input.cpu()).stride()


def test_other_functions_see_parameters_only() -> None:
    layer = HyperConv2d(3, 4, 3, weight_norm="batch").to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    layer._apply(lambda tensor: seen.append(tensor) or tensor)
    expected = [*layer.parameters(), *layer.buffers()]
    assert {id(t) for t in seen} <= {id(t) for t in expected} | {id(t.data) for t in expected}
    assert sum(t.numel() for t in seen) == sum(t.numel() for t in expected)
    assert layer(torch.randn(1, 3, 5, 5)).stride(1) == 1


@pytest.mark.parametrize("backend", ["reference", "composite"])
def test_a_converted_layer_under_compile(backend: str, device) -> None:
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (7, 9, 8):
        input = torch.randn(2, 3, size, size + 1, device=device)
        expected = layer(input)
        output = compiled(input)
        torch.testing.assert_close(output, expected)
        assert output.stride() == expected.stride()


@pytest.mark.parametrize("backend", ["composite", *FUSED])
@pytest.mark.parametrize("last", [False, True])
def test_symbolic_sizes(last: bool, backend: str, device) -> None:
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device)
    if last:
        layer.to(memory_format=torch.channels_last)
    batch, height = (torch.export.Dim(name, min=4, max=64) for name in ("batch", "height"))
    input = torch.randn(5, 3, 7, 6, device=device)
    program = torch.export.export(layer, (input,), dynamic_shapes=({0: batch, 2: height},))
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    value = output.args[0][0].meta["val"]
    assert (value.stride(1) == 1) == last
