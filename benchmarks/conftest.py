"""Fixtures of the suite, what the JSON says about the run, and the tables at the end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
    left_out: list[Record] = field(default_factory=list)  # `failure` says why
    where: dict[str, Any] | None = None  # machine and commit, in the JSON


_RUN = pytest.StashKey[Run]()
_END = pytest.StashKey[float]()
_CPU_SECONDS = 285  # of a run that is to take five minutes
_REPOSITORY = Path(__file__).resolve().parents[1] / ".git"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "the JSON of --benchmark-json, but written after every row: a run that is killed loses one"
    parser.addoption("--results", type=Path, help=text)
    text = (
        f"start no benchmark later than this after the beginning; on a CPU {_CPU_SECONDS} if not given"
    )
    default = math.inf if machine.device().type == "cuda" else _CPU_SECONDS
    parser.addoption("--seconds", type=float, default=default, help=text)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark looks
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable_gc = True
    config.stash[_END] = time.monotonic() + config.getoption("seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[_END]:
        pytest.skip(f"the {item.config.getoption('seconds'):.0f} s of --seconds are over")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.device()


@pytest.fixture(scope="session", autouse=True)
def run(pytestconfig: pytest.Config, device: torch.device) -> Iterator[Run]:
    """cuDNN searches for its fastest algorithm; all else, threads too, stays as PyTorch has it."""
    search = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    pytestconfig.stash[_RUN] = Run(machine.describe(), Ceilings(device))
    yield pytestconfig.stash[_RUN]
    torch.backends.cudnn.benchmark = search


@pytest.fixture(autouse=True)
def written(pytestconfig: pytest.Config, run: Run) -> Iterator[None]:
    """Writes `--results` anew if the test has a record to add."""
    known = len(run.records)
    yield
    path = pytestconfig.getoption("results")
    if path is None or len(run.records) == known:
        return
    session, hook = pytestconfig._benchmarksession, pytestconfig.hook  # type: ignore[attr-defined]
    if run.where is None:
        commit = hook.pytest_benchmark_generate_commit_info(config=pytestconfig)
        run.where = {"machine_info": session.get_machine_info(), "commit_info": commit}
    arguments = {"config": pytestconfig, "benchmarks": session.benchmarks}
    document = hook.pytest_benchmark_generate_json(**arguments, include_data=False, **run.where)
    hook.pytest_benchmark_update_json(**arguments, output_json=document)
    whole = path.with_name(f"{path.name}.part")
    whole.write_text(json.dumps(document))
    whole.replace(path)


def pytest_benchmark_generate_commit_info() -> dict[str, Any] | None:
    """What COMMIT says where there is no repository to ask; a `+` at its end stands for changes."""
    commit = os.environ.get("COMMIT")
    if not commit or _REPOSITORY.exists():
        return None
    return {"id": commit.rstrip("+"), "time": None, "dirty": commit.endswith("+")}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    facts = config.stash[_RUN].facts if _RUN in config.stash else {}
    known = records.machine_facts(machine_info, facts)
    machine_info.clear()
    machine_info.update(known)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if _RUN in config.stash:
        done = config.stash[_RUN]
        failed = [record for record in done.records if record.failure]
        records.clean(output_json, failed, done.left_out, done.ceilings.to_json())


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(_RUN, None)
    if done is None or not done.records:
        return
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    facts = done.facts | {"commit": f"{commit['id'][:12]}{'+' * commit['dirty']}"}
    kind = machine.device().type
    parts = [tables.align(tables.speed(done.records)), tables.align(tables.memory(done.records))]
    if kind == "cuda":
        parts.append(tables.align(tables.launches(done.records)))
    else:
        ceilings = done.ceilings.to_json()["flops_per_second"]
        parts.append(tables.align(tables.rates(done.records, ceilings)))
    parts.append(tables.summary(done.records))
    for caption, table in tables.headline(done.records):
        parts.append([caption, *tables.align(table, labels=1)])
    terminalreporter.section("hyperconv_ext against the library")
    for part in parts:
        for line in (*part, ""):
            terminalreporter.write_line(line)
    for line in (
        tables.SPEED,
        tables.MEMORY,
        tables.LAUNCHES if kind == "cuda" else tables.RATES,
        "Medians; a ratio below 1 is a loss. Baselines ran in both layouts, the faster is shown.",
        _CLOCKS[kind],
        ", ".join(f"{name} {value}" for name, value in facts.items()),
    ):
        terminalreporter.write_line(line)
