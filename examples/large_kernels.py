"""Large kernels for nothing? A U-Net and a classifier with kernels from 3 to the image's size.

    python examples/large_kernels.py --mnist DIR            # an hour; DIR holds MNIST's idx .gz files
    python examples/large_kernels.py --mnist DIR --quick    # two minutes, for a first look
    python examples/large_kernels.py --report-only          # redraw from the stored runs

A hyper-convolution has as many parameters at every kernel size, and by transforms of tiles it takes
hardly more time at a large one. What do ordinary convolutions pay for a large kernel, and what does
either gain by it? Three layers at each size: nn.Conv2d; HyperConv2d; and HyperConv2d with an nn.Conv2d
of 3x3 beside it, since five smooth functions over a large kernel see far but see no detail.

- lesions: the U-Net of `lesions.py`; the mean Dice coefficient of held-out images;
- digits: three convolutions on MNIST, each with a batch norm; the accuracy on test images.

Time and memory are measured apart from the training: a step of each network in turn, so that other work
on the machine meets all of them. HyperConv2d is measured with the backend `reference`, too, which builds
W and calls F.conv2d, as one would with PyTorch alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import CLASSES, Data, load_mnist, positive
from experiments import (
    PALETTE,
    STYLE,
    Checkpoint,
    Plan,
    Runs,
    add_experiment_options,
    carry_out,
    interruptible,
    parse,
    retake_averages,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import __version__
from lesions import bars, spread
from segmentation import (
    CONV,
    EVALUATED,
    Trial,
    UNet,
    adam_step,
    learn,
    make_layer,
    train_unet,
    unet_step,
)
from training_cost import peak_memory, seconds_per_step

COMMAND = "python examples/large_kernels.py"
KERNELS = {"lesions": (3, 7, 15, 31), "digits": (3, 7, 15, 27)}
SIDES = {"lesions": 32, "digits": 28}
BATCH_SIZES = {"lesions": 16, "digits": 64}
SCORES = {"lesions": "dice", "digits": "accuracy"}
FEATURES = 4
KINDS = {CONV: "nn.Conv2d", "hyper": "HyperConv2d", "both": "HyperConv2d + nn.Conv2d of 3"}
REFERENCE = "reference"  # HyperConv2d by the backend that builds W, as one would with PyTorch alone
LABELS = {**KINDS, REFERENCE: "HyperConv2d, W built"}
WIDTHS = (1, 8, 16, 16)  # of the classifier
QUICK: dict[str, Any] = {
    "epochs": 1,
    "seeds": 1,
    "rounds": 1,
    "train": 64,
    "digits": 128,
    "test": 100,
    "kernels": [3, 15],
}


def classifier(trial: Trial) -> nn.Sequential:
    """Three convolutions on images `[B, 1, 28, 28]`, a pooling behind each of the first two."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        layers += [make_layer(trial, inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        if index < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTHS[-1], CLASSES)
    )


def digits_step(trial: Trial) -> Callable[[], None]:
    """A step of the classifier's training on random images, for measuring what it costs."""
    torch.manual_seed(trial["seed"])
    network = classifier(trial).to(trial["device"])
    size, side, device = trial["batch_size"], trial["side"], trial["device"]
    images = torch.rand(size, 1, side, side, device=device)
    labels = torch.randint(CLASSES, (size,), device=device)
    return adam_step(trial, network, lambda: F.cross_entropy(network(images), labels))


NETWORKS: dict[str, Callable[[Trial], nn.Module]] = {"lesions": UNet, "digits": classifier}
STEPS = {"lesions": unet_step, "digits": digits_step}


@lru_cache(maxsize=1)
def load_digits(folder: Path, device: str) -> Data:
    """MNIST there, once per process."""
    return load_mnist(folder).to(torch.device(device))


