"""`examples/mnist_noise.py` and `examples/training_speed.py`, on a handful of images."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from .test_examples import ROOT, write_part


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment as a module, with three levels of noise."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("mnist_noise")
    monkeypatch.setattr(module, "LEVELS", (0.0, 0.5, 1.0))
    return module


@pytest.fixture
def report(noise: ModuleType) -> ModuleType:
    """The module that reports it."""
    return importlib.import_module("mnist_noise_report")


def options(folder: Path, *more: str) -> list[str]:
    text = f"--quick --mnist {folder} --out {folder / 'out'} --train 32 --test 16 --noisy 8 --threads 1"
    return [*text.split(), *more]


def test_all_networks_are_trained_measured_and_reported(
    noise: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part(tmp_path, "train", 64, side=24)
    files = noise.main(options(tmp_path))
    assert [path.name for path in files] == ["summary.md", "noise.png", "noise.svg"]
    rows = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    assert [row["trial"]["kind"] for row in rows] == list(noise.KINDS)
    curves = {name: curve for row in rows for name, curve in row["result"]["curves"].items()}
    assert set(curves) == {*noise.KINDS, *noise.SMOOTHED}
    for curve in curves.values():
        for name in noise.NOISES:
            assert len(curve[name]) == len(noise.LEVELS)
            assert all(0 <= accuracy <= 1 for accuracy in curve[name])
    summary = files[0].read_text(encoding="utf-8")
    assert "Quick look" in summary
    assert summary.count("| 1 |") == len(curves)  # a seed each
    assert "no run" not in summary
    assert "`--epochs 1 --train 32 --test 16 --noisy 8 --batch-size 16 --rate 0.001`" in summary
    monkeypatch.setattr(noise, "run_trial", None)  # what is stored is not run again
    assert noise.main(options(tmp_path)) == files
    assert noise.main(["--report-only", "--quick", "--out", str(tmp_path / "out")]) == files


def test_the_norm_of_ordinary_kernels_is_that_of_hyper_convolutions(noise: ModuleType) -> None:
    """Of the same kernels it makes the same ones."""
    torch.manual_seed(0)
    normed, plain = (noise.hyper(4, "reference", norm) for norm in ("batch", None))
    twin = noise.ordinary(4, bias=False, weight_norm=True)
    plain.load_state_dict(normed.state_dict(), strict=False)
    with torch.no_grad():
        twin.parametrizations.weight.original.copy_(plain.weight)
    torch.testing.assert_close(twin.weight, normed.weight)
    assert twin.parametrizations.weight[0].scale.shape == (4, 4, 1, 1)


def test_more_noisy_images_than_there_are_is_refused(
    noise: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        noise.main(options(tmp_path, "--noisy", "17"))
    assert "--noisy: expected at most the 16 held-out images, got 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [((1.0, 0.6, 0.4), 0.75), ((1.0, 0.5, 0.6), 0.5), ((0.9, 0.8, 0.7), None), ((0.4, 0.6, 0.1), 0.0)],
)
def test_half_is_crossed_on_a_straight_line(
    report: ModuleType, accuracies: tuple[float, ...], expected: float | None
) -> None:
    found = report.crossing((0.0, 0.5, 1.0), accuracies)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_networks_are_compared_seed_by_seed(report: ModuleType) -> None:
    def curves(*halves: float) -> dict[int, Any]:
        """By seed; the accuracy falls from 1 to 0 and is a half there."""
        one = [{"salt-and-pepper": [1, 0.5, 0], "gaussian": [1, 0.5 + half, 0]} for half in halves]
        return dict(enumerate(one))

    shuffled = dict(reversed(curves(0.0, 0.25).items()))
    table = report.contrasts_table({"conv": curves(0.0, 0.25), "hyper": shuffled}, (0.0, 0.5, 1.0))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert rows[0][3:] == ["0.000 ± 0.000", "0.000 ± 0.000"]
    assert rows[1][3:] == ["no run", "no run"]


def test_noise_is_what_it_is_called(noise: ModuleType) -> None:
    images = torch.full((4, 1, 100, 100), 0.5)

    def added(name: str, level: float) -> torch.Tensor:
        return noise.NOISES[name](images, level, torch.Generator().manual_seed(0))

    for name in noise.NOISES:
        assert torch.equal(added(name, 0.0), images)
        assert torch.equal(added(name, 0.3), added(name, 0.3))
    peppered = added("salt-and-pepper", 0.3)
    assert (peppered == 1).float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (peppered == 0).float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert added("gaussian", 0.1).std().item() == pytest.approx(0.1, abs=0.002)
    assert (added("gaussian", 1.0).min(), added("gaussian", 1.0).max()) == (0, 1)


def test_smoothing_blurs_kernels_and_tunes_the_norms_again(noise: ModuleType) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].weight.zero_()[0, 0, 2, 2] = 1
        network[0].weight[1] = 3
    before = [parameter.clone() for parameter in network.parameters()]
    images = torch.rand(6, 1, 8, 8)
    smoothed = noise.smooth(network, 1.0, images)
    spike, flat = smoothed[0].weight[:, 0]
    assert torch.allclose(flat, torch.full((5, 5), 3.0))
    assert spike.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spike[2, 3] / spike[2, 2]).item() == pytest.approx(torch.exp(torch.tensor(-0.5)).item())
    mean = smoothed[0](images).mean((0, 2, 3))
    assert torch.allclose(smoothed[1].running_mean, mean, atol=1e-5)
    assert torch.equal(smoothed[2].weight, network[2].weight)
    assert all(map(torch.equal, before, network.parameters()))


@pytest.mark.slow
def test_speed_is_measured_once(
    noise: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = importlib.import_module("training_speed")
    small = tuple(
        (network, settings | {"batch_size": 2, "side": 8}, sizes[:1])
        for network, settings, sizes in speed.MEASURED
    )
    monkeypatch.setattr(speed, "MEASURED", small)
    monkeypatch.setattr(speed, "peak_memory", lambda _, trial: trial["kernel_size"])  # has its own test
    threads = torch.get_num_threads()
    arguments = (
        f"--quick --out {tmp_path} --steps 1 --clock processor --device cpu --threads {threads}".split()
    )
    summary = speed.main(arguments).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    found = [(row["trial"]["network"], row["trial"]["dims"]) for row in rows]
    assert found == [("classifier", 2), ("U-Net", 2), ("U-Net", 3)]
    for row in rows:
        for measured in (row["result"]["seconds_per_step"], row["result"]["peak_memory"]):
            assert set(measured) == set(speed.NETWORKS)
            assert min(measured.values()) > 0
    for size in (speed.KERNEL, speed.KERNELS[0]):
        assert f"| {size} | HyperConv2d, backend 'reference' |" in summary
    assert "| 3 | HyperConv3d, backend 'auto' |" in summary
    monkeypatch.setattr(speed, "run_trial", None)  # what is stored is not run again
    assert speed.main(arguments).read_text(encoding="utf-8") == summary


def test_the_processors_clock_times_a_cpu_alone(
    noise: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments = f"--out {tmp_path} --clock processor --device cuda".split()
        importlib.import_module("training_speed").main(arguments)
    assert "--clock: expected wall on cuda, got processor" in capsys.readouterr().err
