"""The examples, run as a user runs them."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hyperconv_ext import HyperConv2d

ROOT = Path(__file__).parents[1]
TWINS = ("HyperConv2d", "nn.Conv2d")
SIDE = 12


def run_digits(*arguments: str) -> str:
    """What `python examples/digits.py` prints, once it has succeeded; half a minute on an idle core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Threads that wait for each other on busy cores cost minutes; one is as fast on 8x8 images.
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/digits.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(table: str) -> dict[str, float]:
    rows = re.findall(r"^(\S+) +([\d.]+)%", table, re.MULTILINE)
    return {name: float(percent) / 100 for name, percent in rows}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_part(folder: Path, part: str, size: int, side: int = SIDE) -> None:
    """Images that tell their label by the period of their stripes."""
    random = np.random.default_rng(size)
    labels = random.integers(0, 2, size, np.uint8)
    stripes = np.arange(side) // (1 + 2 * labels[:, None]) % 2
    noise = random.integers(0, 56, (size, side, side))
    images = (200 * stripes[:, None] + noise).astype(np.uint8)
    write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
    write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder of four small idx files."""
    write_part(tmp_path, "train", 320)
    write_part(tmp_path, "t10k", 40)
    return tmp_path


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("digits")


@pytest.mark.slow
@pytest.mark.sweep
def test_digits_reach_95_percent() -> None:
    reached = accuracies(run_digits("--device", "cpu"))
    assert set(reached) == set(TWINS)
    assert reached["HyperConv2d"] >= 0.95


@pytest.mark.slow
def test_mnist_files_train_both_twins(mnist: Path) -> None:
    reached = accuracies(run_digits("--mnist", str(mnist), "--epochs", "1", "--batch-size", "8"))
    assert set(reached) == set(TWINS)
    assert min(reached.values()) >= 0.9  # a guess is right half the time


def test_seed_decides_the_parameters(
    digits: ModuleType, mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(network: nn.Module, *_: object) -> float:
        return sum(parameter.detach().double().sum().item() for parameter in network.parameters())

    def fingerprints(seed: int) -> list[float]:
        options = f"--epochs 1 --batch-size 160 --device cpu --seed {seed}".split()
        results = digits.main(["--mnist", str(mnist), *options])
        return [results[name].accuracy for name in TWINS]

    monkeypatch.setattr(digits, "accuracy", fingerprint)
    first = fingerprints(0)
    assert first == fingerprints(0)
    assert set(first).isdisjoint(fingerprints(1))


def not_gzip(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def cut_gzip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def cut_header(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:3]))


def cut_data(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def one_axis_too_many(path: Path) -> None:
    write_idx(path, np.zeros((40, 1, 1, 1), np.uint8))


def one_label_too_few(path: Path) -> None:
    write_idx(path, np.zeros(39, np.uint8))


def label_ten(path: Path) -> None:
    write_idx(path, np.full(40, 10, np.uint8))


IMAGES = "t10k-images-idx3-ubyte.gz"
LABELS = "t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, Path.unlink, "expected a gzipped idx file, found none"),
        (IMAGES, not_gzip, "expected a whole gzip file"),
        (IMAGES, cut_gzip, "expected a whole gzip file"),
        (IMAGES, cut_header, "expected an idx header of 16 bytes, got 3 bytes"),
        (IMAGES, cut_data, "expected 5760 bytes of data for shape [40, 12, 12], got 5759"),
        (IMAGES, one_axis_too_many, "expected the magic number 2051, got 2052"),
        (LABELS, one_axis_too_many, "expected the magic number 2049, got 2052"),
        (LABELS, one_label_too_few, "expected 40 labels, one per image, got 39"),
        (LABELS, label_ten, "expected labels 0 to 9, got 10"),
    ],
)
def test_damaged_idx_file_is_named(
    digits: ModuleType,
    mnist: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(mnist / name)
    with pytest.raises(SystemExit) as exit_info:
        digits.main(["--mnist", str(mnist)])
    assert exit_info.value.code == 2
    assert f"{mnist / name}: {message}" in capsys.readouterr().err


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("learning")


def tiny_grid(folder: Path, out: Path, *more: str) -> list[str]:
    """One cell of each task, on the twelve-pixel images."""
    options = f"--quick --mnist {folder} --out {out} --norms none --optimizers adam --adam-rates 0.01"
    options += " --kernels 3 --features 4 --train 64 --test 32 --epochs 1 --steps 4 --device cpu"
    return [*options.split(), *more]


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_quick_grid_writes_runs_summary_and_figures(learning: ModuleType, mnist: Path) -> None:
    out = mnist / "out"
    files = learning.main(tiny_grid(mnist, out))
    rows = read_rows(out)
    cells = [(row["trial"]["task"], row["trial"]["kind"]) for row in rows]
    assert cells == [(task, kind) for task in ("regression", "mnist") for kind in ("conv", "default")]
    for row in rows:
        assert math.isfinite(row["result"]["score"])
        assert not row["result"]["diverged"]
        assert row["result"]["steps"][-1] == row["trial"]["steps"]
        assert len(row["result"]["steps"]) == len(row["result"]["losses"])
    parts = (("regression", "mnist"), ("rates", "loss"), ("png", "svg"))
    names = [f"{task}-{what}.{suffix}" for task, what, suffix in itertools.product(*parts)]
    assert [path.name for path in files] == ["summary.md", *names]
    assert all(path.stat().st_size > 0 for path in files)
    assert "Quick look" in (out / "summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_run_what_one_runs(learning: ModuleType, mnist: Path) -> None:
    def results(jobs: int) -> dict[str, Any]:
        out = mnist / str(jobs)
        learning.main(tiny_grid(mnist, out, "--tasks", "mnist", "--jobs", str(jobs)))
        return {str(row["trial"]): row["result"] | {"seconds": 0} for row in read_rows(out)}

    assert results(2) == results(1)


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_finished_runs_are_skipped_and_a_cut_line_is_run_again(
    learning: ModuleType, mnist: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    ran: list[Any] = []

    def counted(trial: Any, folder: Path) -> Any:
        ran.append(trial)
        return learning.Result(0.5, None, False, [trial.steps], [1.0], 0.0)

    monkeypatch.setattr(learning, "run_trial", counted)
    monkeypatch.setattr(learning, "write_report", lambda *_: [])
    learning.main(tiny_grid(mnist, mnist, "--seeds", "2"))
    first, ran = list(ran), []
    assert [trial.seed for trial in first] == [0] * 4 + [1] * 4
    path = mnist / "runs.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    learning.main(tiny_grid(mnist, mnist, "--seeds", "2"))
    assert ran == (first[-1:] if cut else [])
    stored = learning.Runs(mnist, learning.PROTOCOL)
    assert [run.trial for run in learning.as_runs(stored)] == first
    learning.main(tiny_grid(mnist, mnist, "--seeds", "3"))
    assert {trial.seed for trial in ran} == ({1, 2} if cut else {2})


def test_interrupt_keeps_what_is_finished(
    learning: ModuleType, mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trial: Any, folder: Path) -> Any:
        if trial.kind != "conv":
            raise KeyboardInterrupt
        return learning.Result(0.5, None, False, [trial.steps], [1.0], 0.0)

    monkeypatch.setattr(learning, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learning.main(tiny_grid(mnist, mnist, "--tasks", "mnist"))
    assert [row["trial"]["kind"] for row in read_rows(mnist)] == ["conv"]


def test_a_line_that_is_no_run_is_named(
    learning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"trial": {"task": "mnist"}, "result": {}}\n')
    with pytest.raises(SystemExit):
        learning.main(["--report-only", "--out", str(tmp_path)])
    assert f"{path}, line 1: expected a run of protocol" in capsys.readouterr().err


def test_a_kernel_beyond_the_image_is_refused(
    learning: ModuleType, mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        learning.main([*tiny_grid(mnist, mnist), "--kernels", "3", "25"])
    assert "--kernels: expected at most 23" in capsys.readouterr().err


def test_kernels_are_cut_to_what_meets_a_pooled_image(learning: ModuleType) -> None:
    trials = importlib.import_module("learning_trials")
    network = trials.build_network(made_up(learning, kind="conv", kernel_size=31).trial, 28)
    kernels = [layer.kernel_size[0] for layer in network if isinstance(layer, nn.Conv2d)]
    assert kernels == [31, 27, 13, 13]


def made_up(learning: ModuleType, score: float = 0.5, diverged: bool = False, **axes: Any) -> Any:
    """A run of MNIST with this score; `axes` are settings of its trial."""
    settings: dict[str, Any] = {"task": "mnist", "kind": "default", "norm": "none", "optimizer": "sgd"}
    settings |= {"kernel_size": 7, "features": None, "rate": 0.1, "seed": 0, "steps": 2, "batch_size": 8}
    settings |= {"train": 16, "test": 8, "data": "", "device": "cpu", "backend": "auto"}
    result = learning.Result(score, None, diverged, [1, 2], [2.3, 2.0], 0.0)
    return learning.Run(learning.Trial(**settings | axes), result)


def summary_of(learning: ModuleType, runs: Sequence[Any], out: Path) -> list[str]:
    """The answers to the four goals for the defaults."""
    learning.write_report(runs, out, False)
    rows = (out / "summary.md").read_text(encoding="utf-8").split("| goal |")[1].split("\n\n")[0]
    return [row.split("|")[2].strip() for row in rows.splitlines()[2:]]


@pytest.mark.parametrize(
    ("low", "high", "diverged", "expected"),
    [
        # The twin reaches 0.8 at rate 0.1 and 0.6 at 0.01.
        (
            0.5,
            0.796,
            False,
            ("met (1 cells)", "met (1 cells)", "missed (0 of 1 cells)", "met (1 cells)"),
        ),
        (0.5, 0.81, False, ("met (1 cells)", "met (1 cells)", "met (1 of 1 cells)", "met (1 cells)")),
        (
            0.81,
            0.7,
            False,
            ("missed (0 of 1 cells)", "met (1 cells)", "met (1 of 1 cells)", "met (1 cells)"),
        ),
        (
            0.7,
            0.79,
            False,
            ("missed (0 of 1 cells)", "missed (0 of 1 cells)", "missed (0 of 1 cells)", "met (1 cells)"),
        ),
        (
            0.9,
            0.1,
            True,
            ("missed (0 of 1 cells)", "met (1 cells)", "met (1 of 1 cells)", "missed (0 of 1 cells)"),
        ),
    ],
)
def test_summary_says_which_goals_are_met(
    learning: ModuleType,
    tmp_path: Path,
    low: float,
    high: float,
    diverged: bool,
    expected: tuple[str, ...],
) -> None:
    runs = [
        made_up(learning, 0.8 + spread, kind="conv", rate=0.1, seed=seed)
        for seed, spread in enumerate((-0.01, 0.01))
    ]
    runs += [made_up(learning, 0.6, kind="conv", rate=0.01, seed=seed) for seed in range(2)]
    runs += [made_up(learning, low, rate=0.01, seed=seed) for seed in range(2)]
    runs += [made_up(learning, high, rate=0.1, seed=seed, diverged=diverged) for seed in range(2)]
    assert tuple(summary_of(learning, runs, tmp_path)) == expected


def test_a_missing_run_leaves_its_goal_open(learning: ModuleType, tmp_path: Path) -> None:
    runs = [made_up(learning, 0.8, kind="conv", rate=0.1), made_up(learning, 0.9, rate=0.01)]
    assert summary_of(learning, runs, tmp_path)[0] == "open (1 of 1 cells without the run)"


def test_settings_that_differ_are_not_compared(learning: ModuleType, tmp_path: Path) -> None:
    runs = [made_up(learning, 0.5, kind=kind, steps=steps) for steps in (2, 4) for kind in KIND_NAMES]
    learning.write_report(runs, tmp_path, False)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").count("## MNIST") == 2
    assert (tmp_path / "mnist-2-rates.png").is_file()


KIND_NAMES = ("conv", "default", "narrow", "wide", "published", "published-norm")


def test_kinds_are_the_twin_the_defaults_and_the_published_forms(learning: ModuleType) -> None:
    assert tuple(learning.KINDS) == KIND_NAMES
    arguments = {name: dict(kind.arguments) for name, kind in learning.KINDS.items()}
    published = {"parametrization": "published"}
    assert arguments == {
        "conv": {},
        "default": {},
        "narrow": {"num_features": 4},
        "wide": {"num_features": 8},
        "published": published,
        "published-norm": published | {"weight_norm": "batch"},
    }
    assert learning.KINDS["conv"].layer is nn.Conv2d
    assert learning.KINDS["default"].layer is HyperConv2d


@pytest.mark.parametrize(
    "options",
    [
        "--epochs 2",
        "--steps 5",
        "--train 65",
        "--test 31",
        "--batch-size 32",
        "--noise-batch-size 4",
        "--adam-rates 0.02",
        "--kernels 5",
        "--features 5",
        "--norms batch",
        "--optimizers sgd",
        "--kinds published",
        "--backend reference",
        "--seed 1",
    ],
)
def test_every_setting_is_part_of_the_key(learning: ModuleType, mnist: Path, options: str) -> None:
    def trials(*more: str) -> set[Any]:
        options = tiny_grid(mnist, mnist, *more)
        return set(
            learning.plan_trials(learning.parse(learning.build_parser(), options, learning.QUICK))
        )

    assert trials()
    assert trials(*options.split()) - trials()


def test_other_images_are_part_of_the_key(learning: ModuleType, mnist: Path) -> None:
    def checksums(folder: Path) -> set[str]:
        options = tiny_grid(folder, mnist)
        trials = learning.plan_trials(learning.parse(learning.build_parser(), options, learning.QUICK))
        return {trial.data for trial in trials if trial.task == "mnist"}

    other = mnist / "other"
    other.mkdir()
    write_part(other, "train", 321)
    assert checksums(mnist).isdisjoint(checksums(other))


def test_least_error_is_that_of_the_truncated_bank(learning: ModuleType) -> None:
    trials = importlib.import_module("learning_trials")
    torch.manual_seed(0)
    bank = torch.tensordot(torch.randn(3, 2, 4), torch.randn(4, 5, 5), 1)
    left, values, right = torch.linalg.svd(bank.flatten(2).flatten(0, 1), full_matrices=False)
    nearest = (left[:, :2] * values[:2]) @ right[:2]
    expected = (nearest - bank.reshape(nearest.shape)).square().sum() / bank.square().sum()
    assert trials.least_error(bank, 2) == pytest.approx(expected.item(), rel=1e-4)
    assert trials.least_error(bank, 4) == pytest.approx(0, abs=1e-9)
    assert trials.least_error(bank, None) == 0


@pytest.mark.parametrize("task", ["mnist", "regression"])
def test_a_run_that_diverges_is_recorded_as_such(learning: ModuleType, mnist: Path, task: str) -> None:
    options = ("--tasks", task, "--optimizers", "sgd", "--sgd-rates", "1e30", "--kinds", "conv")
    options += ("--batch-size", "16")
    learning.main(tiny_grid(mnist, mnist, *options))
    (row,) = read_rows(mnist)
    assert row["result"]["diverged"]
    assert len(row["result"]["losses"]) < row["trial"]["steps"]
    if task == "regression":
        assert row["result"]["score"] is None
