"""Build the engines of hyperconv_ext; everything else is in pyproject.toml.

csrc/cpu/ becomes hyperconv_ext/_cpu.abi3.so: C++ that includes nothing of PyTorch, which therefore need
not be where pip builds. csrc/ becomes hyperconv_ext/_cuda.abi3.so, for every PyTorch from 2.10 on
(LibTorch's stable ABI). Each serves every Python: no Python symbols. The environment decides:

HYPERCONV_BUILD_CPU     auto (default): where a C++ compiler is found and succeeds; 1: always, or fail;
                        0: never
HYPERCONV_BUILD_CUDA    auto (default): where nvcc and PyTorch are found; 1: always, or fail; 0: never
TORCH_CUDA_ARCH_LIST    as in PyTorch, e.g. "8.0;9.0a;10.0+PTX"; what is older than 8.0 is left out
CUDA_HOME, CUDA_PATH    whose bin/nvcc to call; else the one on PATH, else that of /usr/local/cuda
CXX                     the C++ compiler and perhaps its arguments, else c++, g++ or clang++ on PATH; of
                        nvcc the host compiler
MAX_JOBS, NVCC_THREADS  compilers at a time; architectures at a time in each nvcc
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

Commands = dict[tuple[str, str], list[str]]  # by (source, object)

# A NaN must propagate: no -ffast-math.
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CPU_FLAGS += ["-fno-math-errno", "-ffp-contract=fast", "-fno-exceptions"]
# The instructions that csrc/cpu/level.cpp is compiled for, those on x86-64 where that is the machine.
LEVELS = {"kBaseline": []}
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
X86_LEVELS = {
    "kAvx2": ["-mavx2", "-mfma"],
    "kAvx512": AVX512,
    "kAvx512Bf16": [*AVX512, "-mavx512bf16"],
}
# Instructions that not every compiler knows (GCC from 10 on), and how library.cpp hears of their level.
NEWEST, HAS_NEWEST = "kAvx512Bf16", "-DHYPERCONV_AVX512_BF16"
# The C++ library, of which nothing is used, is not asked for when loading.
CPU_LINK_FLAGS = ["-shared", *(["-Wl,-z,defs,--as-needed"] if sys.platform == "linux" else [])]

HOW = "pip install . --no-build-isolation"
DEFAULT_CUDA = "/usr/local/cuda"
# sm_80 code also runs on 8.6 and 8.9, PTX of the newest on all that follow. 9.0a, which has wgmma, is
# not among them until a GPU has run it.
DEFAULT_ARCHITECTURES = ("80", "90", "100")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
CUDA_FLAGS += ["-lineinfo", "-Xfatbin=-compress-all"]  # a sixth of the size that the lines give it
# The CUDA runtime's symbols are hidden, lest those of PyTorch's own runtime, another version, take their
# place. libtorch.so is kept although nothing here asks for it: in a CUDA build of PyTorch it brings in
# libtorch_cuda.so, which has what is weak here.
CUDA_LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=-z,defs,--exclude-libs,ALL,--no-as-needed"]
NINJA = "rule compile\n  command = $arguments -MD -MF $out.d\n  depfile = $out.d\n  deps = gcc\n"


def find_nvcc() -> str | None:
    """The nvcc to call, for C++ and linking too: it knows its own headers and libraries."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, f"{DEFAULT_CUDA}/bin"]))


def what_cuda_lacks() -> str:
    """What building the CUDA kernels lacks here and how to get it, or ''."""
    if find_nvcc() is None:
        return f"no nvcc; put it on PATH or set CUDA_HOME, then: {HOW}"
    torch = importlib.util.find_spec("torch") and importlib.metadata.version("torch")
    if torch is None or tuple(map(int, torch.split(".")[:2])) < (2, 10):
        return f"expected PyTorch 2.10 or later in the build's environment, got {torch}; with it: {HOW}"
    return ""


def find_compiler() -> list[str]:
    """The C++ compiler to call and its arguments, empty if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else []
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def what_cpu_lacks() -> str:
    """What building the CPU engine lacks here and how to get it, or ''."""
    if find_compiler():
        return ""
    if os.environ.get("CXX"):
        return f"CXX={os.environ['CXX']} is not found; correct it or unset it, then: pip install ."
    return "no C++ compiler; install one (Debian, Ubuntu: apt-get install g++), then: pip install ."


def architectures(listed: str, supported: Sequence[str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as ["80", "90a", "100+PTX"]; if empty, the default ones nvcc supports."""
    found = []
    for name in filter(None, re.split(r"[;,\s]+", listed)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?(?:\+PTX)?)", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected e.g. 8.0;9.0a;10.0+PTX, got {name!r}")
        if int(match[1]) >= 8:  # cp.async, bfloat16
            found.append("".join(match.groups()))
    if not listed.strip():
        found = [name for name in DEFAULT_ARCHITECTURES if name in supported]
        found[-1:] = [f"{name}+PTX" for name in found[-1:]]
    if not found:
        raise SystemExit(f"expected architectures from 8.0 on, got {listed or ' '.join(supported)!r}")
    return found


def gencode(architecture: str) -> str:
    """nvcc's option for machine code of an architecture and, if it says so, PTX."""
    name, _, ptx = architecture.partition("+")
    return f"-gencode=arch=compute_{name},code=[sm_{name}{f',compute_{name}' if ptx else ''}]"


