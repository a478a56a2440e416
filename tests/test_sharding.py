"""DTensors: two processes, each with a shard, against one with everything."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from hyperconv_ext import HyperConv2d, functional

from .conftest import QUICK, WHY_NOT, precision_of_the_framework

WORLD = 2
SHAPES = ((4, 4, 6, 5), (4, 4, 3), (3, 3, 2), (4,))  # input, coefficients, basis, bias


def _gradients(output: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, leaves, cotangent)]


def _close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.detach().full_tensor(), other.detach(), rtol=1e-4, atol=1e-4)


def _functions(mesh: object, backend: str, transposed: bool, full: list[Tensor]) -> None:
    """Sharded by the batch, by the output channels, by neither."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d
    every, batch = [Replicate()] * 4, [Shard(0), *[Replicate()] * 3]
    out = [Replicate(), Shard(1 if transposed else 0), Replicate(), Shard(0)]
    for stride in (1, 2):  # with one cache of strategies and of output shapes
        leaves = [t.clone().requires_grad_() for t in full]
        output = function(*leaves, stride=stride, backend=backend)
        cotangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
        expected = _gradients(output, leaves, cotangent)
        for placements, kept in ((every, Replicate()), (batch, Shard(0)), (out, Shard(1))):
            pairs = zip(full, placements, strict=True)
            shards = [distribute_tensor(t.clone(), mesh, [p]).requires_grad_() for t, p in pairs]
            sharded = function(*shards, stride=stride, backend=backend)
            assert list(sharded.placements) == [kept]  # nothing was gathered
            weight = distribute_tensor(cotangent, mesh, sharded.placements)
            _close(_gradients(sharded, shards, weight), expected)


def _layer(mesh: object, backend: str) -> None:
    """Parameters replicated, the batch sharded; W; an initialisation of sharded parameters."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    layer = HyperConv2d(4, 6, 3, padding=1, backend=backend)
    twin = HyperConv2d(4, 6, 3, padding=1, backend="reference")
    twin.load_state_dict(layer.state_dict())
    input = torch.linspace(-1, 1, 4 * 4 * 6 * 5).view(4, 4, 6, 5)
    output = twin(input)
    cotangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
    expected = _gradients(output, list(twin.parameters()), cotangent)
    distribute_module(layer, mesh)
    sharded = layer(distribute_tensor(input, mesh, [Shard(0)]))
    assert list(sharded.placements) == [Shard(0)]
    weight = distribute_tensor(cotangent, mesh, [Shard(0)])
    _close(_gradients(sharded, list(layer.parameters()), weight), expected)
    _close([layer.weight], [twin.weight])
    split = distribute_tensor(layer.coefficients.detach().full_tensor(), mesh, [Shard(0)])
    layer.coefficients = torch.nn.Parameter(split)
    _close([layer.weight], [twin.weight])
    layer.reset_parameters()
    assert list(layer.coefficients.placements) == [Shard(0)]
    assert list(layer.bias.placements) == [Replicate()]
    assert 0 < layer.coefficients.full_tensor().std() < 1


def _work(rank: int, path: str, backends: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    with precision_of_the_framework(torch.device("cpu")):
        for backend in backends:
            torch.manual_seed(0)
            full = [torch.randn(shape) for shape in SHAPES]
            for transposed in (False, True):
                _functions(mesh, backend, transposed, full)
            torch.manual_seed(0)
            _layer(mesh, backend)
    dist.destroy_process_group()
    Path(f"{path}.{rank}").touch()


def test_distributed_tensors(tmp_path: Path) -> None:
    """On the CPU. A strategy knows nothing of backends: one with each way to gradients is enough."""
    on_cpu = QUICK[1:] if torch.cuda.is_available() else QUICK
    fused = [name for name in on_cpu if not WHY_NOT[name]]
    arguments = (str(tmp_path / "store"), ["composite", *fused])
    multiprocessing.spawn(_work, arguments, WORLD)
    # A failure of either is raised above, so this says that both have been there.
    assert all((tmp_path / f"store.{rank}").exists() for rank in range(WORLD))
