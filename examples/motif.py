"""Find a motif in noisy sequences: one kernel, slid over all positions, and the maximum of its answers.

    python examples/motif.py             # a minute
    python examples/motif.py --quick     # a first look
    python examples/motif.py --report-only

Every sequence has a short wave at a random position, in white noise: in one half of the sequences it
rises in frequency, in the other it is reversed in time, so that only its shape tells them apart. The
detector is one convolution of one channel, the maximum over the positions (so it does not matter where
the motif is) and a threshold, its bias. A good kernel is known: the motif itself, the matched filter.
Detectors of nn.Conv1d and of HyperConv1d learn from few and from many sequences.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import positive
from digits import count_parameters
from experiments import (
    HYPER,
    ORDINARY,
    STYLE,
    Plan,
    Runs,
    add_experiment_options,
    carry_out,
    interruptible,
    mean_and_deviation,
    parse,
    plot_band,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import HyperConv1d

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python examples/motif.py"
QUICK: dict[str, Any] = {"seeds": 1, "epochs": 50, "sequences": [64, 256]}
COLOURS = {"nn.Conv1d": ORDINARY, "HyperConv1d": HYPER}
FEATURES = 4
WAVE = 31  # positions of the motif, and taps of the kernel
LENGTH = 128  # of a sequence
TEST = 4000


def motif() -> Tensor:
    """A wave of rising frequency under a bell, `[WAVE]`, of norm 1."""
    place = torch.linspace(-1, 1, WAVE)
    wave = torch.sin(math.pi * (2 * place + 1.5 * place.square())) * torch.exp(-2 * place.square())
    return wave / wave.norm()


def make_sequences(count: int, signal: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences `[count, 1, LENGTH]` and whether the motif in them is not reversed, `[count]`, float32.

    Args:
        signal: norm of the motif; the noise has deviation 1.
    """
    random = torch.Generator().manual_seed(seed)
    forward = torch.randint(2, (count,), generator=random)
    starts = torch.randint(LENGTH - WAVE + 1, (count, 1), generator=random)
    waves = signal * torch.stack([motif().flip(0), motif()])[forward]
    sequences = torch.randn(count, LENGTH, generator=random)
    sequences.scatter_add_(1, starts + torch.arange(WAVE), waves)
    return sequences[:, None], forward.float()


class Detector(nn.Module):
    """The largest answer of one kernel; above 0 the motif is there.

    Args:
        convolution: one channel in, one out, with a bias.
    """

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, sequences: Tensor) -> Tensor:
        """The logit of each sequence `[B, 1, L]`, `[B]`."""
        return self.convolution(sequences).amax((1, 2))


def accuracy(detector: nn.Module, sequences: Tensor, labels: Tensor, threshold: float = 0.0) -> float:
    """The share of sequences that are told right."""
    with torch.no_grad():
        return float(((detector(sequences) > threshold) == labels.bool()).float().mean())


def best_known(signal: float, seed: int) -> float:
    """Accuracy of the motif as the kernel, with the threshold that is best on other sequences."""
    kernel = nn.Conv1d(1, 1, WAVE, bias=False)
    with torch.no_grad():
        kernel.weight.copy_(motif())
        sequences, labels = make_sequences(TEST, signal, seed + 1)
        answers, order = Detector(kernel)(sequences).sort()
    hits = labels.sum() + (1 - 2 * labels[order]).cumsum(0)  # with the threshold behind each answer
    threshold = float(answers[hits.argmax()])
    return accuracy(Detector(kernel), *make_sequences(TEST, signal, seed), threshold)


