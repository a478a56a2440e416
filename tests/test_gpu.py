"""What `make gpu` does, as far as it can be shown without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import conftest as hooks
from benchmarks import gpu, records, report

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("results")
NAMES = ["extension", "gate csrc", "gate triton", "benchmarks", "report"]
CHECKS = ["memcheck", "racecheck", "initcheck"]


def planned(quick: bool) -> list[gpu.Part]:
    return [*gpu.first_parts(OUT), *gpu.parts(OUT, quick, "9.0", "compute-sanitizer")]


def longest(parts: list[gpu.Part]) -> int:
    return sum(part.seconds + gpu.GRACE for part in parts)


def test_order_and_limits() -> None:
    full, quick = planned(False), planned(True)
    assert [part.name for part in quick] == ["environment", *NAMES]
    assert [part.name for part in full] == ["environment", *NAMES, "tests", "host time", *CHECKS]
    assert longest(quick) <= gpu.QUICK_TOTAL < 4 * 60
    assert longest([part for part in full if part.name.startswith("gate")]) <= 2 * 60
    # However slow the others are, the sanitizers begin.
    assert longest(full[: -len(CHECKS)]) + 30 <= gpu.TOTAL < 9 * 60
    assert [part.seconds for part in full[-len(CHECKS) :]] == [120] * 3
    assert len(gpu.RESULTS) <= 8


def test_make_calls_it() -> None:
    for target, rest in (("gpu", "--sanitizer other"), ("gpu-quick", "--quick")):
        command = ["make", "-n", target, "OUT=there", "PYTHON=py", "SANITIZER=other", "COMMIT=abc"]
        # Under `make test` this make is the inner one: it would announce itself.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"COMMIT=abc py -m benchmarks.gpu there {rest}"


def test_the_filter_selects_every_kernel_and_none_of_pytorch() -> None:
    pattern = gpu.KERNELS.removeprefix("regex=")
    names = []
    for path in ROOT.glob("csrc/*.cu"):
        names += re.findall(r"__global__[^(]*\([^)]*\) void (\w+)\(", path.read_text())
    for path in ROOT.glob("hyperconv_ext/backends/triton/kernels/*.py"):
        names += re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    assert len(names) >= 13
    assert all(re.search(pattern, name) for name in names), names
    theirs = ("_ZN2at6native29vectorized_elementwise_kernel", "cutlass_tensorop_s1688fprop_optimized")
    assert not any(re.search(pattern, name) for name in theirs)


def collected(part: gpu.Part) -> list[str]:
    """The tests that a part would run."""
    begin = part.command.index(sys.executable)
    command = [word for word in part.command[begin:] if word not in ("-n", str(gpu.WORKERS))]
    done = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
@pytest.mark.sweep
def test_what_the_parts_run() -> None:
    parts = {part.name: part for part in planned(False)}
    names = ("gate csrc", "gate triton", "tests", "host time", "memcheck", "initcheck")
    csrc, triton, tests, host_time, checked, initialised = (set(collected(parts[n])) for n in names)
    assert len(csrc) > 50 and all("cuda" in name for name in csrc)
    assert len(triton) > 50 and all("triton" in name for name in triton)
    assert len(tests) > 1000 and not tests & (csrc | triton | host_time)
    assert any("test_operators.py" in name and "composite" in name for name in tests)
    assert len(host_time) == 3
    assert 8 <= len(checked) <= 16 and checked < csrc | triton
    # Poisoned memory is initialised.
    assert {name.partition("::")[0] for name in initialised} == {"tests/test_autograd.py"}
    assert len(initialised) == 2
    assert "poisoned" not in (ROOT / "tests" / "test_autograd.py").read_text()


def test_what_the_sanitizers_are_told() -> None:
    checks = {part.name: part for part in planned(False) if part.name in CHECKS}
    for name, part in checks.items():
        assert part.command[0] == "compute-sanitizer"
        assert part.command[part.command.index("--tool") + 1] == name
        assert ("--kernel-name" in part.command) == (name != "initcheck")
        assert part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert checks["racecheck"].command[-3:] == checks["memcheck"].command[-3:]


def test_without_xdist_or_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "installed", lambda package: False)
    parts = {part.name: part for part in planned(False)}
    assert not any("-n" in part.command for part in parts.values())
    assert "--ignore=tests/test_dimensions.py" in parts["tests"].command


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "LEAST", 1)


def _part(name: str, code: str, seconds: int = 20) -> gpu.Part:
    return gpu.Part(name, seconds, (sys.executable, "-c", code))


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(short, tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text("of an earlier session")
    session = gpu.Session(tmp_path, 30)
    assert not (tmp_path / "benchmarks.json").exists()
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert session.run(_part("good", "print('all is well')")) == 0
    assert session.run(_part("bad", "raise SystemExit(3)")) == 3
    assert session.run(_part("stubborn", f"print('begun', flush=True); {stubborn}", 2)) == gpu.TIMED_OUT
    assert session.run(_part("last", "print('still here')")) == 0
    assert time.monotonic() - start < 15
    assert session.status == 3
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [
        ["good", "passed"],
        ["bad", "FAILED"],
        ["stubborn", "CUT"],
        ["last", "passed"],
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "all is well" in log and "begun" in log and "still here" in log
    assert {path.name for path in tmp_path.iterdir()} <= set(gpu.RESULTS)


def test_no_part_begins_without_time(short, tmp_path: Path) -> None:
    now = [0.0]
    session = gpu.Session(tmp_path, 100.0, clock=lambda: now[0])
    now[0] = 99.0
    assert session.run(_part("late", "print('never')")) == gpu.TIMED_OUT == session.status
    assert "not begun" in (tmp_path / "summary.txt").read_text()
    assert not (tmp_path / "log.txt").exists()


def test_an_interrupt_reaches_the_part_before_the_kill(short, tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('tables')"
    assert gpu.Session(tmp_path, 30).run(_part("benchmarks", code, 2)) == gpu.TIMED_OUT
    assert "tables" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_benchmark_loses_one_row(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    arguments = [
        "-m",
        "pytest",
        "benchmarks/test_conv.py",
        "--benchmark-only",
        "-q",
        "-k",
        "tiny and conv",
    ]
    log = (tmp_path / "log.txt").open("w")
    # Not a worker's: pytest-benchmark measures nothing in one.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, *arguments, f"--results={path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=alone)
    try:
        for _ in range(600):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    assert path.exists(), (tmp_path / "log.txt").read_text()
    document = json.loads(path.read_text())
    assert records.load(document) and report.report(document)
    assert document["commit_info"]["id"] and document["machine_info"]["torch"]


def test_benchmarks_end_in_time_by_themselves() -> None:
    arguments = ["-m", "pytest", "benchmarks/test_conv.py", "-q", "-rs", "-k", "tiny", "--seconds=0"]
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "the 0 s of --seconds are over" in done.stdout, done.stdout
    assert "passed" not in done.stdout


def test_the_commit_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "0123abc+")
    monkeypatch.setattr(hooks, "_REPOSITORY", ROOT / "pyproject.toml")
    assert hooks.pytest_benchmark_generate_commit_info() is None
    monkeypatch.setattr(hooks, "_REPOSITORY", tmp_path / ".git")
    told = hooks.pytest_benchmark_generate_commit_info()
    assert told == {"id": "0123abc", "time": None, "dirty": True}
    monkeypatch.delenv("COMMIT")
    assert hooks.pytest_benchmark_generate_commit_info() is None
