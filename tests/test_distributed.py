"""Two processes that train together, by DDP and by FSDP2, against one that has the whole batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from hyperconv_ext import HyperConv2d, HyperConvTranspose2d

WORLD = 2
STEPS = 20
BATCH = (4, 3, 8, 8)
ROUNDING, AFTER_STEPS = 2e-5, 2e-4  # of gradients, and of the parameters after STEPS
BFLOAT16 = 2**-8
DDP_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3},
)
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    # `broadcast_buffers=False` of older versions leaves each rank its own: there all need one seed.
    DDP_OPTIONS += ({"forward_sync_buffers": False},)


class Network(nn.Module):
    """Every kind of state; `spare` is used where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = HyperConv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.normed = HyperConv2d(8, 8, 5, padding=2, weight_norm="batch")
        centered = HyperConv2d(8, 8, 3, padding=1, coordinates="centered")
        self.spaced = centered.with_kernel_size(3, padding=2, dilation=2)
        self.spare = HyperConv2d(8, 8, 3, padding=1)
        self.last = HyperConvTranspose2d(8, 4, 3, stride=2, padding=1)

    def forward(self, input: Tensor, spare: bool = True) -> Tensor:
        hidden = F.silu(self.norm(self.first(input)))
        hidden = F.silu(self.spaced(F.silu(self.normed(hidden))))
        return self.last(F.silu(self.spare(hidden)) if spare else hidden)


def _batches() -> Iterable[tuple[Tensor, Tensor]]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield (
            torch.randn(BATCH, generator=generator),
            torch.randn(BATCH[0], 4, 15, 15, generator=generator),
        )


def _share(tensor: Tensor) -> Tensor:
    """This rank's examples."""
    return tensor.chunk(WORLD)[dist.get_rank()]