def run_trial(trial: Mapping[str, Any], _: object) -> dict[str, Any]:
    """Train a detector and test it."""
    start = time.perf_counter()
    torch.manual_seed(trial["seed"])
    hyper = partial(HyperConv1d, num_features=FEATURES, backend=trial["backend"])
    made: Any = {"nn.Conv1d": nn.Conv1d, "HyperConv1d": hyper}
    detector = Detector(made[trial["kind"]](1, 1, WAVE)).to(trial["device"])
    sequences, labels = make_sequences(trial["sequences"], trial["signal"], 2 * trial["seed"])
    sequences, labels = sequences.to(trial["device"]), labels.to(trial["device"])
    optimizer = torch.optim.Adam(detector.parameters(), lr=trial["rate"])
    for _ in range(trial["epochs"]):
        loss = F.binary_cross_entropy_with_logits(detector(sequences), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.eval().cpu()
    weight: Any = detector.convolution.weight
    return {
        "accuracy": accuracy(detector, *make_sequences(TEST, trial["signal"], 2 * trial["seed"] + 1)),
        "training_accuracy": accuracy(detector, sequences.cpu(), labels.cpu()),
        "kernel": weight.detach().flatten().tolist(),
        "parameters": count_parameters([detector]),
        "seconds": round(time.perf_counter() - start, 2),
    }


def plan(args: argparse.Namespace) -> Plan:
    """All detectors of a seed before the next seed."""
    fixed = {name: getattr(args, name) for name in ("epochs", "signal", "rate", "backend")}
    fixed["device"] = str(args.device)
    trials = [
        fixed | {"kind": kind, "sequences": count, "seed": seed}
        for seed in range(args.seed, args.seed + args.seeds)
        for count in args.sequences
        for kind in COLOURS
    ]
    return trials, run_trial


Results = dict[str, dict[int, list[Mapping[str, Any]]]]


def write_report(stored: Runs, folder: Path) -> list[Path]:
    """The summary and the figure."""
    import matplotlib

    results: Results = {kind: {} for kind in COLOURS}
    for trial, result in stored:
        results[trial["kind"]].setdefault(trial["sequences"], []).append(result)
    trial, _ = next(iter(stored))
    best = best_known(trial["signal"], 2 * trial["seed"] + 1)
    with matplotlib.rc_context(STYLE):
        files = save_figure(draw(results, best), folder, "motif")
    rows = []
    for kind, counts in results.items():
        for count, found in sorted(counts.items()):
            spread = [
                mean_and_deviation([100 * result[name] for result in found], 1)
                for name in ("accuracy", "training_accuracy")
            ]
            rows.append([kind, f"{found[0]['parameters']}", f"{count}", f"{len(found)}", *spread])
    header = ["convolution", "parameters", "training sequences", "seeds"]
    header += ["accuracy [%]", "on those of training [%]"]
    text = (
        f"# A motif in noise\n\nA wave of {WAVE} positions and norm {trial['signal']:g} in {LENGTH} of "
        f"noise of deviation 1; {trial['epochs']} steps of Adam at {trial['rate']:g} with all "
        f"sequences, {TEST:,} held-out ones. The motif as the kernel reaches {100 * best:.1f}%. Mean ± "
        f"standard deviation over seeds.\n\n{table(header, rows)}\n\n"
        f"![Accuracy against the number of sequences, and kernels that were learned.](motif.png)"
    )
    return [write_summary(folder, text, COMMAND), *files]


def draw(results: Results, best: float) -> Figure:
    """Accuracy with a band over the seeds; the first seed's kernels of the fewest and most sequences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, *panels = figure.subplots(1, 3)
    for kind, counts in results.items():
        sizes = sorted(counts)
        seeds = min(map(len, counts.values()))
        curves = [[100 * counts[size][seed]["accuracy"] for size in sizes] for seed in range(seeds)]
        plot_band(left, sizes, curves, marker="o", color=COLOURS[kind], label=kind)
        for panel, size in zip(panels, (sizes[0], sizes[-1]), strict=True):
            kernel = torch.tensor(counts[size][0]["kernel"])
            panel.plot(kernel / kernel.norm(), color=COLOURS[kind], label=kind)
            panel.set_title(f"kernels learned from {size} sequences")
            panel.set_xlabel("tap")
    left.axhline(100 * best, color="black", linestyle=":", label="the motif")
    left.set_xscale("log")
    left.set_xlabel("training sequences")
    left.set_ylabel("held-out accuracy [%]")
    for panel in panels:
        panel.plot(motif(), color="black", linestyle=":", label="the motif")
    left.legend()
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Learn to find a motif in noisy sequences with nn.Conv1d and with HyperConv1d.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option(
        "--sequences",
        type=positive,
        nargs="+",
        default=[64, 256, 1024, 4096],
        help="numbers of training sequences to compare",
    )
    option("--signal", type=float, default=8.0, help="norm of the motif; the noise has deviation 1")
    option("--rate", type=float, default=0.03, help="learning rate of Adam")
    add_experiment_options(parser, "motif", epochs=300, seeds=5)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    return carry_out(parser, parse(parser, argv, QUICK), plan, write_report)


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
