"""Build hyperconv_ext. Here: its CUDA kernels; everything else is in pyproject.toml.

csrc/ becomes one shared library, hyperconv_ext/_cuda.abi3.so, for every Python (no Python symbols) and
every PyTorch from 2.10 on (LibTorch's stable ABI). The environment decides:

HYPERCONV_BUILD_CUDA    auto (default): where nvcc and PyTorch are found; 1: always, or fail; 0: never
TORCH_CUDA_ARCH_LIST    as in PyTorch, e.g. "8.0;9.0a;10.0+PTX"; what is older than 8.0 is left out
CUDA_HOME, CUDA_PATH    whose bin/nvcc to call; else the one on PATH, else that of /usr/local/cuda
CXX                     nvcc's host compiler
MAX_JOBS, NVCC_THREADS  compilers at a time (with ninja); architectures at a time in each
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HOW = "pip install . --no-build-isolation"
DEFAULT_CUDA = "/usr/local/cuda"
# sm_80 code also runs on 8.6 and 8.9, PTX of the newest on all that follow. No 'a' feature is used yet.
DEFAULT_ARCHITECTURES = ("80", "90", "100")
COMPILE_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
COMPILE_FLAGS += ["-lineinfo", "-Xfatbin=-compress-all"]  # a sixth of the size that the lines give it
# The CUDA runtime's symbols are hidden, lest those of PyTorch's own runtime, another version, take their
# place. libtorch.so is kept although nothing here asks for it: in a CUDA build of PyTorch it brings in
# libtorch_cuda.so, which has what is weak here.
LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=-z,defs,--exclude-libs,ALL,--no-as-needed"]
NINJA = "rule compile\n  command = $arguments -MD -MF $out.d\n  depfile = $out.d\n  deps = gcc\n"


def find_nvcc() -> str | None:
    """The nvcc to call, for C++ and linking too: it knows its own headers and libraries."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, f"{DEFAULT_CUDA}/bin"]))


def what_is_missing() -> str:
    """What building the kernels lacks here and how to get it, or ''."""
    if find_nvcc() is None:
        return f"no nvcc; put it on PATH or set CUDA_HOME, then: {HOW}"
    torch = importlib.util.find_spec("torch") and importlib.metadata.version("torch")
    if torch is None or tuple(map(int, torch.split(".")[:2])) < (2, 10):
        return f"expected PyTorch 2.10 or later in the build's environment, got {torch}; with it: {HOW}"
    return ""


def builds_kernels() -> bool:
    """What HYPERCONV_BUILD_CUDA says, or `auto` means here."""
    choice = os.environ.get("HYPERCONV_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"HYPERCONV_BUILD_CUDA: expected 'auto', '0' or '1', got {choice!r}")
    missing = "" if choice == "0" else what_is_missing()
    if missing and choice == "1":
        raise SystemExit(f"HYPERCONV_BUILD_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    if missing:
        print(f"hyperconv_ext is built without its CUDA kernels: {missing}", file=sys.stderr)
    return choice != "0" and not missing


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


def compile_all(commands: dict[tuple[str, str], list[str]], folder: Path) -> None:
    """Run the commands by (source, object): side by side and only where needed if there is ninja."""
    ninja = shutil.which("ninja", path=f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}")
    if ninja is None:
        for command in commands.values():
            subprocess.run(command, check=True)
        return
    text = f"builddir = {folder}\n{NINJA}"
    for paths, command in commands.items():
        source, made = (re.sub(r"([$ :])", r"$\1", path) for path in paths)
        arguments = shlex.join(command).replace("$", "$$")
        text += f"build {made}: compile {source}\n  arguments = {arguments}\n"
    (folder / "build.ninja").write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.run([ninja, "-f", folder / "build.ninja", "-j", jobs], check=True)


class BuildKernels(build_ext):  # noqa: D101
    def get_ext_filename(self, fullname: str) -> str:  # noqa: D102
        return f"{fullname.replace('.', '/')}.abi3.so"

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        nvcc, torch = find_nvcc(), Path(importlib.util.find_spec("torch").origin).parent
        supported = re.findall(r"compute_(\w+)", subprocess.getoutput(f"{nvcc} --list-gpu-arch"))
        names = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), supported)
        call = [nvcc, *map(gencode, names), f"--threads={os.environ.get('NVCC_THREADS') or 1}"]
        call += [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
        binding = [f"-isystem={torch}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10
        binding += [f'-DHYPERCONV_ARCHITECTURES="{",".join(names)}"']
        folder, library = Path(self.build_temp, "cuda"), self.get_ext_fullpath(ext.name)
        self.mkpath(str(folder))
        self.mkpath(os.path.dirname(library))
        commands = {}
        for source in ext.sources:
            made = f"{folder / Path(source).name}.o"
            flags = [*COMPILE_FLAGS, *(binding if source.endswith(".cpp") else [])]
            commands[source, made] = [*call, *flags, "-c", source, "-o", made]
        link = [*call, *LINK_FLAGS, *(made for _, made in commands), f"-L{torch}/lib"]
        try:
            compile_all(commands, folder)
            subprocess.run([*link, "-ltorch", "-ltorch_cpu", "-o", library], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{error}\nHYPERCONV_BUILD_CUDA=0 builds without the kernels") from None


class Wheel(bdist_wheel):  # noqa: D101
    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    sources = sorted(map(str, [*Path("csrc").glob("*.cu"), *Path("csrc").glob("*.cpp")]))
    kernels = [Extension("hyperconv_ext._cuda", sources)] if builds_kernels() else []
    setup(ext_modules=kernels, cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