def _loss(model: Callable[..., Tensor], input: Tensor, target: Tensor, **options: bool) -> Tensor:
    return F.mse_loss(model(input, **options).float(), target)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def _train(
    model: nn.Module, share: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    optimizer = optimizer or _optimizer(model)
    for input, target in _batches():
        optimizer.zero_grad()
        _loss(model, share(input), share(target)).backward()
        optimizer.step()
    return optimizer


def _everything(tensor: Tensor) -> Tensor:
    return tensor


def _whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return _whole(model.state_dict().items())


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return _whole((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def _close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: {error:.1e}"


def _ranks_agree(tensors: dict[str, Tensor]) -> None:
    """To the last bit."""
    for name, tensor in tensors.items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), f"rank {dist.get_rank()} has another {name}"


def _ddp(start: dict[str, Tensor]) -> None:
    single = Network()
    single.load_state_dict(start)
    _train(single, _everything)
    for options in DDP_OPTIONS:
        torch.manual_seed(dist.get_rank())  # which no rank but the first may keep its parameters of
        model = Network()
        if dist.get_rank() == 0:
            model.load_state_dict(start)
        parallel = DistributedDataParallel(model, **options)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in start.items())
        _train(parallel, _share)
        _close(_gradients(model), _gradients(single), AFTER_STEPS)
        _close(_state(model), _state(single), AFTER_STEPS)
        _ranks_agree(_state(model))


def _unused_and_accumulated(start: dict[str, Tensor]) -> None:
    """A layer that one rank calls and the other does not; two batches for one step."""
    single, model = Network(), Network()
    for network in (single, model):
        network.load_state_dict(start)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    (input, target), (more, other_target), *_ = _batches()
    losses = [
        _loss(single, input.chunk(WORLD)[rank], target.chunk(WORLD)[rank], spare=rank == 0)
        for rank in range(WORLD)
    ]
    (sum(losses) / WORLD).backward()
    _loss(parallel, _share(input), _share(target), spare=dist.get_rank() == 0).backward()
    _close(_gradients(model), _gradients(single), ROUNDING)

    for network in (single, model):
        network.zero_grad()
    for batch in ((input, target), (more, other_target)):
        _loss(single, *batch).backward()
    with parallel.no_sync():
        _loss(parallel, _share(input), _share(target)).backward()
    _loss(parallel, _share(more), _share(other_target)).backward()
    _close(_gradients(model), _gradients(single), ROUNDING)


def _on_meta(mesh: Any, **options: Any) -> Network:
    """Sharded before there are numbers."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = Network()
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    model.to_empty(device="cpu")
    return model


def _draw(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _fsdp(path: str) -> None:
    """Training; saved and loaded in shards and as a whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    model = _on_meta(mesh)
    torch.manual_seed(0)
    model.apply(_draw)
    single = Network()
    torch.manual_seed(0)
    single.apply(_draw)
    _close(_state(model), _state(single), 1e-6)
    (input, target), *_ = _batches()
    _loss(model, _share(input), _share(target)).backward()
    _loss(single, input, target).backward()
    _close(_gradients(model), _gradients(single), ROUNDING)
    optimizer = _train(model, _share)
    single_optimizer = _train(single, _everything)
    _close(_state(model), _state(single), AFTER_STEPS)
    _ranks_agree(_state(model))

    parts, moments = get_state_dict(model, optimizer)
    dcp.save({"model": parts, "optimizer": moments}, checkpoint_id=path)
    again = _on_meta(mesh)
    again.apply(_draw)
    other = _optimizer(again)
    parts, moments = get_state_dict(again, other)
    held = {"model": parts, "optimizer": moments}
    dcp.load(held, checkpoint_id=path)
    set_state_dict(again, other, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    _close(_state(again), _state(model), 0)
    _train(again, _share, other)
    _train(single, _everything, single_optimizer)
    _close(_state(again), _state(single), 2 * AFTER_STEPS)

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=whole)
    expected = _state(model)
    if dist.get_rank() == 0:
        plain = Network()
        plain.load_state_dict(full)
        _close(_state(plain), expected, 0)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    third = _on_meta(mesh)
    set_model_state_dict(third, full, options=from_first)
    _close(_state(third), expected, 0)


def _mixed_precision() -> None:
    """As one process with the parameters rounded and the buffers as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import init_device_mesh

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _on_meta(init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    torch.manual_seed(0)
    model.apply(_draw)
    single = Network()
    single.load_state_dict(_state(model))

    def rounded(input: Tensor) -> Tensor:
        parameters = {name: p.bfloat16() for name, p in single.named_parameters()}
        return torch.func.functional_call(single, parameters, (input.bfloat16(),))

    optimizers = [_optimizer(network) for network in (model, single)]
    for index, (input, target) in enumerate(_batches()):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(model, _share(input), _share(target)).backward()
        _loss(rounded, input, target).backward()
        if index == 0:  # those of the hyper-network's biases are sums that cancel
            _close(_gradients(model), _gradients(single), 8 * BFLOAT16)
        for optimizer in optimizers:
            optimizer.step()
    _close(_state(model), _state(single), 4 * BFLOAT16)


def _replicas() -> None:
    """Of parameters that nothing shards: every rank draws by a seed of its own, and the first counts."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(dist.get_rank())
    model = _on_meta(mesh)
    model.apply(lambda module: _draw(module) if not isinstance(module, nn.GroupNorm) else None)
    locals = [(name, p.to_local()) for name, p in model.named_parameters() if "norm." not in name]
    _ranks_agree(_whole(locals) | _whole(model.named_buffers()))


def _work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    start = Network().state_dict()
    _ddp(start)
    _unused_and_accumulated(start)
    _fsdp(f"{path}.checkpoint")
    _mixed_precision()
    _replicas()
    time.sleep(0.1)  # see `run` in examples/train_ddp.py
    dist.destroy_process_group()
    Path(f"{path}.{rank}").touch()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_work, (str(tmp_path / "store"),), WORLD)
    # A failure of either is raised above, so this says that both have been there.
    assert all((tmp_path / f"store.{rank}").exists() for rank in range(WORLD))
