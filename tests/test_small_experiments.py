"""The small experiments, on images and settings of seconds."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hyperconv_ext import HyperConv2d

from .test_examples import ROOT, write_idx

SIDE = 28


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports one of the scripts, to compute by one thread."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder of 96 images of bars, upright for the even labels."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 96, np.uint8)
    images = random.integers(0, 40, (96, SIDE, SIDE), np.uint8)
    images[labels % 2 == 0, :, 10:18] += 200
    images[labels % 2 == 1, 10:18, :] += 200
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    return tmp_path


def options(mnist: Path, *more: str) -> list[str]:
    given = f"--mnist {mnist} --out {mnist / 'out'} --train 64 --test 32 --batch-size 32 --epochs 1"
    return [*given.split(), "--seeds", "2", "--device", "cpu", *more]


def test_two_epochs_of_a_killed_run_are_those_of_a_whole_one(
    example: Callable[[str], Any], mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the autoencoder, whose noise has to go on where it was, too."""
    denoise, experiments = example("denoise"), example("experiments")
    more = ("--epochs", "2", "--seeds", "1")
    denoise.main(options(mnist, *more))
    whole = list(experiments.Runs(mnist / "out"))
    (mnist / "out" / "runs.jsonl").unlink()
    save = experiments.Checkpoint.save

    def killed(self: Any, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiments.Checkpoint, "save", killed)
        denoise.main(options(mnist, *more))
    denoise.main(options(mnist, *more))
    assert not list((mnist / "out").glob("*.checkpoint"))
    for (trial, result), (other, expected) in zip(experiments.Runs(mnist / "out"), whole, strict=True):
        assert trial == other
        assert result | {"seconds": 0} == expected | {"seconds": 0}
    monkeypatch.setattr(denoise, "run_trial", None)  # what is finished is not run again
    denoise.main(options(mnist, *more))


