"""`examples/train_ddp.py`, started by `torchrun` as a user starts it: killed, resumed, sharded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .test_examples import ROOT, write_part

OPTIONS = ["--device", "cpu", "--threads", "1", "--batch-size", "16", "--save-every", "5"]
LIMIT = 240  # seconds, of a busy machine


def _start(*arguments: str) -> subprocess.Popen[str]:
    """`torchrun` of two processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = "-W ignore -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_ddp.py"
    return subprocess.Popen(
        [sys.executable, *launch.split(), *OPTIONS, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _workers(process: subprocess.Popen[str]) -> list[int]:
    """Those that `torchrun` has started, each in a session of its own."""
    return [
        int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def _finish(process: subprocess.Popen[str]) -> str:
    """What it prints, once it has succeeded."""
    try:
        out, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # which it passes on to those it has started
        process.communicate()
        raise
    assert process.returncode == 0, errors
    return out


def _load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.alone  # several processes that wait for each other
@pytest.mark.slow
def test_goes_on_after_being_killed(tmp_path: Path) -> None:
    """To the same parameters as without, by what is left in the file; here sharded where it was not."""
    write_part(tmp_path, "train", 320)  # 10 steps an epoch
    write_part(tmp_path, "t10k", 40)
    killed, straight = tmp_path / "killed.pt", tmp_path / "straight.pt"
    mnist = ("--mnist", str(tmp_path))
    process = _start(*mnist, "--epochs", "1000", "--checkpoint", str(killed))
    deadline = time.monotonic() + LIMIT
    while not killed.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(_workers(process)[0], signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    steps = _load(killed)["steps"]
    assert steps > 0 and steps % 5 == 0
    epochs = str(steps // 10 + 1)
    resumed = _finish(_start(*mnist, "--fsdp", "--epochs", epochs, "--checkpoint", str(killed)))
    assert f"resumed after {steps} steps" in resumed
    through = _finish(_start(*mnist, "--epochs", epochs, "--checkpoint", str(straight)))
    assert "resumed" not in through
    states = _load(killed), _load(straight)
    assert states[0]["steps"] == states[1]["steps"] == 10 * int(epochs)
    for name, value in states[1]["model"].items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.alone  # several processes that wait for each other
@pytest.mark.slow
def test_sharded_volumes() -> None:
    printed = _finish(_start("--volumes", "512", "--fsdp", "--epochs", "2"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert len(re.findall(r"^  [01]: \d+ examples/s$", printed, re.MULTILINE)) == 4
