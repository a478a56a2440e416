"""Does a HyperConv2d learn with the recipe of the nn.Conv2d it replaces? Train both, over a grid.

    python examples/learning.py --mnist DIR --jobs 2            # hours; DIR holds MNIST's idx .gz files
    python examples/learning.py --mnist DIR --jobs 2 --quick    # two minutes, for a first look
    python examples/learning.py --report-only                   # redraw from the stored runs

The grid: kinds of layer x {no norm, batch norm} x {SGD with momentum, Adam} x kernel sizes x five
learning rates over two decades x seeds, on two tasks:

- mnist: four convolutions, two epochs, rates that fall along a cosine; the accuracy on held-out images;
- regression: recover a random dense 7x7 filter bank from its answers to white noise, which takes all
  frequencies. A hyper-convolution with N features is of rank N + 1 over the taps, so the error is shown
  beside the least that this rank allows, for a small N and for larger ones. It has no norm.

Every run is appended to OUT/runs.jsonl once it is finished, and one that is there is not repeated:
interrupt at will and start again. All cells come with the first seed, then with the second, and so on.
OUT/summary.md says which goals are met; the figures lie beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import load_images, positive, prepare
from experiments import Runs, add_experiment_options, interruptible, parse
from hyperconv_ext import HyperConv2d
from learning_report import Run, write_report
from learning_trials import (
    BANK_KERNEL,
    KINDS,
    NORMS,
    OPTIMIZERS,
    PROTOCOL,
    TASKS,
    TWIN,
    Result,
    Trial,
    run_trial,
    widest_kernel,
)

# What `--quick` sets unless the command line does.
QUICK: dict[str, Any] = {
    "kinds": [TWIN, "default"],
    "kernels": [7],
    "sgd_rates": [0.01, 0.1],
    "adam_rates": [1e-3, 1e-2],
    "seeds": 1,
    "train": 3000,
    "test": 1000,
    "steps": 200,
    "features": [4, 48],
}


def as_runs(stored: Runs) -> list[Run]:
    """The stored runs."""
    return [Run(Trial(**trial), Result(**result)) for trial, result in stored]


def plan_trials(args: argparse.Namespace) -> list[Trial]:
    """The whole grid, all of a seed before the next.

    Raises:
        FileNotFoundError, ValueError: from `load_images`.
        ValueError: a kernel is too wide for the images.
    """
    rates = {"sgd": args.sgd_rates, "adam": args.adam_rates}
    fixed = {"device": str(args.device), "backend": args.backend}
    regression = fixed | {
        "steps": args.steps,
        "batch_size": args.noise_batch_size,
        "train": 0,
        "test": 0,
        "data": "",
    }
    mnist: dict[str, Any] = {}
    if "mnist" in args.tasks:
        images = load_images(args.mnist, args.train, args.test, str(args.device))
        _check_kernels(args.kernels, images.train.shape[-1])
        mnist = fixed | {
            "steps": args.epochs * -(-args.train // args.batch_size),
            "batch_size": args.batch_size,
            "train": args.train,
            "test": args.test,
            "data": images.checksum,
        }
    trials = []
    for seed in range(args.seed, args.seed + args.seeds):
        if "regression" in args.tasks:
            trials += [
                Trial(
                    "regression",
                    kind,
                    "none",
                    optimizer,
                    BANK_KERNEL,
                    features,
                    rate,
                    seed,
                    **regression,
                )
                for optimizer in args.optimizers
                for kind in args.kinds
                if "num_features" not in KINDS[kind].arguments
                for features in ([None] if kind == TWIN else args.features)
                for rate in rates[optimizer]
            ]
        if "mnist" in args.tasks:
            trials += [
                Trial("mnist", kind, norm, optimizer, kernel_size, None, rate, seed, **mnist)
                for kernel_size in args.kernels
                for norm in args.norms
                for optimizer in args.optimizers
                for kind in args.kinds
                if not _is_default(kind, kernel_size)
                for rate in rates[optimizer]
            ]
    return list(dict.fromkeys(trials))


@cache
def _is_default(kind: str, kernel_size: int) -> bool:
    """Whether the kind names the N which the default has for this kernel, so that it would run twice."""
    features = KINDS[kind].arguments.get("num_features")
    return features is not None and features == HyperConv2d(1, 1, kernel_size).num_features


def _check_kernels(kernels: Sequence[int], side: int) -> None:
    widest = widest_kernel(side)
    if max(kernels) > widest:
        raise ValueError(
            f"--kernels: expected at most {widest}, of which every tap meets an image of side {side}, "
            f"got {max(kernels)}; leave it out"
        )


def run_all(trials: Sequence[Trial], args: argparse.Namespace) -> Generator[Run, None, None]:
    """The runs as they finish, in this process or in `--jobs` others."""
    if args.jobs == 1:
        for trial in trials:
            yield Run(trial, run_trial(trial, args.mnist))
        return
    # A forked process would inherit locks of PyTorch's threads.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(args.jobs, context, _start_worker, (args.threads,)) as pool:
        try:
            pending = {pool.submit(run_trial, trial, args.mnist): trial for trial in trials}
            for future in as_completed(pending):
                yield Run(pending[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _start_worker(threads: int | None) -> None:
    """The parent alone hears an interrupt, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads is not None:
        torch.set_num_threads(threads)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train HyperConv2d with the recipes of nn.Conv2d, over a grid, and report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    option("--jobs", type=positive, default=1, help="processes that train")
    option("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to learn")
    option("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="layers to compare")
    option("--norms", nargs="+", choices=NORMS, default=list(NORMS), help="after each convolution")
    option(
        "--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS), help="recipes"
    )
    option(
        "--kernels",
        nargs="+",
        type=positive,
        default=[3, 5, 7, 11],
        help="kernel sizes on MNIST; behind the poolings at most what the image allows; 31 is slow",
    )
    sgd, adam = [0.003, 0.01, 0.03, 0.1, 0.3], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    option("--sgd-rates", nargs="+", type=float, default=sgd, help="learning rates of SGD")
    option("--adam-rates", nargs="+", type=float, default=adam, help="learning rates of Adam")
    option("--features", nargs="+", type=positive, default=[4, 16, 48], help="N in the regression")
    option("--train", type=positive, default=6000, help="training images")
    option("--test", type=positive, default=3000, help="held-out images")
    option("--batch-size", type=positive, default=64, help="images per step on MNIST")
    option("--steps", type=positive, default=1000, help="of the regression")
    option("--noise-batch-size", type=positive, default=8, help="images per step of the regression")
    add_experiment_options(parser, "learning", epochs=2)
    parser.set_defaults(threads=1)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    if not args.report_only and "mnist" in args.tasks and args.mnist is None:
        parser.error("--mnist: expected the folder of MNIST's files, got none; or --tasks regression")
    prepare(args)
    try:
        stored = Runs(args.out, PROTOCOL)
        trials = [] if args.report_only else plan_trials(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    missing = [trial for trial in trials if stored.get(asdict(trial)) is None]
    if not args.report_only:
        print(f"{len(trials)} runs, of which {len(trials) - len(missing)} are in {stored.path}")
    if missing:
        bar = tqdm(total=len(missing), unit="run")
        with bar, closing(run_all(missing, args)) as running:
            for run in running:
                stored.add(asdict(run.trial), asdict(run.result))
                bar.set_postfix_str(f"{run.trial.task}, {run.trial.kind}, k = {run.trial.kernel_size}")
                bar.update()
    if not len(stored):
        parser.error(f"--report-only: expected runs in {stored.path}, found none; run without it first")
    files = write_report(as_runs(stored), args.out, args.quick)
    print(*files, sep="\n")
    return files


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
