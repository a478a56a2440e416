"""What experiments share: options, runs and checkpoints to go on from, training, figures, summaries."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import add_run_options, positive, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
# Colours that the colour-blind tell apart (Okabe and Ito, 2008); the first is nn.Conv2d's everywhere.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
ORDINARY, HYPER = PALETTE[:2]
STYLE: Any = {
    "svg.hashsalt": "hyperconv_ext",
    "svg.fonttype": "none",
    "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
}


def add_experiment_options(
    parser: argparse.ArgumentParser, name: str, epochs: int, seeds: int = 5
) -> None:
    """The options of every run, and those of an experiment; `parse` makes the namespace.

    Args:
        name: of the experiment: its folder in `results`.
        epochs, seeds: the defaults.
    """
    option = parser.add_argument
    option("--epochs", type=positive, default=epochs, help="passes over the training examples")
    option("--seeds", type=positive, default=seeds, help="how many, from --seed on")
    add_report_options(parser, name)
    add_run_options(parser)


def add_report_options(parser: argparse.ArgumentParser, name: str) -> None:
    """`--out`, by default the folder `name` in `results`, `--quick` and `--report-only`; see `parse`."""
    option = parser.add_argument
    option("--out", type=Path, default=RESULTS / name, help="folder of the runs and of the report")
    option("--quick", action="store_true", help="a first look in two minutes, in a folder NAME-quick")
    option("--report-only", action="store_true", help="redraw from the stored runs")


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    quick: Mapping[str, Any] = MappingProxyType({}),
) -> argparse.Namespace:
    """The command line; with `--quick` what it leaves open is as `quick` says, and so is the folder."""
    if parser.parse_args(argv).quick:
        out = parser.get_default("out")
        parser.set_defaults(out=out.with_name(f"{out.name}-quick"), **quick)
    return parser.parse_args(argv)


def interruptible(main: Callable[[], object]) -> int:
    """`main()`, of which SIGINT and SIGTERM keep the finished runs; the process's exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there")
        return 130
    return 0


def machine() -> str:
    """What computes here: CPU, threads, PyTorch; and the GPU, if there is one."""
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        lines = (line.partition(":") for line in facts.read_text().splitlines())
        cpu = next((value.strip() for name, _, value in lines if name.strip() == "model name"), cpu)
    threads = torch.get_num_threads()
    parts = [cpu, f"{threads} thread{'s' * (threads > 1)}", f"torch {torch.__version__}"]
    return ", ".join(parts + ([torch.cuda.get_device_name()] if torch.cuda.is_available() else []))


def _key(trial: Mapping[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, what it holds); a last line that was cut short is none."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a run as JSON, got {error}; remove the line"
            ) from error
        yield number, row


