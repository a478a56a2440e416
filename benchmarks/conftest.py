"""Fixtures of the suites, what the JSON says about the machine, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import machine, report

_BOARD = pytest.StashKey[list[report.Record]]()
_FACTS = pytest.StashKey[dict[str, str]]()
_CLOCKS = {"cuda": "Time on the device, cold L2 cache.", "cpu": "Wall-clock time, warm caches."}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.device()


@pytest.fixture(scope="session")
def board(pytestconfig: pytest.Config) -> list[report.Record]:
    """Where benchmarks put their results for the table."""
    return pytestconfig.stash.setdefault(_BOARD, [])


@pytest.fixture(scope="session", autouse=True)
def settings(pytestconfig: pytest.Config, device: torch.device) -> Iterator[None]:
    """cuDNN searches for its fastest algorithm; the CPU runs one thread unless OMP_NUM_THREADS is set.

    Threads that wait for each other on a shared machine measure its other users. All else stays as
    PyTorch has it.
    """
    search, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    pytestconfig.stash[_FACTS] = machine.describe()
    yield
    torch.backends.cudnn.benchmark = search
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    facts: dict[str, str] = config.stash.get(_FACTS, {})
    machine_info.update(facts)


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = config.stash.get(_BOARD, [])
    if not records:
        return
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    facts = config.stash[_FACTS] | {"commit": f"{commit['id'][:12]}{'+' * commit['dirty']}"}
    lines = [
        *report.table(records),
        "",
        *report.summary(records),
        "",
        "Medians; a ratio below 1 is a loss. Memory: the allocator's peak above inputs and parameters.",
        "Baselines ran in both layouts, the faster is shown. " + _CLOCKS[machine.device().type],
        ", ".join(f"{name} {value}" for name, value in facts.items()),
    ]
    terminalreporter.section("hyperconv_ext against the library")
    for line in lines:
        terminalreporter.write_line(line)
