"""What a training step costs: seconds, of several networks in turn, and the peak of the memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from experiments import Trial

WARM_UP = 2  # steps that are not timed
MakeStep = Callable[[Trial], Callable[[], None]]


def seconds_per_step(
    make_step: MakeStep, trials: Mapping[str, Trial], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median of each network's steps, by the names of `trials`.

    All take a step in turn, so that whatever else the machine does meets all of them alike.

    Args:
        make_step: builds a network and returns a step of its training, given the trial.
        trials: of the networks; their `device` says where.
        rounds: how many steps are timed, of each.
        clock: `time.perf_counter`; or on a busy machine, for one thread of a CPU, `time.process_time`,
            which stands still while a process waits for others.
    """
    steps = {name: make_step(trial) for name, trial in trials.items()}
    taken: dict[str, list[float]] = {name: [] for name in trials}
    for count in tqdm(range(WARM_UP + rounds), desc="time", unit="round"):
        for name, step in steps.items():
            start = clock()
            step()
            if trials[name]["device"] != "cpu":
                torch.cuda.synchronize()
            if count >= WARM_UP:
                taken[name].append(clock() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def peak_memory(make_step: MakeStep, trial: Trial) -> int:
    """Bytes that PyTorch's allocator holds at most while a network is built and trained for two steps.

    Parameters, gradients, the optimizer's state, activations and workspaces. The allocator of the CPU
    keeps no peak, but the profiler logs what it holds after each allocation.

    Args:
        make_step: as `seconds_per_step` has it.
        trial: of the network; its `device` says where.
    """
    if trial["device"] != "cpu":
        torch.cuda.reset_peak_memory_stats(trial["device"])
        before = torch.cuda.memory_allocated(trial["device"])
        _two_steps(make_step, trial)
        return torch.cuda.max_memory_allocated(trial["device"]) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        _two_steps(make_step, trial)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def _two_steps(make_step: MakeStep, trial: Trial) -> None:
    """The first makes the optimizer's state, with which the second needs the most."""
    step = make_step(trial)
    step()
    step()
