"""Build csrc/ for the CPU: its kernels compiled by g++ and executed by the runtime of tests/host.

As a program: build the variants named (`plain` if none) and print where the libraries are.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "tests" / "host"
BUILDS = ROOT / "build" / "host"

COMPILER = os.environ.get("CXX", "g++")
# nvcc does not assume that differently typed pointers differ; CUDA's `#pragma unroll` is not g++'s.
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-DHYPERCONV_HOST_RUNTIME",
]
BINDING = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DHYPERCONV_DISPATCH_KEY=CPU",
    '-DHYPERCONV_ARCHITECTURES="host"',
]
VARIANTS = {
    "plain": ["-O2", "-g1"],
    "sanitized": [
        *("-O1", "-g1", "-fno-omit-frame-pointer"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ],
}
JOBS = 2


class BuildError(RuntimeError):
    """What the compiler said."""


def build(variant: str = "plain", sources: Path = ROOT / "csrc") -> Path:
    """The library of the operators in `sources`, for torch.ops.load_library."""
    import torch

    package = Path(torch.__file__).parent
    includes = [package / "include", package / "include/torch/csrc/api/include"]
    flags = [*BINDING, *(flag for path in includes for flag in ("-isystem", str(path)))]
    libraries = [
        f"-L{package / 'lib'}",
        f"-Wl,-rpath,{package / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    files = [path for suffix in ("cu", "cpp") for path in sorted(sources.glob(f"*.{suffix}"))]
    return library(
        "libhyperconv_cuda.so", files, variant, sources, flags, libraries, key=(torch.__version__,)
    )


def library(
    name: str,
    files: Sequence[Path],
    variant: str,
    sources: Path = ROOT / "csrc",
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    key: Iterable[str] = (),
) -> Path:
    """A shared library of `files` and the runtime, built unless it is there already.

    `sources`: the folder of their headers; `key`: what else the result depends on.
    """
    own = [*COMMON, *VARIANTS[variant], *flags]
    compile_flags = [*own, f"-I{RUNTIME}", f"-I{sources}"]
    headers = sorted([*RUNTIME.glob("*.h"), *sources.glob("*.cuh"), *sources.glob("*.h")])
    # Not where the sources are: a copy of them is compiled where it differs.
    common = _digest([COMPILER, *own, *key], headers)
    runtime = [RUNTIME / f"{name}.cpp" for name in ("runtime", "warp", "asynchronous", "warpgroup")]
    compiled = {path: _digest([common], [path]) for path in [*files, *runtime]}
    linked = _digest([*compiled.values(), *libraries], [])
    target = BUILDS / f"{variant}-{linked}" / name
    if target.exists():
        return target
    with _lock():
        if target.exists():
            return target
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(
                pool.map(lambda item: _object(item[0], item[1], compile_flags), compiled.items())
            )
        target.parent.mkdir(exist_ok=True)
        shared = [COMPILER, "-shared", *VARIANTS[variant], *map(str, objects), *libraries]
        _produce(target, shared)
    return target


def preload(variant: str) -> dict[str, str]:
    """Environment in which python can load the libraries of a variant."""
    if variant == "sanitized":
        # libstdc++ too: the sanitizer looks for the functions it replaces when it starts.
        needed = [_library_path(name) for name in ("libasan.so", "libstdc++.so.6")]
        return {
            "LD_PRELOAD": " ".join(needed),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return {}


def _library_path(name: str) -> str:
    command = [COMPILER, f"-print-file-name={name}"]
    return str(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()))


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(list(words)).encode())
    for path in files:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _object(source: Path, digest: str, flags: Sequence[str]) -> Path:
    """The compiled `source`: from an earlier build where nothing that it depends on has changed."""
    target = BUILDS / "objects" / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        _produce(target, [COMPILER, *flags, "-x", "c++", "-c", str(source)])
    return target


def _produce(target: Path, command: Sequence[str]) -> None:
    """Run `command` with an output file that becomes `target` only when it is whole."""
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        output = folder / target.name
        run = subprocess.run([*command, "-o", output], capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise BuildError(f"{' '.join(command)} failed:\n{run.stderr}")
        output.replace(target)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _lock() -> Iterator[None]:
    """One build at a time, over all processes."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str]) -> int:
    try:
        for variant in arguments or ["plain"]:
            print(build(variant))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
