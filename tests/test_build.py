"""The build of csrc/: what the environment says, and what comes out of an sdist."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import setup
from hyperconv_ext.backends.cuda import library, schemas

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ["75", "80", "86", "90", "100", "120"]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0a;10.0+PTX", ["80", "90a", "100+PTX"]),
        ("8.0 8.6, 12.0f+PTX;", ["80", "86", "120f+PTX"]),
        ("7.5;8.0", ["80"]),
        ("", ["80", "90", "100+PTX"]),
        (" ", ["80", "90", "100+PTX"]),
    ],
)
def test_architectures(listed: str, expected: list[str]) -> None:
    assert setup.architectures(listed, SUPPORTED) == expected


def test_default_architectures_are_those_nvcc_supports() -> None:
    assert setup.architectures("", ["75", "80", "86", "90"]) == ["80", "90+PTX"]


@pytest.mark.parametrize(
    ("listed", "supported", "message"),
    [
        ("Hopper", SUPPORTED, "expected e.g. 8.0;9.0a;10.0.PTX, got 'Hopper'"),
        ("8.0;sm_90", SUPPORTED, "got 'sm_90'"),
        ("7.0;7.5", SUPPORTED, "from 8.0 on, got '7.0;7.5'"),
        ("", ["70", "75"], "from 8.0 on, got '70 75'"),
    ],
)
def test_wrong_architectures(listed: str, supported: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        setup.architectures(listed, supported)


def test_machine_code_and_ptx() -> None:
    assert setup.gencode("90a") == "-gencode=arch=compute_90a,code=[sm_90a]"
    assert setup.gencode("100+PTX") == "-gencode=arch=compute_100,code=[sm_100,compute_100]"


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "HYPERCONV_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup, "DEFAULT_CUDA", str(tmp_path))


def _tool(folder: Path) -> str:
    tool = folder / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    return str(tool)


@pytest.mark.usefixtures("without_nvcc")
def test_nvcc_of_the_environment_then_on_path_then_at_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert setup.find_nvcc() is None
    default = _tool(tmp_path)
    assert setup.find_nvcc() == default
    on_path = _tool(tmp_path / "on_path")
    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    assert setup.find_nvcc() == on_path
    named = _tool(tmp_path / "named")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert setup.find_nvcc() == named


@pytest.mark.usefixtures("without_nvcc")
def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not setup.builds("cuda")
    assert re.search("without its CUDA kernels: no nvcc; .*pip install", capsys.readouterr().err)
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "0")
    assert not setup.builds("cuda")
    assert not capsys.readouterr().err
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"HYPERCONV_BUILD_CUDA=1, but .* no nvcc; .*pip install"):
        setup.builds("cuda")


@pytest.mark.usefixtures("without_nvcc")
@pytest.mark.parametrize("version", [None, "2.9.1+cpu"])
def test_without_the_right_pytorch(
    version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in an environment that pip isolates."""
    _tool(tmp_path)
    assert setup.builds("cuda")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(setup.importlib.metadata, "version", lambda name: version)
    assert not setup.builds("cuda")
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=re.escape(f"got {version}; with it: pip install")):
        setup.builds("cuda")