def cuda_commands(sources: Sequence[str], folder: Path) -> tuple[Commands, list[str]]:
    """How to compile the CUDA kernels into `folder`, and to link them."""
    nvcc, torch = find_nvcc(), Path(importlib.util.find_spec("torch").origin).parent
    supported = re.findall(r"compute_(\w+)", subprocess.getoutput(f"{nvcc} --list-gpu-arch"))
    names = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), supported)
    call = [nvcc, *map(gencode, names), f"--threads={os.environ.get('NVCC_THREADS') or 1}"]
    call += [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
    binding = [f"-isystem={torch}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10
    binding += [f'-DHYPERCONV_ARCHITECTURES="{",".join(names)}"']
    commands = {}
    for source in sources:
        made = f"{folder / Path(source).name}.o"
        flags = [*CUDA_FLAGS, *(binding if source.endswith(".cpp") else [])]
        commands[source, made] = [*call, *flags, "-c", source, "-o", made]
    objects = [made for _, made in commands]
    return commands, [*call, *CUDA_LINK_FLAGS, *objects, f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"]


def knows(call: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether a compiler takes these flags."""
    command = [*call, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def cpu_commands(sources: Sequence[str], folder: Path) -> tuple[Commands, list[str]]:
    """How to compile the CPU engine into `folder`, and to link it."""
    levels = LEVELS | (X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {})
    call = [*find_compiler(), *CPU_FLAGS]
    if NEWEST in levels and not knows(call, levels[NEWEST]):
        del levels[NEWEST]
    commands = {}
    for source in sources:
        stem = Path(source).stem
        variants = {stem: [HAS_NEWEST] if NEWEST in levels else []}
        if stem == "level":
            variants = {name: [*flags, f"-DHYPERCONV_LEVEL={name}"] for name, flags in levels.items()}
        for name, flags in variants.items():
            made = f"{folder / name}.o"
            commands[source, made] = [*call, *flags, "-c", source, "-o", made]
    return commands, [*call, *CPU_LINK_FLAGS, *(made for _, made in commands)]


class Engine(NamedTuple):
    """A shared library of this package: hyperconv_ext/_NAME.abi3.so."""

    title: str
    variable: str  # of the environment: whether to build it
    sources: tuple[str, ...]
    lacks: Callable[[], str]
    commands: Callable[[Sequence[str], Path], tuple[Commands, list[str]]]


ENGINES = {
    "cpu": Engine(
        "CPU engine", "HYPERCONV_BUILD_CPU", ("csrc/cpu/*.cpp",), what_cpu_lacks, cpu_commands
    ),
    "cuda": Engine(
        "CUDA kernels",
        "HYPERCONV_BUILD_CUDA",
        ("csrc/*.cu", "csrc/*.cpp"),
        what_cuda_lacks,
        cuda_commands,
    ),
}


def builds(name: str) -> bool:
    """Whether an engine is built: what its environment variable says, or `auto` means here."""
    engine = ENGINES[name]
    choice = os.environ.get(engine.variable, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{engine.variable}: expected 'auto', '0' or '1', got {choice!r}")
    lacking = "" if choice == "0" else engine.lacks()
    if lacking and choice == "1":
        raise SystemExit(f"{engine.variable}=1, but the {engine.title} cannot be built: {lacking}")
    if lacking:
        print(f"hyperconv_ext is built without its {engine.title}: {lacking}", file=sys.stderr)
    return choice != "0" and not lacking


def extension(name: str) -> Extension:
    """An engine for setuptools. The package is installed without one that `auto` fails to compile."""
    engine = ENGINES[name]
    sources = sorted(str(path) for pattern in engine.sources for path in Path().glob(pattern))
    optional = name == "cpu" and os.environ.get(engine.variable, "auto") == "auto"
    return Extension(f"hyperconv_ext._{name}", sources, optional=optional)


def compile_all(commands: Commands, folder: Path) -> None:
    """Run the commands side by side; if there is ninja, only those whose results are out of date."""
    ninja = shutil.which("ninja", path=f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}")
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    jobs = int(os.environ.get("MAX_JOBS") or (len(affinity(0)) if affinity else os.cpu_count() or 1))
    if ninja is None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands.values()))
        return
    text = f"builddir = {folder}\n{NINJA}"
    for paths, command in commands.items():
        source, made = (re.sub(r"([$ :])", r"$\1", path) for path in paths)
        arguments = shlex.join(command).replace("$", "$$")
        text += f"build {made}: compile {source}\n  arguments = {arguments}\n"
    (folder / "build.ninja").write_text(text)
    subprocess.run([ninja, "-f", folder / "build.ninja", "-j", str(jobs)], check=True)


class BuildEngines(build_ext):  # noqa: D101
    def get_ext_filename(self, fullname: str) -> str:  # noqa: D102
        return f"{fullname.replace('.', '/')}.abi3.so"

    def run(self) -> None:  # noqa: D102
        # This folder outlives a build, and all that is in it goes into the wheel.
        for left in Path(self.build_lib).glob("hyperconv_ext/*.abi3.so"):
            left.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        name = ext.name.partition("_ext._")[2]
        folder, library = Path(self.build_temp, name), self.get_ext_fullpath(ext.name)
        self.mkpath(str(folder))
        self.mkpath(os.path.dirname(library))
        commands, link = ENGINES[name].commands(ext.sources, folder)
        try:
            compile_all(commands, folder)
            subprocess.run([*link, "-o", library], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            how = f"CXX names another C++ compiler, {ENGINES[name].variable}=0 builds without"
            raise CompileError(f"{error}\n{how} the {ENGINES[name].title}") from None

    def copy_extensions_to_source(self) -> None:  # noqa: D102
        super().copy_extensions_to_source()
        for name in (self.get_ext_filename(ext.name) for ext in self.extensions):
            if not Path(self.build_lib, name).exists():  # nor may an older one be loaded
                Path(name).unlink(missing_ok=True)


class Wheel(bdist_wheel):  # noqa: D101
    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    engines = [extension(name) for name in ENGINES if builds(name)]
    setup(ext_modules=engines, cmdclass={"build_ext": BuildEngines, "bdist_wheel": Wheel})
