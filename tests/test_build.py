"""The build of csrc/: what the environment says, and what comes out of an sdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    assert not setup.builds_kernels()
    assert re.search("without its CUDA kernels: no nvcc; .*pip install", capsys.readouterr().err)
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "0")
    assert not setup.builds_kernels()
    assert not capsys.readouterr().err
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"HYPERCONV_BUILD_CUDA=1, but .* no nvcc; .*pip install"):
        setup.builds_kernels()


@pytest.mark.usefixtures("without_nvcc")
@pytest.mark.parametrize("version", [None, "2.9.1+cpu"])
def test_without_the_right_pytorch(
    version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in an environment that pip isolates."""
    _tool(tmp_path)
    assert setup.builds_kernels()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(setup.importlib.metadata, "version", lambda name: version)
    assert not setup.builds_kernels()
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=re.escape(f"got {version}; with it: pip install")):
        setup.builds_kernels()


def test_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCONV_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="HYPERCONV_BUILD_CUDA: expected 'auto', '0' or '1', got 'yes'"):
        setup.builds_kernels()


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


def _python(*arguments: object, folder: Path, **variables: str) -> str:
    """Run python in `folder`; what it prints."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | variables
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _wheel(project: Path, folder: Path, **variables: str) -> Path:
    _python("setup.py", "-q", "bdist_wheel", "-d", folder, folder=project, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    variables = {"HYPERCONV_BUILD_CUDA": "0"}  # what the sdist holds does not depend on it
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder]
    _python(*command, folder=ROOT, **variables)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_is_complete(project: Path) -> None:
    for source in (ROOT / "csrc").rglob("*"):
        assert source.is_dir() or (project / source.relative_to(ROOT)).exists(), source
    assert (project / "hyperconv_ext" / "py.typed").exists()
    assert not (project / "tests").exists()


def test_wheel_without_kernels(project: Path, tmp_path: Path) -> None:
    wheel = _wheel(project, tmp_path, HYPERCONV_BUILD_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


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
@pytest.mark.skipif(setup.find_nvcc() is None, reason="no nvcc; put it on PATH or set CUDA_HOME")
def test_wheel_with_kernels(project: Path, tmp_path: Path) -> None:
    """Compiled for sm_90 with warnings as errors, it serves every Python and a PyTorch without CUDA."""
    variables = {
        "HYPERCONV_BUILD_CUDA": "1",
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
