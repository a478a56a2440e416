"""The example that converts a model of timm, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("timm", "onnxruntime", "huggingface_hub"):
    pytest.importorskip(package)

pytestmark = pytest.mark.models

ROOT = Path(__file__).parents[2]


def test_a_model_is_converted_trained_saved_loaded_and_deployed(tmp_path: Path) -> None:
    arguments = ["--model", "test_resnet", "--steps", "20", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "examples/convert_model.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "9 of 15 convolutions converted; parameters of the model 373k -> 230k" in done.stdout
    (right,) = re.findall(r"^right: ([\d.]+)%", done.stdout, re.MULTILINE)
    assert float(right) > 90 and "onnxruntime: scores differ by at most" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "model.onnx",
    }
