"""`examples/resize.py`, on a handful of images."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import HyperConv2d

from .test_examples import ROOT, write_part


@pytest.fixture
def resize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("resize")


def layers() -> dict[str, nn.Module]:
    """One of each kind, with kernels of 7."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"conv": nn.Conv2d(2, 3, 7, padding="same", bias=False)}
    for name in ("unit", "centered"):
        made[name] = HyperConv2d(2, 3, 7, padding="same", bias=False, num_features=8, coordinates=name)
    return made


def kernel(resize: ModuleType, layer: nn.Module, grid: tuple[int, int]) -> Tensor:
    """W of the layer when it is resized inside of a network, which itself stays as it is."""
    network = nn.Sequential(nn.Sequential(layer), nn.Conv2d(3, 1, 1))
    before = layer.weight.detach().clone()  # type: ignore[operator, union-attr]
    other = resize.resized(network, grid)
    size, dilation = grid
    changed = other[0][0]
    assert changed.kernel_size == (size, size)
    assert changed.dilation == (dilation, dilation)
    assert torch.equal(other[1].weight, network[1].weight)  # no kernel of 7
    assert torch.equal(layer.weight, before)  # type: ignore[arg-type]
    images = torch.zeros(1, 2, 12, 12)
    assert other(images).shape == network(images).shape
    return changed.weight.detach()


@pytest.mark.parametrize("name", ["conv", "unit", "centered"])
def test_the_grid_of_training_changes_nothing(resize: ModuleType, name: str) -> None:
    layer = layers()[name]
    torch.testing.assert_close(kernel(resize, layer, (7, 1)), layer.weight.detach())


@pytest.mark.parametrize(("name", "area"), [("unit", (7 / 4) ** 2), ("centered", 4.0)])
def test_every_second_tap_is_that_of_the_same_function(
    resize: ModuleType, name: str, area: float
) -> None:
    layer = layers()[name]
    every_second = layer.weight.detach()[..., ::2, ::2]
    torch.testing.assert_close(kernel(resize, layer, (4, 2)), area * every_second)


@pytest.mark.parametrize("grid", [(3, 1), (5, 1), (9, 1), (13, 1), (7, 2)])
def test_interpolated_kernels_keep_their_sum(resize: ModuleType, grid: tuple[int, int]) -> None:
    layer: Any = layers()["conv"]
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3, 2, 1, 1).expand_as(layer.weight))
    found = kernel(resize, layer, grid).sum((2, 3))
    torch.testing.assert_close(found, layer.weight.detach().sum((2, 3)))


def test_kernels_follow_the_image(resize: ModuleType) -> None:
    assert [resize.following(scale) for scale in resize.SCALES] == [(5, 1), (7, 1), (11, 1), (13, 1)]
    assert resize.reach((7, 2)) == resize.reach((13, 1)) == 2


@pytest.mark.slow
def test_both_networks_are_scored_with_every_grid(
    resize: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part(tmp_path, "train", 32)
    monkeypatch.setattr(resize, "GRIDS", ((7, 1), (13, 1)))
    monkeypatch.setattr(resize, "SCALES", (1.0, 2.0))
    text = f"--quick --mnist {tmp_path} --out {tmp_path / 'out'} --train 16 --test 8 --device cpu"
    arguments = [*text.split(), "--threads", "1"]
    files = resize.main(arguments)
    assert [path.name for path in files] == ["summary.md", "resize.png", "resize.svg"]
    rows = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    found = [(row["trial"]["task"], row["trial"]["layer"]) for row in rows]
    assert found == [(task, layer) for task in resize.SCORES for layer in resize.LAYERS]
    for row in rows:
        scores = row["result"]["scores"]
        assert list(scores) == ["7", "13"]
        assert all(
            0 <= score <= 1 for grid in scores.values() for pair in grid.values() for score in pair
        )
    summary = files[0].read_text(encoding="utf-8")
    assert summary.count("| 2 times | 13 | 2.00 |") == len(resize.SCORES)
    monkeypatch.setattr(resize, "run_trial", None)  # what is stored is not run again
    assert resize.main(arguments) == files
