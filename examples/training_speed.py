"""What training costs: ordinary convolutions, hyper-convolutions by the library, and by this package.

    python examples/training_speed.py                     # minutes, on a machine that does nothing else
    python examples/training_speed.py --clock processor --threads 1    # on one that is busy

The networks are the classifier of `mnist_noise.py` and the U-Net of `lesions.py`, on images and on
volumes. A step of each convolution is timed in turn, so that whatever else the machine does meets all of
them; the median counts, times the steps of an epoch. Memory is the most that PyTorch's allocator holds
while the network is built and trained for two steps. The data are random: they decide neither. Every run
is appended to OUT/runs.jsonl, and one that is there is not repeated.
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
    Trial,
    add_report_options,
    carry_out,
    interruptible,
    machine,
    parse,
    table,
    write_summary,
)
from hyperconv_ext import __version__
from lesions import KERNELS, VOLUME_FEATURES
from mnist_noise import FEATURES, KERNEL, build_network
from segmentation import CONV, adam_step, unet_step
from training_cost import peak_memory, seconds_per_step

COMMAND = "python examples/training_speed.py"
PROTOCOL = 2  # counts up when the same settings would give other results
QUICK: dict[str, Any] = {"steps": 2}
REFERENCE, PACKAGE = "reference", "package"
NETWORKS = (CONV, REFERENCE, PACKAGE)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SECONDS = {"wall": "seconds of the clock", "processor": "seconds of the processor"}


def classifier_step(trial: Trial) -> Callable[[], None]:
    """A step of the classifier's training on random images."""
    torch.manual_seed(trial["seed"])
    network = build_network(trial["kind"], trial["backend"]).to(trial["device"])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(trial["batch_size"], 1, *[trial["side"]] * 2, device=trial["device"])
    labels = torch.randint(CLASSES, images.shape[:1], device=trial["device"])
    return adam_step(trial, network, lambda: F.cross_entropy(network(images), labels))


STEPS = {"classifier": classifier_step, "U-Net": unet_step}


def run_trial(trial: Trial) -> dict[str, Any]:
    """Seconds per step and bytes, by convolution."""
    start = time.perf_counter()
    hyper = {**trial, "kind": "hyper"}
    networks = {
        CONV: {**trial, "kind": CONV, "features": None},
        REFERENCE: {**hyper, "backend": REFERENCE},
        PACKAGE: hyper,
    }
    make_step = STEPS[trial["network"]]
    steps = seconds_per_step(make_step, networks, trial["steps"], CLOCKS[trial["clock"]])
    memory = {name: peak_memory(make_step, network) for name, network in networks.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds_per_step": steps, "peak_memory": memory, "seconds": seconds}


# Of the experiments' own defaults; each with the kernel sizes that are measured.
CLASSIFIER = {
    "features": FEATURES,
    "dims": 2,
    "side": 28,
    "train": 55_000,
    "batch_size": 64,
    "rate": 1e-4,
}
UNET = {"features": VOLUME_FEATURES, "batch_size": 16, "rate": 3e-3}
MEASURED: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("classifier", CLASSIFIER, (KERNEL,)),
    ("U-Net", UNET | {"dims": 2, "side": 32, "train": 1000}, KERNELS),
    ("U-Net", UNET | {"dims": 3, "side": 16, "train": 400}, KERNELS),
)


def plan(args: argparse.Namespace) -> Plan:
    """The networks, on this machine.

    Raises:
        ValueError: the clock of the processor is to time another device.
    """
    if args.clock == "processor" and args.device.type != "cpu":
        raise ValueError(f"--clock: expected wall on {args.device}, got processor; pass wall")
    fixed = {name: getattr(args, name) for name in ("seed", "steps", "clock", "backend")}
    fixed |= {"device": str(args.device), "machine": machine(), "version": __version__}
    trials = [
        {**fixed, "network": network, **settings, "kernel_size": size}
        for network, settings, sizes in MEASURED
        for size in sizes
    ]
    return trials, lambda trial, _: run_trial(trial)


def describe(trial: Trial) -> str:
    """What was measured, in a sentence: the same for all kernel sizes."""
    networks = {
        "classifier": "The classifier of the noise experiment, with weight norms, in channels_last",
        "U-Net": f"The U-Net of the lesions, in {trial['dims']}-D",
    }
    return (
        f"{networks[trial['network']]}, N = {trial['features']}: {trial['train']:,} images of "
        f"{trial['side']} pixels a side in batches of {trial['batch_size']}, the median of "
        f"{trial['steps']} steps; {SECONDS[trial['clock']]}, {trial['device']}, {trial['machine']}."
    )


def rows_of(trial: Trial, result: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Of a table, one for each convolution."""
    dims = trial["dims"]
    labels = {CONV: f"nn.Conv{dims}d", REFERENCE: f"HyperConv{dims}d, backend '{REFERENCE}'"}
    labels[PACKAGE] = f"HyperConv{dims}d, backend '{trial['backend']}'"
    steps = -(-trial["train"] // trial["batch_size"])
    seconds, memory = result["seconds_per_step"], result["peak_memory"]
    return [
        [
            str(trial["kernel_size"]),
            label,
            f"{steps * seconds[name]:.3g}",
            f"{seconds[name] / seconds[CONV]:.2f}",
            f"{memory[name] / 2**20:.3g}",
            f"{memory[name] / memory[CONV]:.2f}",
        ]
        for name, label in labels.items()
    ]


def write_report(runs: Runs, folder: Path) -> Path:
    """A table for each network and data."""
    tables: dict[str, list[list[str]]] = {}
    for trial, result in runs:
        tables.setdefault(describe(trial), []).extend(rows_of(trial, result))
    header = ["k", "convolution", "s per epoch", "of the first", "peak MiB", "of the first"]
    sections = ["# Training speed"]
    for sentence, rows in tables.items():
        sections += [sentence, table(header, rows)]
    return write_summary(folder, "\n\n".join(sections), COMMAND)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Seconds per epoch and peak memory of two networks, by convolution and backend.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--steps", type=positive, default=50, help="that are timed")
    option("--clock", choices=tuple(CLOCKS), default="wall", help="the processor's, if others use it")
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
