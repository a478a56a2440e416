"""The examples, run as a user runs them."""

from __future__ import annotations

import gzip
import importlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch import nn

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


def write_part(folder: Path, part: str, size: int) -> None:
    """Images that tell their label by the period of their stripes."""
    random = np.random.default_rng(size)
    labels = random.integers(0, 2, size, np.uint8)
    stripes = np.arange(SIDE) // (1 + 2 * labels[:, None]) % 2
    noise = random.integers(0, 56, (size, SIDE, SIDE))
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
