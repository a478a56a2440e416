"""What the experiments share: runs and checkpoints, from which a killed one goes on."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .test_examples import ROOT


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the scripts share."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("experiments")


def test_a_run_is_found_by_its_trial(experiments: ModuleType, tmp_path: Path) -> None:
    runs = experiments.Runs(tmp_path)
    runs.add({"kind": "conv", "seed": 0}, {"accuracy": 0.5})
    again = experiments.Runs(tmp_path)
    for stored in (runs, again):
        assert stored.get({"seed": 0, "kind": "conv"}) == {"accuracy": 0.5}
        assert stored.get({"seed": 1, "kind": "conv"}) is None
        assert len(stored) == 1
    assert experiments.Runs(tmp_path / "nothing").get({}) is None


def test_a_line_cut_short_is_replaced(experiments: ModuleType, tmp_path: Path) -> None:
    runs = experiments.Runs(tmp_path)
    for seed in range(3):
        runs.add({"seed": seed}, {"score": seed})
    runs.path.write_bytes(runs.path.read_bytes()[:-9])
    again = experiments.Runs(tmp_path)
    assert [trial["seed"] for trial, _ in again] == [0, 1]
    again.add({"seed": 3}, {"score": 3})
    assert [json.loads(line)["trial"]["seed"] for line in runs.path.read_text().splitlines()] == [
        0,
        1,
        3,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"trial": {"seed": 0, "protocol": 1}, "result": {}}',
            "expected a run of protocol 2, got one of 1",
        ),
        ('{"trial": {"seed": 0}, "result": {}}', "expected a run of protocol 2, got one of None"),
        ('{"trial": {"protocol": 2}}', "expected a run of protocol 2"),
        ("seed 0", "expected a run as JSON"),
    ],
)
def test_a_line_of_another_version_is_named(
    experiments: ModuleType, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"runs.jsonl, line 1: {message}.*remove the line"):
        experiments.Runs(tmp_path, protocol=2)


def parsed(experiments: ModuleType, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    experiments.add_experiment_options(parser, "noise", epochs=8)
    return experiments.parse(parser, options, {"epochs": 1})


def test_quick_sets_what_the_command_line_leaves_open(experiments: ModuleType) -> None:
    results = experiments.RESULTS
    assert (parsed(experiments).epochs, parsed(experiments).out) == (8, results / "noise")
    quick = parsed(experiments, "--quick")
    assert (quick.epochs, quick.out) == (1, results / "noise-quick")
    given = parsed(experiments, "--epochs", "8", "--out", "here", "--quick")
    assert (given.epochs, given.out) == (8, Path("here"))


@pytest.mark.parametrize("falling", [False, True])
def test_training_that_was_killed_goes_on_to_the_same_end(
    experiments: ModuleType, tmp_path: Path, falling: bool
) -> None:
    """With noise and momentum, whose states are part of the checkpoint, at a rate that falls or not."""
    inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(5))
    runs = experiments.Runs(tmp_path)
    kill_at: int | None = None

    def reached(trial: dict[str, Any]) -> tuple[Tensor, list[float]]:
        torch.manual_seed(0)
        network = nn.Linear(3, 1)
        steps = 0

        def loss(batch: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            if steps == kill_at:
                raise KeyboardInterrupt
            return (network(inputs[batch] + torch.randn(3)) - 1).square().mean()

        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        settings = {"batch_size": 4, "epochs": 3, "seed": 0, "falling": falling}
        settings |= {"checkpoint": runs.checkpoint(trial), "label": "test"}
        losses, _ = experiments.train(network, optimizer, loss, 10, **settings)
        # Of the last of nine steps.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 9 if falling else 0.1)
        return network.weight.detach(), losses

    weight, losses = reached({"seed": 0})
    kill_at = 8  # in the third epoch
    with pytest.raises(KeyboardInterrupt):
        reached({"seed": 1})
    kill_at = 4  # it has no more than three steps to do
    again, losses_again = reached({"seed": 1})
    assert torch.equal(again, weight)
    assert losses_again == losses
    assert len(losses) == 3
    runs.add({"seed": 1}, {"losses": losses})
    assert not runs.checkpoint({"seed": 1}).path.exists()
    assert runs.checkpoint({"seed": 0}).path.exists()


def test_a_figure_drawn_again_is_the_same_file(experiments: ModuleType, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")

    def drawn(folder: Path) -> list[bytes]:
        figure = figures.Figure()
        figure.subplots().plot([0, 1], [1, 0])
        return [path.read_bytes() for path in experiments.save_figure(figure, folder, "line")]

    assert drawn(tmp_path / "one") == drawn(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"line.png", "line.svg"}


def test_the_summary_says_what_made_it(experiments: ModuleType, tmp_path: Path) -> None:
    runs = experiments.Runs(tmp_path)
    for seed in range(2):
        runs.add({"seed": seed}, {"seconds": 1800.0})
    path = experiments.write_summary(tmp_path, "# Noise\n\nA table.", "python noise.py")
    title, made, text = path.read_text().strip().split("\n\n")
    assert (title, text) == ("# Noise", "A table.")
    assert made == f"Made by `python noise.py` on {experiments.machine()}; 1.0 hours of computing."
