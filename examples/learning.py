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
import json
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import add_run_options, positive, prepare
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
    load_images,
    run_trial,
    widest_kernel,
)

OUT = Path(__file__).parent / "results" / "learning"
RUNS = "runs.jsonl"
# What `--quick` sets unless the command line does.
QUICK: dict[str, Any] = {
    "out": OUT.with_name("learning-quick"),
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


def read_runs(path: Path) -> list[Run]:
    """The stored runs; a last line that was cut short is none.

    Raises:
        ValueError: another line is no run, or one of another protocol.
    """
    if not path.is_file():
        return []
    runs = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            run = Run(Trial(**row["trial"]), Result(**row["result"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a run of protocol {PROTOCOL}, got {error!r}; "
                f"remove the line, or pass another --out"
            ) from error
        runs.append(run)
    return runs


def append_runs(path: Path, runs: Iterable[Run]) -> Iterator[Run]:
    """Each run, once it stands at the end of the file, of which a cut last line is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        for run in runs:
            row = {"trial": asdict(run.trial), "result": asdict(run.result)}
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            yield run


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
                for rate in rates[optimizer]
            ]
    return list(dict.fromkeys(trials))


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


def build_parser(quick: bool = False) -> argparse.ArgumentParser:
    """The command line, with the defaults of `--quick` or without."""
    parser = argparse.ArgumentParser(
        description="Train HyperConv2d with the recipes of nn.Conv2d, over a grid, and report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    option("--out", type=Path, default=OUT, help="folder of the runs and of the report")
    option("--quick", action="store_true", help="a small grid: two minutes with --jobs 2")
    option("--report-only", action="store_true", help="redraw from the stored runs")
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
    option("--seeds", type=positive, default=5, help="how many, from --seed on")
    option("--epochs", type=positive, default=2, help="passes over the training images")
    option("--train", type=positive, default=6000, help="training images")
    option("--test", type=positive, default=3000, help="held-out images")
    option("--batch-size", type=positive, default=64, help="images per step on MNIST")
    option("--steps", type=positive, default=1000, help="of the regression")
    option("--noise-batch-size", type=positive, default=8, help="images per step of the regression")
    add_run_options(parser)
    parser.set_defaults(threads=1, **(QUICK if quick else {}))
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    quick = build_parser().parse_args(argv).quick
    parser = build_parser(quick)
    args = parser.parse_args(argv)
    path = args.out / RUNS
    if not args.report_only and "mnist" in args.tasks and args.mnist is None:
        parser.error("--mnist: expected the folder of MNIST's files, got none; or --tasks regression")
    prepare(args)
    try:
        runs = read_runs(path)
        trials = [] if args.report_only else plan_trials(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    done = {run.trial for run in runs}
    missing = [trial for trial in trials if trial not in done]
    if not args.report_only:
        print(f"{len(trials)} runs, of which {len(trials) - len(missing)} are in {path}")
    if missing:
        bar = tqdm(total=len(missing), unit="run")
        with bar, closing(run_all(missing, args)) as running:
            for run in append_runs(path, running):
                runs.append(run)
                bar.set_postfix_str(f"{run.trial.task}, {run.trial.kind}, k = {run.trial.kernel_size}")
                bar.update()
    if not runs:
        parser.error(f"--report-only: expected runs in {path}, found none; run without it first")
    files = write_report(runs, args.out, quick)
    print(*files, sep="\n")
    return files


def interruptible(argv: Sequence[str] | None = None) -> int:
    """`main`, of which SIGINT and SIGTERM keep the finished runs; the process's exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(interruptible())