@pytest.mark.parametrize("engine", setup.ENGINES)
def test_wrong_choice(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"HYPERCONV_BUILD_{engine.upper()}"
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(SystemExit, match=f"{variable}: expected 'auto', '0' or '1', got 'yes'"):
        setup.builds(engine)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder where programs are looked for."""
    for name in ("CXX", "HYPERCONV_BUILD_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_compiler_of_the_environment_then_on_path(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.find_compiler() == []
    for name in ("clang++", "g++", "c++"):
        (without_compiler / name).touch(0o755)
        assert setup.find_compiler() == [name]
    monkeypatch.setenv("CXX", "clang++ -m64 '-DTEXT=a b'")
    assert setup.find_compiler() == ["clang++", "-m64", "-DTEXT=a b"]
    assert setup.builds("cpu")


def test_without_compiler(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not setup.builds("cpu")
    error = capsys.readouterr().err
    assert re.search(r"without its CPU engine: no C\+\+ compiler; .*apt-get install g\+\+", error)
    monkeypatch.setenv("HYPERCONV_BUILD_CPU", "0")
    assert not setup.builds("cpu")
    assert not capsys.readouterr().err
    monkeypatch.setenv("HYPERCONV_BUILD_CPU", "1")
    monkeypatch.setenv("CXX", "icpx -O2")
    message = (
        "HYPERCONV_BUILD_CPU=1, but the CPU engine cannot be built: CXX=icpx -O2 is not found; correct"
    )
    with pytest.raises(SystemExit, match=message):
        setup.builds("cpu")


@pytest.mark.parametrize(
    ("machine", "levels"),
    [
        ("x86_64", ["kBaseline", "kAvx2", "kAvx512", "kAvx512Bf16"]),
        ("AMD64", ["kBaseline", "kAvx2", "kAvx512", "kAvx512Bf16"]),
        ("aarch64", ["kBaseline"]),
        ("arm64", ["kBaseline"]),
    ],
)
def test_levels_of_instructions(
    machine: str, levels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.platform, "machine", lambda: machine)
    monkeypatch.setattr(setup, "find_compiler", lambda: ["g++", "-m64"])
    monkeypatch.setattr(setup, "knows", lambda call, flags: True)
    sources = ["csrc/cpu/level.cpp", "csrc/cpu/library.cpp"]
    commands, link = setup.cpu_commands(sources, Path("made"))
    assert (setup.HAS_NEWEST in commands[sources[1], "made/library.o"]) == (setup.NEWEST in levels)
    objects = [f"made/{name}.o" for name in (*levels, "library")]
    assert [made for _, made in commands] == objects
    assert all(command[:2] == ["g++", "-m64"] for command in [*commands.values(), link])
    assert set(objects) < set(link)
    for name in levels:
        command = commands[sources[0], f"made/{name}.o"]
        assert f"-DHYPERCONV_LEVEL={name}" in command
        assert ("-mfma" in command) == (name != "kBaseline")
        assert ("-mavx512f" in command) == name.startswith("kAvx512")
        assert ("-mavx512bf16" in command) == (name == "kAvx512Bf16")


def test_a_compiler_that_does_not_know_the_newest_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup, "find_compiler", lambda: ["g++"])
    monkeypatch.setattr(setup, "knows", lambda call, flags: "-mavx512bf16" not in flags)
    commands, link = setup.cpu_commands(["csrc/cpu/level.cpp", "csrc/cpu/library.cpp"], Path("made"))
    assert [made for _, made in commands] == [
        f"made/{name}.o" for name in ("kBaseline", "kAvx2", "kAvx512", "library")
    ]
    assert not any(setup.HAS_NEWEST in command for command in commands.values())
    assert "made/kAvx512Bf16.o" not in link


@pytest.mark.parametrize("ninja", [True, False])
def test_commands_run_with_and_without_ninja(
    ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a $folder: b"
    folder.mkdir()
    source, made = folder / "source", folder / "made"
    source.write_text("text")
    if not ninja:
        monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    script = f"import shutil; shutil.copy({str(source)!r}, {str(made)!r})"
    setup.compile_all({(str(source), str(made)): [sys.executable, "-c", script]}, folder)
    assert made.read_text() == "text"


needs_compiler = pytest.mark.skipif(
    not setup.find_compiler(), reason="no C++ compiler; install one or set CXX"
)


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False])
def test_a_changed_header_is_compiled(
    ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, header, made = (tmp_path / name for name in ("source.cpp", "header.h", "source.o"))
    source.write_text('#include "header.h"\n')
    command = [*setup.find_compiler(), "-c", str(source), "-o", str(made)]
    if not ninja:
        monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    for name in ("first", "second"):
        header.write_text(f"int {name};\n")
        setup.compile_all({(str(source), str(made)): command}, tmp_path)
        assert name.encode() in made.read_bytes()


@pytest.mark.parametrize(
    ("entry", "runs", "does_not"),
    [
        ("80", [80, 86, 89], [75, 90, 100]),
        ("90a", [90], [80, 100]),
        ("100", [100, 103], [90, 120]),
        ("80,90", [86, 90], [100]),
        ("100+PTX", [100, 103, 120], [90]),
        ("90a+PTX", [90], [100]),
    ],
)
def test_which_gpus_a_binary_serves(
    entry: str, runs: list[int], does_not: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_load", lambda: (entry, ""))
    assert all(map(library.supports, runs))
    assert not any(map(library.supports, does_not))


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The loader as in a process that has not asked for the library."""
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("text", "named", "reason"),
    [
        (None, True, "HYPERCONV_CUDA_LIBRARY=.*does not exist"),
        ("no library", True, "cannot be loaded: .*library.so: file too short"),
        (None, False, "is not built; .*pip install"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(
    text: str | None, named: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "library.so"
    if text:
        path.write_text(text)
    monkeypatch.setenv("HYPERCONV_CUDA_LIBRARY", str(path) if named else "")
    monkeypatch.setattr(library, "_BUILT", path)
    assert re.search(reason, library.reason())
    assert library.architectures() == ()
    assert not library.executes_on_cpu() and not library.supports(90)


def _run(*command: object, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    environment = os.environ | variables
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _python(*arguments: object, folder: Path, **variables: str) -> str:
    """Run python in `folder`; what it prints."""
    result = _run(sys.executable, *arguments, folder=folder, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


NO_ENGINE = {"HYPERCONV_BUILD_CUDA": "0", "HYPERCONV_BUILD_CPU": "0"}


def _wheel(project: Path, folder: Path, **variables: str) -> Path:
    _python("setup.py", "-q", "bdist_wheel", "-d", folder, folder=project, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder]
    with (tmp_path_factory.getbasetemp().parent / "sdist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once the first would take the other's tree away
        _python(*command, folder=ROOT, **NO_ENGINE)  # what the sdist holds does not depend on it
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_is_complete(project: Path) -> None:
    for source in (ROOT / "csrc").rglob("*"):
        assert source.is_dir() or (project / source.relative_to(ROOT)).exists(), source
    assert (project / "hyperconv_ext" / "py.typed").exists()
    assert not (project / "tests").exists()


def test_wheel_without_engines(project: Path, tmp_path: Path) -> None:
    wheel = _wheel(project, tmp_path, **NO_ENGINE)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert _libraries(wheel) == []


def _libraries(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


FAILING = {
    "HYPERCONV_BUILD_CUDA": "0",
    "CXX": shlex.join([sys.executable, "-c", "raise SystemExit('this is no C++')"]),
}


def test_a_compiler_that_fails_leaves_the_package(project: Path, tmp_path: Path) -> None:
    """What it said is printed; and no library of an earlier build stays, built in place or not."""
    assert _libraries(_wheel(project, tmp_path, **FAILING, HYPERCONV_BUILD_CPU="auto")) == []
    (folder,) = project.glob("build/lib.*/hyperconv_ext")
    stale = [folder / "_cuda.abi3.so", project / "hyperconv_ext" / "_cpu.abi3.so"]
    for path in stale:
        path.write_text("an earlier build")
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    result = _run(*command, folder=project, **FAILING, HYPERCONV_BUILD_CPU="auto")
    assert result.returncode == 0
    assert "this is no C++" in result.stdout + result.stderr
    assert "CXX names another C++ compiler, HYPERCONV_BUILD_CPU=0 builds without" in result.stderr
    assert not any(path.exists() for path in stale)


def test_a_compiler_that_fails_where_the_engine_is_asked_for(project: Path) -> None:
    command = (sys.executable, "setup.py", "-q", "build_ext")
    result = _run(*command, folder=project, **FAILING, HYPERCONV_BUILD_CPU="1")
    assert result.returncode != 0
    assert "this is no C++" in result.stdout + result.stderr
    assert "HYPERCONV_BUILD_CPU=0 builds without the CPU engine" in result.stderr


EVALUATE = """
import torch
from hyperconv_ext import HyperConv2d
from hyperconv_ext.backends.cpu import library
conv, x = HyperConv2d(8, 8, 5, padding=2), torch.randn(2, 8, 16, 16)
y = conv(x)
conv.backend = "reference"
print(library.__file__, library.capability(), torch.allclose(conv(x), y, atol=1e-5), library.reason())
"""


@needs_compiler
def test_which_flags_a_compiler_knows() -> None:
    assert setup.knows(setup.find_compiler(), ["-O2"])
    assert not setup.knows(setup.find_compiler(), ["-mno-such-instructions"])


@pytest.mark.slow
@pytest.mark.sweep  # the set-up has built the engine
@needs_compiler
def test_wheel_with_the_cpu_engine(project: Path, tmp_path: Path) -> None:
    """Compiled without warnings, it serves every Python, in an environment without a compiler."""
    compiler = f"{' '.join(setup.find_compiler())} -Werror"
    variables = {"HYPERCONV_BUILD_CUDA": "0", "HYPERCONV_BUILD_CPU": "1", "CXX": compiler}
    wheel = _wheel(project, tmp_path, **variables)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    assert _libraries(wheel) == ["hyperconv_ext/_cpu.abi3.so"]

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    bare = {"PATH": "", "CXX": "", "PYTHONPATH": "", "HYPERCONV_CPU_CAPABILITY": ""}
    bare |= {"HYPERCONV_CPU_LIBRARY": "", "HYPERCONV_CUDA_LIBRARY": ""}
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps")
    result = _run(*pip, wheel, folder=tmp_path, **bare)
    assert result.returncode == 0, result.stderr
    result = _run(python, "-c", EVALUATE, folder=tmp_path, **bare)
    loader = packages / "hyperconv_ext" / "backends" / "cpu" / "library.py"
    assert re.fullmatch(rf"{loader} (avx512_bf16|avx512|avx2|baseline) True \n", result.stdout), (
        result.stderr
    )
    if sys.platform == "linux":
        built = packages / "hyperconv_ext" / "_cpu.abi3.so"
        needed = _run("readelf", "-d", built, folder=tmp_path).stdout
        assert set(re.findall(r"\(NEEDED\).*\[(\w+)", needed)) <= {"libc", "libm"}


LOAD = f"""
import torch
import hyperconv_ext
from hyperconv_ext.backends.cuda import library
print(library.__file__, repr(library.reason()), library.architectures(), library.executes_on_cpu())
for name in {[schema.partition("(")[0] for schema in schemas.SCHEMAS]!r}:
    name = f"{schemas.NAMESPACE}::{{name}}"
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
"""


@pytest.mark.slow
@pytest.mark.sweep  # compiles every kernel
@pytest.mark.skipif(setup.find_nvcc() is None, reason="no nvcc; put it on PATH or set CUDA_HOME")
def test_wheel_with_kernels(project: Path, tmp_path: Path) -> None:
    """Compiled for sm_90 with warnings as errors, it serves every Python and a PyTorch without CUDA."""
    variables = {
        "HYPERCONV_BUILD_CUDA": "1",
        "HYPERCONV_BUILD_CPU": "0",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": "2",
        "NVCC_APPEND_FLAGS": "-Werror=all-warnings -Xcompiler=-Werror",
    }
    wheel = _wheel(project, tmp_path, **variables)
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path)
    built = tmp_path / "hyperconv_ext" / "_cuda.abi3.so"

    command = ["nm", "-D", built]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "hyperconv_architectures" in symbols
    assert not re.findall(r"\b_?Py\w+", symbols)
    assert not re.findall(r"\b_*cu\w+", symbols), "the CUDA runtime is to be the library's own"

    output = _python("-c", LOAD, folder=tmp_path, HYPERCONV_CUDA_LIBRARY="").splitlines()
    loader = tmp_path / "hyperconv_ext" / "backends" / "cuda" / "library.py"
    assert output[0] == f"{loader} '' ('90',) False"
    assert len(output) == 1 + len(schemas.SCHEMAS)
    assert all(line.endswith(" True") for line in output[1:]), output
