"""Train on several GPUs and machines, by DDP or with sharded parameters (FSDP2): `torchrun`'s recipe.

    torchrun --standalone --nproc-per-node gpu examples/train_ddp.py --mnist DIR
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --volumes --fsdp --device cpu
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node gpu examples/train_ddp.py ...

The third line runs on every machine, each with its own rank. DIR holds MNIST's four idx .gz files; the
volumes are made up. Without `torchrun` there is one process. With `--checkpoint FILE` the first process
writes there, whole or not at all, and the same command goes on from there after whatever has stopped it,
with any number of processes, by DDP or FSDP.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from common import CLASSES, Data, add_run_options, load_mnist, positive, prepare
from hyperconv_ext import HyperConv2d, HyperConv3d, parameter_groups

WIDTH = 32
SIDE = 16  # of a volume


def start_processes(device: torch.device) -> torch.device:
    """Join the others that `torchrun` has started; the device of this process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_torchelastic_launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    return device


def make_volumes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Volumes `[N, 1, 16, 16, 16]` of waves in noise, and labels `[N]`: how short the waves are."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    axis = torch.arange(SIDE, dtype=torch.float32)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    directions = F.normalize(torch.randn(count, 3, generator=random), dim=1)
    frequencies = 0.3 + 0.25 * labels
    phases = torch.einsum("nd,dxyz->nxyz", frequencies[:, None] * directions, points)
    phases = phases + 2 * math.pi * torch.rand(count, 1, 1, 1, generator=random)
    return (phases.sin() + 0.5 * torch.randn(phases.shape, generator=random))[:, None], labels


def build_network(dims: int, backend: str) -> nn.Sequential:
    """Three hyper-convolutions over two or three axes. Group norms need nothing of other processes."""
    convolution: Any = (HyperConv2d, HyperConv3d)[dims - 2]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, WIDTH, 1), (WIDTH, WIDTH, 2), (WIDTH, 2 * WIDTH, 2)):
        layer = convolution(inputs, outputs, 5, stride, padding=2, backend=backend)
        layers += [layer, nn.GroupNorm(8, outputs), nn.ReLU()]
    pool = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 2](2)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(2 * WIDTH * 2**dims, CLASSES))


def distribute(dims: int, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same network in every process, its gradients averaged; or sharded before it has numbers."""
    torch.manual_seed(args.seed)
    if not args.fsdp:
        network = build_network(dims, args.backend).to(device)
        return DistributedDataParallel(network, gradient_as_bucket_view=True)
    with torch.device("meta"):
        network = build_network(dims, args.backend)
    for layer in network:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(network)
    network.to_empty(device=device)
    network.apply(draw)
    return network


def draw(module: Any) -> None:
    """The parameters of a module that has some of its own."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Gathered by all, written by the first; there is always a whole file, the old or the new."""
    parameters, moments = get_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save({"model": parameters, "optimizer": moments, "steps": steps}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The steps that were done; only the first process needs the file."""
    state: list[Any] = [None]
    parameters, moments = {}, {}
    if dist.get_rank() == 0 and path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True)
        parameters, moments, state = found["model"], found["optimizer"], [found["steps"]]
    dist.broadcast_object_list(state)
    if state[0] is None:
        return 0
    # One after the other: `set_state_dict` takes the empty model of the other processes for a wish.
    set_model_state_dict(model, parameters, options=FROM_FIRST)
    set_optimizer_state_dict(model, optimizer, moments, options=FROM_FIRST)
    return state[0]


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[int, float, float]]:
    """(epoch, mean loss, examples per second) of this process after each epoch."""
    labels: Any = data.train_labels
    sampler: DistributedSampler = DistributedSampler(labels, seed=args.seed, drop_last=True)
    batches = len(sampler) // args.batch_size
    steps = resume(args.checkpoint, model, optimizer) if args.checkpoint else 0
    if steps and dist.get_rank() == 0:
        print(f"resumed after {steps} steps")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for epoch in range(steps // batches, args.epochs):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))[: batches * args.batch_size].split(args.batch_size)
        done = steps - epoch * batches
        total, start = torch.zeros((), device=device), time.perf_counter()
        model.train()
        bar = tqdm(
            islice(order, done, None),
            f"epoch {epoch + 1}",
            batches,
            disable=dist.get_rank() > 0,
            initial=done,
        )
        for batch in bar:
            images, labels = data.train_images[batch].to(device), data.train_labels[batch].to(device)
            with autocast:
                loss = F.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            steps += 1
            if args.checkpoint and (steps % args.save_every == 0 or steps == (epoch + 1) * batches):
                save(args.checkpoint, model, optimizer, steps)
        mean = float(total) / (batches - done)  # waits for the GPU
        yield epoch, mean, (batches - done) * args.batch_size / (time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch_size: int, device: torch.device) -> float:
    """The share of held-out examples that are right; every process calls the model as often."""
    model.eval()
    calls = math.ceil(len(data.test_labels) / (dist.get_world_size() * batch_size))
    share = torch.arange(len(data.test_labels)).tensor_split(dist.get_world_size())[dist.get_rank()]
    hits = torch.zeros((), device=device)
    for batch in share.tensor_split(calls):
        found = model(data.test_images[batch].to(device)).argmax(1)
        hits += (found == data.test_labels[batch].to(device)).sum()
    dist.all_reduce(hits)
    return float(hits) / len(data.test_labels)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train hyper-convolutions on several GPUs and machines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    source.add_argument(
        "--volumes", type=positive, nargs="?", const=4096, help="so many, made up, for HyperConv3d"
    )
    parser.add_argument("--fsdp", action="store_true", help="shard parameters instead of copying them")
    parser.add_argument("--epochs", type=positive, default=5, help="passes over the training examples")
    parser.add_argument("--batch-size", type=positive, default=64, help="examples per process and step")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the coefficients")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="to go on from, and to write")
    parser.add_argument("--save-every", type=positive, default=200, help="steps between checkpoints")
    add_run_options(parser)
    return parser


def run(data: Data, args: argparse.Namespace, device: torch.device) -> None:
    """Train, and print after each epoch what was reached and how fast each process is."""
    model = distribute(data.train_images.dim() - 2, args, device)
    groups = parameter_groups(model, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    for epoch, loss, speed in train(model, data, optimizer, args, device):
        reached = accuracy(model, data, args.batch_size, device)
        speeds: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(speeds, round(speed))
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, held-out {reached:.2%}, by process:")
            print(*(f"  {rank}: {speed} examples/s" for rank, speed in enumerate(speeds)), sep="\n")
    # Gloo's threads have still to free the tensors of the last message, for which they need the
    # interpreter: while it destroys the group they would wait for ever, and while it ends, abort.
    time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the data, and train with the other processes."""
    parser = build_parser()
    args = parser.parse_args(argv)
    prepare(args)
    try:
        if args.mnist:
            data = load_mnist(args.mnist)
        else:
            data = Data(*make_volumes(args.volumes, seed=1), *make_volumes(args.volumes // 8, seed=2))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device = start_processes(args.device)
    try:
        run(data, args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