def train_classifier(trial: Trial, folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The run's result, on MNIST's files in `folder`.

    In so few steps the averages of the batch norms lag behind the network, so they are taken again.
    """
    data = load_digits(folder, trial["device"])
    torch.manual_seed(trial["seed"])
    network = classifier(trial).to(trial["device"])

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(data.train_images[batch]), data.train_labels[batch])

    result = learn(trial, network, loss, checkpoint)
    retake_averages(network, data.train_images[: trial["train"]].split(EVALUATED)).eval()
    images, labels = data.test_images[: trial["test"]], data.test_labels[: trial["test"]]
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in images.split(EVALUATED)])
    return {"accuracy": float((found == labels).float().mean()), **result}


def with_layer(trial: Trial, name: str, size: int) -> dict[str, Any]:
    """`trial` with kernels of this size and a layer of `LABELS`."""
    kind = "hyper" if name == REFERENCE else name
    backend = REFERENCE if name == REFERENCE else trial["backend"]
    features = None if kind == CONV else FEATURES
    return {**trial, "kind": kind, "kernel_size": size, "features": features, "backend": backend}


def measure(trial: Trial) -> dict[str, Any]:
    """Seconds per step and bytes at the peak of every layer at every kernel size, by `NAME-SIZE`."""
    start = time.perf_counter()
    make_step = STEPS[trial["task"]]
    pairs = itertools.product(LABELS, trial["kernels"])
    networks = {f"{name}-{size}": with_layer(trial, name, size) for name, size in pairs}
    clock = time.process_time if trial["device"] == "cpu" else time.perf_counter
    steps = seconds_per_step(make_step, networks, trial["rounds"], clock)
    memory = {name: peak_memory(make_step, network) for name, network in networks.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds_per_step": steps, "peak_memory": memory, "seconds": seconds}


def plan_trials(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What decides each run: the measurements; then by seed, and the quick ones first."""
    measured, trained = [], []
    for task in args.tasks:
        fixed = {
            "task": task,
            "dims": 2,
            "side": SIDES[task],
            "batch_size": BATCH_SIZES[task],
            "rate": args.rate,
            "device": str(args.device),
            "backend": args.backend,
            "version": __version__,
        }
        kernels = [size for size in KERNELS[task] if size in args.kernels]
        measured.append({**fixed, "seed": args.seed, "rounds": args.rounds, "kernels": kernels})
        amounts = {
            "train": args.train if task == "lesions" else args.digits,
            "test": args.test,
            "epochs": args.epochs,
        }
        trained += [with_layer(fixed | amounts, name, size) for size in kernels for name in KINDS]
    seeds = range(args.seed, args.seed + args.seeds)
    trained.sort(key=lambda trial: trial["kernel_size"] ** 2 if trial["kind"] == CONV else 0)
    return measured + [{**trial, "seed": seed} for seed in seeds for trial in trained]


def run_trial(trial: Trial, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The result; `folder` holds MNIST's files."""
    if "rounds" in trial:
        return measure(trial)
    if trial["task"] == "lesions":
        return train_unet(trial, checkpoint)[1]
    return train_classifier(trial, folder, checkpoint)


def plan(args: argparse.Namespace) -> Plan:
    """All trials.

    Raises:
        FileNotFoundError, ValueError: from `load_mnist`.
    """
    if "digits" in args.tasks:
        load_digits(args.mnist, str(args.device))
    return plan_trials(args), lambda trial, checkpoint: run_trial(trial, checkpoint, args.mnist)


class Row(NamedTuple):
    """What is known of one layer at one kernel size: scores by seed, none where it was not trained."""

    scores: list[float]
    parameters: int
    seconds: float
    memory: int


def collect(runs: Runs, task: str) -> tuple[dict[str, dict[int, Row]], float]:
    """(rows by layer and kernel size, seconds of a step of nn.Conv2d with the smallest kernel).

    Seconds are relative to the latter's, which met the same machine at the same time.
    """
    scores: dict[tuple[str, int], list[float]] = {}
    for trial, result in runs:
        if trial["task"] == task and "rounds" in trial:
            measured, costs = trial, result
        elif trial["task"] == task:
            scores.setdefault((trial["kind"], trial["kernel_size"]), []).append(result[SCORES[task]])
    seconds = costs["seconds_per_step"]
    unit = seconds[f"{CONV}-{min(measured['kernels'])}"]
    rows: dict[str, dict[int, Row]] = {name: {} for name in LABELS}
    for name, size in itertools.product(LABELS, measured["kernels"]):
        network = NETWORKS[task](with_layer(measured, name, size))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        key = f"{name}-{size}"
        relative, memory = seconds[key] / unit, costs["peak_memory"][key]
        rows[name][size] = Row(scores.get((name, size), []), parameters, relative, memory)
    return rows, unit


def task_section(task: str, rows: Mapping[str, Mapping[int, Row]], unit: float, trial: Trial) -> str:
    """The table of a task, and what was trained."""
    header = [
        "layer",
        "k",
        SCORES[task],
        "parameters",
        "CPU s per epoch",
        "of nn.Conv2d, k = 3",
        "peak MiB",
    ]
    steps = -(-trial["train"] // trial["batch_size"])
    lines = [
        [
            LABELS[name],
            str(size),
            spread(row.scores) if row.scores else "not trained",
            f"{row.parameters:,}",
            f"{row.seconds * unit * steps:.1f}",
            f"{row.seconds:.2f}",
            f"{row.memory / 2**20:.1f}",
        ]
        for name, sizes in rows.items()
        for size, row in sizes.items()
    ]
    trained = (
        f"{trial['epochs']} epochs of {trial['train']:,} images of {trial['side']} pixels a side, "
        f"batches of {trial['batch_size']}, Adam at {trial['rate']:g}; {SCORES[task]} of "
        f"{trial['test']} held-out ones, mean ± standard deviation (seeds). N = {FEATURES}."
    )
    return f"## {task.capitalize()}\n\n{trained}\n\n{table(header, lines)}\n\n![{task}]({task}.png)"


def draw(task: str, rows: Mapping[str, Mapping[int, Row]], folder: Path) -> list[Path]:
    """Score, parameters, time and memory against the kernel size, by layer."""
    import matplotlib
    from matplotlib.figure import Figure

    shown: dict[str, Callable[[Row], float]] = {
        "parameters of the network": lambda row: row.parameters,
        "time of a step (nn.Conv2d, k = 3: 1)": lambda row: row.seconds,
        "peak memory (MiB)": lambda row: row.memory / 2**20,
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 6), layout="constrained")
        first, *others = figure.subplots(2, 2).flat
        first.set_ylabel(f"{SCORES[task]}, held-out")
        for (name, sizes), colour, marker in zip(rows.items(), PALETTE, "osD^", strict=False):
            style: Any = {"color": colour, "marker": marker, "markersize": 4, "label": LABELS[name]}
            trained = {size: row.scores for size, row in sizes.items() if row.scores}
            if trained:
                first.errorbar(list(trained), *bars(list(trained.values())), capsize=2, **style)
            for panel, (label, value) in zip(others, shown.items(), strict=True):
                panel.plot(list(sizes), [value(row) for row in sizes.values()], **style)
                panel.set(ylabel=label, yscale="log")
        ticks = list(rows[CONV])
        for panel in (first, *others):
            panel.set(xscale="log", xlabel="kernel size (taps an axis)")
            panel.set_xticks(ticks, [str(size) for size in ticks])
            panel.set_xticks([], minor=True)
        figure.legend(
            *panel.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8
        )
        return save_figure(figure, folder, task)


def write_report(runs: Runs, folder: Path, quick: bool) -> list[Path]:
    """The summary and a figure a task; the paths of all."""
    sections, figures = ["# Large kernels for nothing?"], []
    if quick:
        sections.append("Quick look: too little training to compare anything.")
    tasks = []
    for task in KERNELS:
        trials = [trial for trial, _ in runs if trial["task"] == task and "rounds" not in trial]
        if trials:
            tasks.append(task)
            rows, unit = collect(runs, task)
            sections.append(task_section(task, rows, unit, trials[0]))
            figures += draw(task, rows, folder)
    data = " --mnist DIR" if "digits" in tasks else ""
    command = f"{COMMAND} --tasks {' '.join(tasks)}{data}" + " --quick" * quick
    return [write_summary(folder, "\n\n".join(sections), command), *figures]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Score, parameters, time and memory of networks, by kernel size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    option("--tasks", nargs="+", choices=tuple(KERNELS), default=list(KERNELS), help="what to learn")
    sizes = sorted({size for kernels in KERNELS.values() for size in kernels})
    option("--kernels", nargs="+", type=int, choices=sizes, default=sizes, help="of those of a task")
    option("--train", type=positive, default=500, help="training images of lesions")
    option("--digits", type=positive, default=2000, help="training images of MNIST")
    option("--test", type=positive, default=500, help="held-out images")
    option("--rate", type=float, default=3e-3, help="learning rate of Adam")
    option("--rounds", type=positive, default=3, help="timed steps of each network")
    add_experiment_options(parser, "large-kernels", epochs=4, seeds=3)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    if not args.report_only and "digits" in args.tasks and args.mnist is None:
        parser.error("--mnist: expected the folder of MNIST's files, got none; or --tasks lesions")
    return carry_out(parser, args, plan, lambda runs, folder: write_report(runs, folder, args.quick))


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
