"""The experiments on synthetic lesions: their data, network and reports, on a few small images."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from .test_examples import ROOT

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """What makes a module of an example, given its name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture
def segmentation(load: Load) -> ModuleType:
    """The task."""
    return load("segmentation")


def tiny(out: Path) -> list[str]:
    """A step of training for each network."""
    options = f"--quick --out {out} --train 4 --test 4 --device cpu"
    return options.split()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("dims", [2, 3])
def test_lesions_are_normalised_marked_and_repeated_by_their_seed(
    segmentation: ModuleType, dims: int
) -> None:
    found = segmentation.make_lesions(3, 16, dims, 5)
    assert found.images.shape == found.masks.shape == (3, 1, *[16] * dims)
    for image, mask in zip(found.images, found.masks, strict=True):
        torch.testing.assert_close(image.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(image.std(), torch.tensor(1.0))
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert image[mask == 1].mean() > image[mask == 0].mean()  # what is added is bright
    again, other = (segmentation.make_lesions(3, 16, dims, seed) for seed in (5, 6))
    assert torch.equal(found.images, again.images)
    assert not torch.equal(found.images, other.images)


def test_soft_dice_is_nothing_where_all_is_right_and_near_one_where_all_is_wrong(
    segmentation: ModuleType,
) -> None:
    masks = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    right = 200 * (masks - 0.5)
    torch.testing.assert_close(segmentation.soft_dice_loss(right, masks), torch.tensor(0.0))
    assert segmentation.soft_dice_loss(-right, masks) > 0.95


def test_dice_is_that_of_the_sets(segmentation: ModuleType) -> None:
    images = torch.tensor([[1.0, 1, -1, -1], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    masks = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    # 2 * 1 / (2 + 2), and 1
    score = segmentation.dice(nn.Identity(), segmentation.Lesions(images, masks))
    assert score == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["conv", "hyper", "published", "both"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_network_gives_logits_of_the_images_size(
    segmentation: ModuleType, kind: str, dims: int
) -> None:
    trial = {"dims": dims, "kind": kind, "kernel_size": 5, "features": 4, "backend": "auto"}
    images = torch.randn(2, 1, *[8] * dims)
    assert segmentation.UNet(trial)(images).shape == images.shape


def test_a_network_can_find_a_lesion_whatever_its_seed(segmentation: ModuleType) -> None:
    trial = {"dims": 2, "kind": "both", "kernel_size": 3, "features": 4, "backend": "auto"}
    for seed in range(20):
        torch.manual_seed(seed)
        assert segmentation.UNet(trial).head.weight.max() > 0


@pytest.mark.slow
def test_lesions_writes_its_grid_and_goes_on(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesions = load("lesions")
    monkeypatch.setattr(lesions, "KERNELS", (3,))
    monkeypatch.setattr(lesions, "FEATURES", (lesions.VOLUME_FEATURES,))
    arguments = [*tiny(tmp_path), "--volumes", "2", "--side", "16"]
    files = lesions.main(arguments)
    assert [path.name for path in files] == [
        "summary.md",
        "scores.png",
        "scores.svg",
        "task.png",
        "task.svg",
    ]
    trained = rows(tmp_path)
    kinds = [(row["trial"]["dims"], row["trial"]["kind"]) for row in trained]
    assert kinds == [(2, "conv"), (2, "hyper"), (2, "published"), (3, "conv"), (3, "hyper")]
    assert all(0 <= row["result"]["dice"] <= 1 for row in trained)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained[:-1]))
    lesions.main(arguments)
    again = rows(tmp_path)
    assert again[:-1] == trained[:-1]
    assert again[-1]["result"]["dice"] == trained[-1]["result"]["dice"]


def test_a_side_that_cannot_be_halved_is_refused(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in (18, 12):  # no multiple of 4; 3 pixels in the end, too few for 7 taps
        with pytest.raises(SystemExit):
            load("lesions").main([*tiny(tmp_path), "--side", str(side)])
        expected = f"--side: expected a multiple of 4, for kernels of 7 at least 16, got {side}"
        assert expected in capsys.readouterr().err


def test_costs_are_measured_in_turn_and_at_their_peak(load: Load) -> None:
    cost = load("training_cost")
    order: list[int] = []

    def make_step(trial: dict[str, Any]) -> Any:
        held = torch.empty(trial["size"])

        def step() -> None:
            order.append(trial["size"])
            torch.empty(2 * held.numel()).fill_(0)

        return step

    trials = {str(size): {"size": size, "device": "cpu"} for size in (2**16, 2**18)}
    found = cost.seconds_per_step(make_step, trials, 2, itertools.count().__next__)
    assert set(found.values()) == {1}
    assert set(found) == set(trials)
    assert order == [2**16, 2**18] * (cost.WARM_UP + 2)
    for trial in trials.values():
        assert cost.peak_memory(make_step, trial) == 3 * 4 * trial["size"]


@pytest.mark.slow
def test_large_kernels_measures_trains_and_draws(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = load("large_kernels")
    monkeypatch.setitem(large.BATCH_SIZES, "lesions", 2)
    monkeypatch.setitem(large.SIDES, "lesions", 16)
    files = large.main([*tiny(tmp_path), "--tasks", "lesions", "--kernels", "3", "7"])
    assert [path.name for path in files] == ["summary.md", "lesions.png", "lesions.svg"]
    measured, *trained = rows(tmp_path)
    memory = measured["result"]["peak_memory"]
    assert memory["conv-7"] > memory["conv-3"]
    counts = {
        (row["trial"]["kind"], row["trial"]["kernel_size"]): row["result"]["parameters"]
        for row in trained
    }
    assert counts["hyper", 3] == counts["hyper", 7]
    assert counts["conv", 3] < counts["conv", 7]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f"{counts['conv', 7]:,}" in summary


def test_digits_need_their_files(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("large_kernels").main(tiny(tmp_path))
    assert "--mnist: expected the folder of MNIST's files" in capsys.readouterr().err