class Runs:
    """Finished runs in FOLDER/runs.jsonl, a line each: trial, result and the machine it ran on.

    A trial is all that decides a result, as JSON; `protocol` is added to it.

    Args:
        folder: made when a run is added.
        protocol: of the script: counts up when the same settings would give other results.

    Raises:
        ValueError: a line is no run of this protocol.
    """

    def __init__(self, folder: Path, protocol: int = 1) -> None:
        self.path = folder / "runs.jsonl"
        self._protocol = {"protocol": protocol}
        self._found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for number, row in _rows(self.path):
            trial, result = row.get("trial", {}), row.get("result")
            if trial.get("protocol") != protocol or result is None:
                raise ValueError(
                    f"{self.path}, line {number}: expected a run of protocol {protocol}, got one of "
                    f"{trial.get('protocol')}; remove the line, or pass another --out"
                )
            self._found[_key(trial)] = trial, result

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(trial, result) in the order in which they were added."""
        return iter(list(self._found.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._found)

    def get(self, trial: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result, or None if it is still to be computed."""
        found = self._found.get(_key({**trial, **self._protocol}))
        return found and found[1]

    def add(self, trial: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Store a run at once, in the place of a last line that was cut short; its checkpoint goes."""
        stored = {**trial, **self._protocol}
        row = {"trial": stored, "result": dict(result), "machine": machine()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._found[_key(stored)] = stored, dict(result)
        self.checkpoint(trial).path.unlink(missing_ok=True)

    def checkpoint(self, trial: Mapping[str, Any]) -> Checkpoint:
        """Where a run of this trial keeps what it has reached."""
        name = hashlib.sha256(_key({**trial, **self._protocol}).encode()).hexdigest()[:16]
        return Checkpoint(self.path.with_name(f"{name}.checkpoint"))


class Checkpoint:
    """The state of a run that is not finished, in a file: there is always a whole one, or none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU."""
        if not self.path.is_file():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state`: tensors, numbers, lists and dicts of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(dict(state), partial)
        partial.replace(self.path)


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    examples: int,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    checkpoint: Checkpoint,
    label: str,
    falling: bool = False,
) -> tuple[list[float], float]:
    """Minimise `loss`; a run that was killed goes on behind the last epoch it finished.

    Args:
        network: where it computes, as `optimizer` does; set to training.
        loss: the mean loss of some examples, given their indices `[B]`, int64.
        examples: how many there are; each epoch takes all of them in a new order.
        seed: of these orders. What `loss` draws it draws by PyTorch's own generator of the CPU, whose
            state is kept in the checkpoint, too.
        checkpoint: from `Runs.checkpoint`.
        label: of the progress bar.
        falling: the learning rate falls on a straight line, to 0 after the last step.

    Returns:
        The mean loss of each epoch, and the seconds they took.
    """
    rates = [group["lr"] for group in optimizer.param_groups]  # before a checkpoint brings others
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    seconds = 0.0
    if (state := checkpoint.load()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        losses, seconds = state["losses"], state["seconds"]
    device = next(network.parameters()).device
    steps = -(-examples // batch_size)
    bar = tqdm(desc=label, total=epochs * steps, initial=len(losses) * steps, unit="step")
    with bar:
        for epoch in range(len(losses), epochs):
            start = time.perf_counter()
            network.train()
            total = torch.zeros((), device=device)
            batches = torch.randperm(examples, generator=order).to(device).split(batch_size)
            for step, batch in enumerate(batches, epoch * steps):
                if falling:
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * (1 - step / (epochs * steps))
                value = loss(batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.detach() * len(batch)
                bar.update()
            losses.append(float(total) / examples)  # waits for a GPU
            seconds += time.perf_counter() - start
            checkpoint.save(
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "order": order.get_state(),
                    "random": torch.get_rng_state(),
                    "losses": losses,
                    "seconds": seconds,
                }
            )
    return losses, seconds


def train_by_adam(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    trial: Trial,
    checkpoint: Checkpoint,
    label: str,
) -> tuple[list[float], float]:
    """`train` by Adam; the trial has rate, train, batch_size, epochs, seed; decay, falling if not 0."""
    decay = trial.get("decay", 0.0)
    return train(
        network,
        torch.optim.Adam(network.parameters(), lr=trial["rate"], weight_decay=decay),
        loss,
        trial["train"],
        batch_size=trial["batch_size"],
        epochs=trial["epochs"],
        seed=trial["seed"],
        checkpoint=checkpoint,
        label=label,
        falling=trial.get("falling", False),
    )


@torch.no_grad()
def retake_averages(network: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """`network`, the averages of its BatchNorm2d taken again, over the batches alike.

    What is done to kernels after training is to be compared, not a network that is out of tune by it.
    """
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain average over the batches
    network.train()
    for batch in batches:
        network(batch)
    return network


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME.png and NAME.svg, the same bytes when drawn again; their paths. Draw within `STYLE`, too."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    with matplotlib.rc_context(STYLE):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def plot_band(
    axes: Axes, positions: Sequence[float], curves: Sequence[Sequence[float]], **look: Any
) -> None:
    """The mean of curves of the same positions, and a band from the lowest to the highest of them."""
    columns = list(zip(*curves, strict=True))
    (line,) = axes.plot(positions, [fmean(column) for column in columns], **look)
    band = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(positions, *band, color=line.get_color(), alpha=0.2, linewidth=0)


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """`mean ± standard deviation` of the values themselves, for people; the value, if it is one."""
    spread = f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def write_summary(folder: Path, text: str, command: str) -> Path:
    """FOLDER/summary.md: `text`, and after its first line, the title, what made it, where and how long.

    Machines and seconds are those of the runs in FOLDER, of whose results `seconds` are added up.
    """
    rows = [row for _, row in _rows(folder / "runs.jsonl")]
    machines = sorted({row.get("machine", "a machine that was not recorded") for row in rows})
    seconds = sum(row["result"].get("seconds", 0.0) for row in rows)
    spent = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    made = f"Made by `{command}`"
    made += f" on {'; '.join(machines)}; {spent} of computing." if rows else f" on {machine()}."
    title, _, rest = text.partition("\n")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.md"
    path.write_text(f"{title}\n\n{made}\n\n{rest.strip()}\n", encoding="utf-8")
    return path


Trial = Mapping[str, Any]
Plan = tuple[Sequence[Trial], Callable[[Trial, Checkpoint], Mapping[str, Any]]]


def carry_out(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    plan: Callable[[argparse.Namespace], Plan],
    report: Callable[[Runs, Path], list[Path]],
    protocol: int = 1,
) -> list[Path]:
    """An experiment of independent trials: run those that are not stored yet, then report on all.

    Args:
        parser: says what is wrong with the options, and exits.
        args: its namespace, with the options of `add_experiment_options`.
        plan: the trials, and what runs one; not called with `--report-only`.
        report: writes its files for the stored runs into a folder.
        protocol: of the runs.

    Returns:
        The report's files.
    """
    prepare(args)
    try:
        stored = Runs(args.out, protocol)
        planned = None if args.report_only else plan(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if planned is not None:
        trials, run = planned
        for trial in trials:
            if stored.get(trial) is None:
                stored.add(trial, run(trial, stored.checkpoint(trial)))
    if not len(stored):
        parser.error(f"--report-only: expected runs in {stored.path}, found none; run without it first")
    files = report(stored, args.out)
    print(*files, sep="\n")
    return files