@pytest.mark.parametrize(
    ("name", "more", "figures", "runs"),
    [
        (
            "kernels",
            ["--features", "3", "--kernel-size", "5", "--seeds", "1"],
            ["kernels", "smoothness"],
            2,
        ),
        ("lenet", [], ["lenet"], 4),
        ("denoise", [], ["images", "ratios"], 4),
    ],
)
def test_a_run_writes_its_report_and_the_report_is_the_same_again(
    example: Callable[[str], Any],
    mnist: Path,
    name: str,
    more: list[str],
    figures: list[str],
    runs: int,
) -> None:
    script = example(name)
    files = script.main(options(mnist, *more))
    drawn = [f"{figure}.{suffix}" for figure in figures for suffix in ("png", "svg")]
    assert [path.name for path in files] == ["summary.md", *drawn]
    assert len((mnist / "out" / "runs.jsonl").read_text().splitlines()) == runs
    before = [path.read_bytes() for path in files]
    assert script.main(["--report-only", "--out", str(mnist / "out")]) == files
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("name", ["kernels", "lenet", "denoise"])
def test_a_missing_folder_is_named(
    example: Callable[[str], Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example(name)
    for given, message in (
        (["--out", str(tmp_path)], "--mnist: expected the folder of MNIST's files, got none; pass it"),
        (["--out", str(tmp_path), "--report-only"], "--report-only: expected runs in"),
        (["--out", str(tmp_path), "--mnist", str(tmp_path)], "expected a gzipped idx file, found none"),
    ):
        with pytest.raises(SystemExit):
            script.main(given)
        assert message in capsys.readouterr().err


def test_smoothness_of_kernels_that_are_known(example: Callable[[str], Any]) -> None:
    kernels = example("kernels")
    level = kernels.smoothness(torch.ones(2, 3, 7, 7))
    assert level["variation"] == 0 and level["high"] < 0.1
    board = (-1.0) ** torch.arange(7)
    chequered = kernels.smoothness((board[:, None] * board).expand(2, 3, 7, 7))
    assert chequered["variation"] == pytest.approx(2) and chequered["high"] > 0.9
    torch.manual_seed(0)
    noise = kernels.smoothness(torch.randn(64, 64, 7, 7))
    assert noise["variation"] == pytest.approx(2 / torch.pi**0.5, rel=0.01)
    assert noise["high"] == pytest.approx(0.72, abs=0.01)
    assert noise["spectrum"] == pytest.approx([1] * 16, rel=0.05)
    weight = torch.randn(2, 3, 7, 7)
    small, large = kernels.smoothness(1e-3 * weight), kernels.smoothness(weight)
    assert small["spectrum"] == pytest.approx(large["spectrum"])
    assert [small[name] for name in ("variation", "high")] == pytest.approx(
        [large[name] for name in ("variation", "high")]
    )


def test_lenet_is_the_networks_of_both_classes(example: Callable[[str], Any]) -> None:
    lenet = example("lenet")
    images = torch.randn(2, 1, SIDE, SIDE)
    for layer in (nn.Conv2d, HyperConv2d):
        network = lenet.build_network(layer)
        assert network(images).shape == (2, 10)
        assert sum(isinstance(module, layer) for module in network) == 3
    # The original's 61,706 parameters, and where its second convolution leaves out channels fewer.
    assert sum(p.numel() for p in lenet.build_network(nn.Conv2d).parameters()) == 61_706


def test_decibels_of_known_noise(example: Callable[[str], Any]) -> None:
    denoise = example("denoise")
    images = torch.rand(200, 1, SIDE, SIDE)
    noisy = denoise.add_noise(images, 0.1, torch.Generator().manual_seed(0))
    assert denoise.decibels(noisy, images) == pytest.approx(20, abs=0.1)


def test_counts_are_those_of_the_modules(
    example: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = example("parameters")
    layer, twin = HyperConv2d(16, 16, 7, num_features=4), nn.Conv2d(16, 16, 7)
    files = parameters.main(["--out", str(tmp_path)])
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = (
        row
        for row in rows
        if [row[name] for name in ("dims", "kernel_size", "channels", "depthwise", "features")]
        == ["2", "7", "16", "False", "4"]
    )
    assert int(row["hyper"]) == sum(p.numel() for p in layer.parameters())
    assert int(row["ordinary"]) == sum(p.numel() for p in twin.parameters())
    committed = ROOT / "examples" / "results" / "parameters"
    assert files[1].read_bytes() == (committed / "counts.csv").read_bytes()
    monkeypatch.setattr(parameters, "network_count", lambda size: 0)
    with pytest.raises(RuntimeError, match="mend the formula"):
        parameters.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("dims", "channels", "depthwise"), [(1, 8, False), (2, 64, True), (3, 1, False)]
)
def test_the_crossover_is_where_the_modules_cross(
    example: Callable[[str], Any], dims: int, channels: int, depthwise: bool
) -> None:
    parameters = example("parameters")
    size = parameters.crossover(dims, channels, depthwise, 4)
    for k, fewer in ((size, True), (size - 1, False)):
        ordinary, hyper = parameters.measured(parameters.Size(dims, k, channels, depthwise, 4))
        assert (hyper < ordinary) == fewer


def test_a_motif_is_learned(example: Callable[[str], Any], tmp_path: Path) -> None:
    motif = example("motif")
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--seeds", "1"]
    files = motif.main([*arguments, "--sequences", "32", "512", "--epochs", "150"])
    assert [path.name for path in files] == ["summary.md", "motif.png", "motif.svg"]
    results = {
        (trial["kind"], trial["sequences"]): result
        for trial, result in example("experiments").Runs(tmp_path)
    }
    best = motif.best_known(8.0, 1)
    for kind, parameters in (("nn.Conv1d", 32), ("HyperConv1d", 378)):
        found = results[kind, 512]
        assert found["parameters"] == parameters
        assert 0.85 < found["accuracy"] < best + 0.02
        kernel = torch.tensor(found["kernel"])
        shifted = nn.functional.conv1d(kernel[None, None], motif.motif()[None, None], padding=10)
        assert shifted.amax() / kernel.norm() > 0.5  # wherever it is in the kernel
    before = [path.read_bytes() for path in files]
    assert motif.main([*arguments, "--report-only"]) == files
    assert [path.read_bytes() for path in files] == before


def test_the_motif_lies_in_its_sequence(example: Callable[[str], Any]) -> None:
    """Noise apart, in each once, forward where the label says so."""
    motif = example("motif")
    sequences, labels = motif.make_sequences(64, 1e4, seed=0)
    assert sequences.shape == (64, 1, motif.LENGTH) and 0 < labels.mean() < 1
    answers = nn.functional.conv1d(sequences, motif.motif()[None, None]).amax((1, 2)) / 1e4
    assert (answers[labels == 1] - 1).abs().max() < 1e-2
    assert answers[labels == 0].max() < 0.7
