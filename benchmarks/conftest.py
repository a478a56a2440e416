"""Fixtures of the suite, what the JSON says about the run, and the tables at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from . import machine, records, tables
from .ceilings import Ceilings
from .records import Record

_CLOCKS = {"cuda": "Time on the device, cold L2 cache.", "cpu": "Wall-clock time, warm caches."}


@dataclass
class Run:
    """What a run has found out so far."""

    facts: dict[str, str]
    ceilings: Ceilings
    records: list[Record] = field(default_factory=list)


_RUN = pytest.StashKey[Run]()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.device()


@pytest.fixture(scope="session", autouse=True)
def run(pytestconfig: pytest.Config, device: torch.device) -> Iterator[Run]:
    """cuDNN searches for its fastest algorithm; the CPU runs one thread unless OMP_NUM_THREADS is set.

    Threads that wait for each other on a shared machine measure its other users. All else stays as
    PyTorch has it.
    """
    search, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    pytestconfig.stash[_RUN] = Run(machine.describe(), Ceilings(device))
    yield pytestconfig.stash[_RUN]
    torch.backends.cudnn.benchmark = search
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    facts = config.stash[_RUN].facts if _RUN in config.stash else {}
    known = records.machine_facts(machine_info, facts)
    machine_info.clear()
    machine_info.update(known)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if _RUN in config.stash:
        done = config.stash[_RUN]
        failed = [record for record in done.records if record.failure]
        records.clean(output_json, failed, done.ceilings.to_json())


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(_RUN, None)
    if done is None or not done.records:
        return
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    facts = done.facts | {"commit": f"{commit['id'][:12]}{'+' * commit['dirty']}"}
    kind = machine.device().type
    parts = [tables.align(tables.speed(done.records, absolute=True))]
    parts.append(tables.align(tables.memory(done.records, absolute=True)))
    if kind == "cuda":
        parts.append(tables.align(tables.launches(done.records)))
    parts.append(tables.summary(done.records))
    terminalreporter.section("hyperconv_ext against the library")
    for part in parts:
        for line in (*part, ""):
            terminalreporter.write_line(line)
    for line in (
        tables.SPEED,
        tables.MEMORY,
        *([tables.LAUNCHES] if kind == "cuda" else []),
        "Medians; a ratio below 1 is a loss. Baselines ran in both layouts, the faster is shown.",
        _CLOCKS[kind],
        ", ".join(f"{name} {value}" for name, value in facts.items()),
    ):
        terminalreporter.write_line(line)
