"""The machine that is measured, and the memory it uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

from hyperconv_ext import __version__, backends
from hyperconv_ext.backends.cpu import library
from hyperconv_ext.report import environment

_GPU_FIELDS = ("driver_version", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit")


def device() -> torch.device:
    """Where everything runs: the current GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def why_no_compiler(device: torch.device) -> str:
    """Why `torch.compile` cannot work for `device`, or ''."""
    name = os.environ.get("CXX", "g++")
    if device.type != "cpu" or shutil.which(name):
        return ""
    return f"torch.compile needs a C++ compiler, and there is no {name}; install one or set CXX"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe() -> dict[str, str]:
    """Versions, and the device with what its driver tells about it."""
    facts = {
        "hyperconv_ext": __version__,
        "torch": torch.__version__,
        "triton": backends.BACKENDS["triton"].installed() or "not installed",
    }
    place = device()
    if place.type != "cuda":
        threads, instructions = str(torch.get_num_threads()), library.capability() or "none"
        return facts | {"device": "cpu", "threads": threads, "instructions": instructions}
    properties = torch.cuda.get_device_properties(place)
    facts |= {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "fp32": "TF32" if backends.tf32_allowed() else "IEEE",
    }
    return facts | _driver_facts(str(properties.uuid))


def _driver_facts(uuid: str) -> dict[str, str]:
    """Driver version, clocks and power limit; empty where `nvidia-smi` cannot tell them."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader"]
    command.append(f"--query-gpu={','.join(_GPU_FIELDS)}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.stdout.split(",")]
    return dict(zip(_GPU_FIELDS, values, strict=True)) if len(values) == len(_GPU_FIELDS) else {}


def peak_memory(target: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at most during `target`, above what it held before."""
    if device.type != "cuda":
        return _peak_cpu_memory(target)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    target()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu_memory(target: Callable[[], object]) -> int:
    """The CPU allocator keeps no peak, but the profiler logs each allocation, oneDNN's included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        # Kept until the log ends, as on a GPU: freeing it is not part of the work.
        result = target()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del result
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["args"]["Ev Idx"])
    return max(accumulate((change["args"]["Bytes"] for change in changes), initial=0))


if __name__ == "__main__":
    facts = describe() | {"commit": os.environ.get("COMMIT", "unknown")}
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2) + "\n")
    print(environment())
