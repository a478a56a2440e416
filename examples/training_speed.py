"""What training costs: ordinary convolutions, hyper-convolutions by the library, and by this package.

    python examples/training_speed.py                     # minutes, on a machine that does nothing else

The networks are those of `mnist_noise.py`. A step of each is timed in turn, so that whatever else the
machine does meets all of them; the median counts, times the steps of an epoch. Memory is the most that
PyTorch's allocator holds while the network is built and trained for two steps. The data are random: they
decide neither. Every run is appended to OUT/runs.jsonl, and one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common import CLASSES, add_run_options, positive
from experiments import (
    Plan,
    Runs,
    add_report_options,
    carry_out,
    interruptible,
    machine,
    parse,
    table,
    write_summary,
)
from hyperconv_ext import __version__
from mnist_noise import build_network
from training_cost import peak_memory, seconds_per_step

COMMAND = "python examples/training_speed.py"
PROTOCOL = 2  # counts up when the same settings would give other results
QUICK: dict[str, Any] = {"steps": 5}
CONV, REFERENCE, PACKAGE = NETWORKS = ("conv", "reference", "package")


def make_step(trial: Mapping[str, Any]) -> Callable[[], None]:
    """A step of training with Adam; `network` and `device` of the trial say what and where."""
    name, device = trial["network"], trial["device"]
    torch.manual_seed(trial["seed"])
    kind = "conv" if name == CONV else "hyper"
    network = build_network(kind, REFERENCE if name == REFERENCE else trial["backend"]).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    images = torch.rand(trial["batch_size"], 1, 28, 28, device=device)
    labels = torch.randint(CLASSES, images.shape[:1], device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def run_trial(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds per step and bytes, by network."""
    start = time.perf_counter()
    networks = {name: {**trial, "network": name} for name in NETWORKS}
    steps = seconds_per_step(make_step, networks, trial["steps"], time.perf_counter)
    memory = {name: peak_memory(make_step, network) for name, network in networks.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds_per_step": steps, "peak_memory": memory, "seconds": seconds}


def plan(args: argparse.Namespace) -> Plan:
    """One trial, of this machine."""
    trial = {name: getattr(args, name) for name in ("seed", "train", "batch_size", "steps", "backend")}
    trial |= {"device": str(args.device), "machine": machine(), "version": __version__}
    return [trial], lambda trial, _: run_trial(trial)


def write_report(runs: Runs, folder: Path) -> Path:
    """A table a run."""
    sections = ["# Training speed"]
    for trial, result in runs:
        labels = {CONV: "nn.Conv2d", REFERENCE: "HyperConv2d, backend 'reference'"}
        labels[PACKAGE] = f"HyperConv2d, backend '{trial['backend']}'"
        steps = -(-trial["train"] // trial["batch_size"])
        seconds, memory = result["seconds_per_step"], result["peak_memory"]
        rows = [
            [
                label,
                f"{steps * seconds[name]:.0f}",
                f"{seconds[name] / seconds[CONV]:.2f}",
                f"{memory[name] / 2**20:.0f}",
                f"{memory[name] / memory[CONV]:.2f}",
            ]
            for name, label in labels.items()
        ]
        sections += [
            f"The classifier of the noise experiment, kernels of 5 by 5 taps, N = 16, weight norm, in "
            f"channels_last: {trial['train']:,} images in batches of {trial['batch_size']}, the median "
            f"of {trial['steps']} steps; device {trial['device']}, {trial['machine']}.",
            table(["convolution", "s per epoch", "of nn.Conv2d", "peak MiB", "of nn.Conv2d"], rows),
        ]
    return write_summary(folder, "\n\n".join(sections), COMMAND)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Seconds per epoch and peak memory of a classifier, by convolution and backend.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--train", type=positive, default=55_000, help="images of an epoch")
    option("--batch-size", type=positive, default=64, help="images per step")
    option("--steps", type=positive, default=50, help="that are timed")
    add_report_options(parser, "speed")
    add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, unless that is stored, write the summary and return its path."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    (summary,) = carry_out(
        parser, args, plan, lambda runs, folder: [write_report(runs, folder)], PROTOCOL
    )
    print(summary.read_text(encoding="utf-8"))
    return summary


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
