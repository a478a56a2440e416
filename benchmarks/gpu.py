"""`make gpu`: build, test, measure and check on a machine with an NVIDIA GPU, in a lease of minutes.

The parts run in the order of what would be missed most: is it right, is it fast, the rest. Each has a
limit of its own, after which it is interrupted and, five seconds later, killed; all together have one,
too, and what earlier parts leave over is for the last ones. A part that fails, or for which no time is
left, does not stop the next; the first failure is the exit status. Whatever kills this program, what has
been found out until then lies in the folder of results, in few enough files to be fetched from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-work"  # what stays on the machine
RESULTS = ("summary.txt", "log.txt", "machine.json", "benchmarks.json", "report.md", "report.tar.gz")
TOTAL, QUICK_TOTAL = 535.0, 235.0  # seconds
GRACE = 5  # seconds between the interrupt and the kill
LEAST = 5  # seconds that are worth starting a part for
WORKERS = 8
TIMED_OUT = 124  # of coreutils' timeout
# Test files that need no GPU: compilers, the host's runtime, processes of their own.
ELSEWHERE = ("triton_aot", "cuda_aot", "build", "host_runtime", "cuda_proof", "examples", "gpu")
# Test files that cannot even be collected without a package.
NEEDS = {"hypothesis": ("dimensions", "geometry", "lattice")}
# The library's kernels, in csrc/ and of Triton, by their mangled names; PyTorch's are as they are.
KERNELS = "regex=(basis|direct|prepare|mlp|coefficient|joint)[a-z0-9_]*kernel"
_GATE = ("operators", "hyper_operator", "cuda_wgmma", "cuda_joint")
GATE = tuple(f"tests/test_{name}.py" for name in _GATE)


@dataclass(frozen=True)
class Part:
    """A command and the seconds it may take."""

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _pytest(*arguments: str, workers: int = 0) -> tuple[str, ...]:
    """Without pytest-xdist, which is what knows `-n`, one process must do."""
    parallel = ("-n", str(workers)) if workers and installed("xdist") else ()
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *arguments)


def first_parts(out: Path) -> list[Part]:
    """What must be known before the others can be planned."""
    command = (sys.executable, "-m", "benchmarks.machine", str(out / "machine.json"))
    return [Part("environment", 20, command)]


def parts(out: Path, quick: bool, capability: str, sanitizer: str) -> list[Part]:
    """The rest, in order. `capability`: of the GPU, '' if there is none (then nvcc's default)."""
    architecture = "9.0a" if capability == "9.0" else capability  # with wgmma
    build = {
        "HYPERCONV_BUILD_CUDA": "1",
        "HYPERCONV_BUILD_CPU": "0",
        "TORCH_CUDA_ARCH_LIST": architecture,
    }
    rows, report = str(out / "benchmarks.json"), str(WORK / "report")
    # Ends by itself, unless a row takes as long as all the others.
    limit = 45 if quick else 110
    options = ("--benchmark-only", "--benchmark-quiet", f"--results={rows}", f"--seconds={limit - 20}")
    measured = ("benchmarks/test_conv.py", *options, "-k", "bf16 and n4")
    found = [
        Part(
            "extension",
            65 if quick else 80,
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            build,
        ),
        # The kernels of csrc/ are there already; Triton compiles its own, which takes several processes.
        Part("gate csrc", 25 if quick else 40, _pytest(*GATE, "-k", "cuda")),
        Part("gate triton", 40 if quick else 70, _pytest(*GATE, "-k", "triton", workers=WORKERS)),
        # Decisive rows come first in it.
        Part("benchmarks", limit, _pytest(*measured)),
        Part("report", 10, (sys.executable, "-m", "benchmarks.report", rows, "--output", report)),
    ]
    if quick:
        return found
    missing = [name for package, names in NEEDS.items() if not installed(package) for name in names]
    ignored = [f"--ignore=tests/test_{name}.py" for name in (*ELSEWHERE, *missing)]
    # Not the gate once more, and the host's time alone: seven busy neighbours would be measured, too.
    gate = " or ".join(Path(name).stem for name in GATE)
    others = f"not host_time and not (({gate}) and (cuda or triton))"
    alone = ("tests/test_launches.py", "-k", "host_time")
    # The allocator hands out parts of large blocks, within which no access is out of bounds, and memory
    # that earlier tensors initialised. Triton's compilers are processes that need no sanitizer.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = (sanitizer, "--error-exitcode", "1", "--target-processes", "application-only")
    filtered = (*check, "--kernel-name", KERNELS)
    small = _pytest("-x", GATE[0], "-k", "(triton or cuda) and (3x3 or aligned) and geometries")
    # Initialised is what a checked kernel wrote: PyTorch's must be checked as well. Nor may the test
    # poison its memory, which initialises it.
    gradients = _pytest("-x", "tests/test_autograd.py", "-k", "third and (triton or cuda)")
    return [
        *found,
        Part("tests", 90, _pytest("tests", *ignored, "-k", others, "--durations=10", workers=WORKERS)),
        Part("host time", 25, _pytest(*alone)),
        Part("memcheck", 120, (*filtered, "--tool", "memcheck", *small), uncached),
        Part("racecheck", 120, (*filtered, "--tool", "racecheck", *small), uncached),
        Part("initcheck", 120, (*check, "--tool", "initcheck", *gradients), uncached),
    ]


@dataclass
class Session:
    """Runs parts; `out` has the log and the summary at any time."""

    out: Path
    seconds: float
    clock: Callable[[], float] = time.monotonic
    rows: list[str] = field(default_factory=list)
    status: int = 0

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:  # of an earlier session
            (self.out / name).unlink(missing_ok=True)
        self._end = self.clock() + self.seconds

    def run(self, part: Part) -> int:
        """The exit status of a part, TIMED_OUT if it was cut or not even begun."""
        start = self.clock()
        limit = min(part.seconds, int(self._end - start) - GRACE)
        if limit < LEAST:
            self._record(part, TIMED_OUT, "not begun: no time was left")
            return TIMED_OUT
        print(f"== {part.name}, {limit} s: {shlex.join(part.command)}", flush=True)
        log = self.out / "log.txt"
        with log.open("ab") as file:
            file.write(f"\n== {part.name}\n".encode())
            file.flush()
            begin = file.tell()
            code = self._call(part, limit, file.fileno())
        with log.open("rb") as file:
            file.seek(begin)
            lines = file.read().decode(errors="replace").strip().splitlines() or [""]
        print("\n".join(lines[-12:]), flush=True)
        said = f"{self.clock() - start:.0f} of {limit} s: {lines[-1].strip(' =')[:160]}"
        self._record(part, code, said)
        return code

    def _call(self, part: Part, limit: int, log: int) -> int:
        """Output goes straight to the log: a pipe would be kept open by what outlives the part."""
        guard = ("timeout", "-s", "INT", "-k", str(GRACE), str(limit))
        shared = {"TRITON_CACHE_DIR": str(WORK / "triton"), "PYTHONUNBUFFERED": "1"}
        environment = os.environ | shared | part.environment
        process = subprocess.Popen(
            [*guard, *part.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            code = process.wait(limit + 2 * GRACE)
        except subprocess.TimeoutExpired:  # the driver keeps it: it cannot be killed
            return TIMED_OUT
        return TIMED_OUT if code in (-9, 137) else code

    def _record(self, part: Part, code: int, said: str) -> None:
        outcome = {0: "passed", TIMED_OUT: "CUT"}.get(code, f"FAILED {code}")
        self.rows.append(f"{part.name:12} {outcome:9} {said}")
        self.status = self.status or code
        (self.out / "summary.txt").write_text("\n".join([*self.rows, ""]))


def _pack(out: Path) -> None:
    """The report with its plots, in one file."""
    folder = WORK / "report"
    if not (folder / "report.md").exists():
        return
    (out / "report.md").write_text((folder / "report.md").read_text())
    with tarfile.open(out / "report.tar.gz", "w:gz") as archive:
        archive.add(folder, "report")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="within four minutes")
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "report" / "report.md").unlink(missing_ok=True)
    session = Session(out, QUICK_TOTAL if options.quick else TOTAL)
    for package in ("xdist", "pytest_benchmark", *NEEDS):
        if not installed(package):
            session.rows.append(f"{package} is not installed: what needs it is left out, or fails")
    for part in first_parts(out):
        session.run(part)
    try:
        capability = json.loads((out / "machine.json").read_text()).get("capability", "")
    except (OSError, ValueError):
        capability = ""
    for part in parts(out, options.quick, capability, options.sanitizer):
        session.run(part)
        if part.name == "report":
            _pack(out)
    print("\n".join(session.rows))
    return session.status


if __name__ == "__main__":
    sys.exit(main())
