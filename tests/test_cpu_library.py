"""The CPU engine's library: that its structures are Python's, and why there is none and what to do."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import setup
from hyperconv_ext.backends.cpu import library

from .conftest import best_instructions

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "engine.h"
TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "*": ctypes.c_void_p,
}
STRUCTURES = ("Axis", "Circle", "Strides", "Convolution", "Mlp")

built = pytest.mark.skipif(bool(library.reason()), reason=library.reason())
needs_compiler = pytest.mark.skipif(
    not setup.find_compiler(), reason="no C++ compiler; install one or set CXX"
)


def _declared(name: str) -> list[tuple[str, object, int]]:
    """(field, type, how many) of a structure in the header; a pointer's type is that of an address."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    (body,) = re.findall(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    types = TYPES | {other: getattr(library, other) for other in STRUCTURES}
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+) ?(.*)", declaration, re.DOTALL).groups()
        for item in names.split(","):
            pointer, field, count = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(.*)\])?\s*", item).groups()
            numbers = (count or "1").replace("kMaxLayers", str(library.MAX_LAYERS)).split("+")
            fields.append((field, types[pointer or kind], sum(map(int, numbers))))
    return fields


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_those_of_the_header(name: str) -> None:
    fields = []
    for field, kind in getattr(library, name)._fields_:
        count = getattr(kind, "_length_", 1)  # of an array
        fields.append((field, kind._type_ if count > 1 else kind, count))
    assert fields == _declared(name)


def _enumerated(name: str) -> list[tuple[str, int]]:
    (body,) = re.findall(rf"enum {name} : int32_t \{{(.*?)\}};", HEADER.read_text())
    items = [item.split("=") for item in body.split(",")]
    values = [int(item[1]) if len(item) == 2 else place for place, item in enumerate(items)]
    return [(item[0].strip(), value) for item, value in zip(items, values, strict=True)]


def test_constants_are_those_of_the_header() -> None:
    dtypes = {"float32": "kFloat", "float64": "kDouble", "bfloat16": "kBfloat16", "float16": "kHalf"}
    assert [(dtypes[name], value) for name, value in library.DTYPES.items()] == _enumerated("Dtype")
    algorithms = {"basis": "kTaps", "fft": "kFft"}
    named = [(algorithms[name], value) for name, value in library.ALGORITHMS.items()]
    assert [*named, ("kPlanes", library.PLANES)] == _enumerated("Algorithm")
    wanted = [
        ("kOutput", library.OUTPUT),
        ("kCoefficients", library.COEFFICIENTS),
        ("kBasis", library.BASIS),
    ]
    assert wanted == _enumerated("Wanted")
    assert dict(_enumerated("Status"))["kNoMemory"] == library._NO_MEMORY
    assert f"constexpr int kMaxLayers = {library.MAX_LAYERS};" in HEADER.read_text()


RUNS = library.CAPABILITIES[library.CAPABILITIES.index(best_instructions()) :]
ASK = """
from hyperconv_ext.backends.cpu import library
print(library.capability())
print(library.describe())
print(library.reason())
"""


def _ask(code: str = ASK, **variables: str) -> list[str]:
    """What a new process prints."""
    bare = {"HYPERCONV_CPU_LIBRARY": "", "HYPERCONV_CPU_CAPABILITY": ""}
    environment = os.environ | bare | variables
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@built
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="ATEN_CPU_CAPABILITY misleads PyTorch")
@pytest.mark.parametrize("named", ["", *library.CAPABILITIES])
def test_capability(named: str) -> None:
    """The best there is, or the one that is named if the processor has it."""
    capability, description, reason = _ask(HYPERCONV_CPU_CAPABILITY=named)
    if not named or named in RUNS:
        assert capability == (named or best_instructions())
        assert description == f"{capability} instructions, PyTorch's threads"
        assert not reason
    else:
        expected = f"expected what this processor runs, {' or '.join(RUNS)}, got '{named}'; correct it"
        assert not capability
        assert description == reason
        assert reason.startswith(f"HYPERCONV_CPU_CAPABILITY: {expected}")


def test_importing_loads_nothing() -> None:
    code = "from hyperconv_ext.backends.cpu import library; print(library._load.cache_info().misses)"
    assert _ask(code) == ["0"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loader as in a process that has not asked for the library."""
    for name in ("HYPERCONV_CPU_LIBRARY", "HYPERCONV_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    library._load.cache_clear()
    library._engine.cache_clear()
    yield
    library._load.cache_clear()
    library._engine.cache_clear()


@built
@pytest.mark.usefixtures("unloaded")
def test_a_capability_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCONV_CPU_CAPABILITY", "sse")
    reason = library.reason()
    assert re.search(r"HYPERCONV_CPU_CAPABILITY: expected .*baseline, got 'sse'; .*unset it", reason)
    assert library.capability() == ""
    with pytest.raises(RuntimeError, match="HYPERCONV_CPU_CAPABILITY: expected"):
        library.convolve(library.Convolution())


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("text", "named", "reason"),
    [
        (None, True, "HYPERCONV_CPU_LIBRARY=.*does not exist; correct it or unset it"),
        ("no library", True, "CPU engine library.so cannot be loaded: .*; rebuild it"),
        ("no library", False, "CPU engine library.so cannot be loaded: .*; rebuild it"),
        (None, False, r"is not built; install a C\+\+ compiler .*apt-get install g\+\+.*pip install \."),
    ],
)
def test_a_library_that_cannot_be_used_says_why(
    text: str | None, named: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "library.so"
    if text:
        path.write_text(text)
    monkeypatch.setenv("HYPERCONV_CPU_LIBRARY", str(path) if named else "")
    monkeypatch.setattr(library, "_BUILT", path)
    assert re.search(reason, library.reason())
    assert library.describe() == library.reason()
    assert library.capability() == ""
    for compute, call in (
        (library.convolve, library.Convolution()),
        (library.mlp_forward, library.Mlp()),
        (library.mlp_backward, library.Mlp()),
    ):
        with pytest.raises(RuntimeError, match=reason):
            compute(call)


def test_the_program_says_why_there_is_no_library() -> None:
    code = "from hyperconv_ext.report import environment; print(environment())"
    output = _ask(code, HYPERCONV_CPU_LIBRARY="/nowhere/engine.so")
    reason = "HYPERCONV_CPU_LIBRARY=/nowhere/engine.so does not exist; correct it or unset it"
    assert f"cpu library   {reason}" in output
    assert "    composite: yes" in output


# Stands for the engine: a convolution of `batch` -1 or -2 fails, others count positions on the threads.
STAND_IN = f"""
#include "{HEADER}"
using namespace hyperconv;
ParallelFor parallel_for;
extern "C" int64_t hyperconv_cpu_size(int32_t which) {{
  const int64_t sizes[] = {{
      sizeof(Axis), sizeof(Circle), sizeof(Strides), sizeof(Convolution), sizeof(Mlp)}};
  return sizes[which] + (which == STALE);
}}
extern "C" const char* hyperconv_cpu_start(const char*, void* threads) {{
  parallel_for = reinterpret_cast<ParallelFor>(threads);
  return "baseline";
}}
extern "C" int32_t hyperconv_cpu_convolve(const Convolution* call) {{
  if (call->batch < 0) return -call->batch;
  auto count = [](int64_t begin, int64_t end, void* counted) {{
    __atomic_fetch_add(static_cast<int64_t*>(counted), end - begin, __ATOMIC_RELAXED);
  }};
  return parallel_for(0, call->batch, 1, count, call->output);
}}
extern "C" int32_t hyperconv_cpu_mlp_forward(const Mlp* call) {{ return call->layers; }}
extern "C" uint64_t hyperconv_cpu_digest(const void* const*, const int64_t*, int32_t) {{ return 0; }}
#ifndef OLD
extern "C" int32_t hyperconv_cpu_mlp_backward(const Mlp* call) {{ return call->layers; }}
#endif
"""


@pytest.fixture
def stand_in(unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Takes a stand-in for the engine, compiled with the definitions given, as the library."""

    def take(*definitions: str) -> None:
        source, made = tmp_path / "stand_in.cpp", tmp_path / "stand_in.so"
        source.write_text(STAND_IN)
        command = [*setup.find_compiler(), "-shared", "-fPIC", "-std=c++17", *definitions]
        subprocess.run([*command, str(source), "-o", str(made)], check=True)
        monkeypatch.setenv("HYPERCONV_CPU_LIBRARY", str(made))

    yield take


@needs_compiler
@pytest.mark.parametrize(("which", "name"), list(enumerate(STRUCTURES)))
def test_a_library_of_other_structures(which: int, name: str, stand_in) -> None:
    size = ctypes.sizeof(getattr(library, name))
    stand_in(f"-DSTALE={which}")
    assert library.reason() == (
        f"the CPU engine stand_in.so is of another version: expected {size} bytes for its {name}, "
        f"got {size + 1}; rebuild it: pip install . in the source"
    )


@needs_compiler
def test_a_library_without_a_function(stand_in) -> None:
    stand_in("-DSTALE=-1", "-DOLD")
    assert re.search(
        "stand_in.so cannot be loaded: .*hyperconv_cpu_mlp_backward; rebuild", library.reason()
    )


@needs_compiler
def test_what_fails_says_so(stand_in) -> None:
    stand_in("-DSTALE=-1")
    assert library.reason() == ""
    with pytest.raises(MemoryError, match=r"workspace of a convolution \(.*batch=-1, .*; free some, or"):
        library.convolve(library.Convolution(batch=-1))
    with pytest.raises(
        RuntimeError, match=r"know this convolution \(dtype=3, .*batch=-2, .*; rebuild it"
    ):
        library.convolve(library.Convolution(dtype=3, batch=-2))
    for compute in (library.mlp_forward, library.mlp_backward):
        compute(library.Mlp())
        with pytest.raises(
            MemoryError, match=r"coordinate MLP \(dtype=0, taps=9, layers=1, .*; free some"
        ):
            compute(library.Mlp(taps=9, layers=1))
        with pytest.raises(
            RuntimeError, match=r"coordinate MLP \(dtype=0, taps=9, layers=2, .*; rebuild"
        ):
            compute(library.Mlp(taps=9, layers=2))


@needs_compiler
def test_work_is_done_on_the_threads_of_pytorch(stand_in) -> None:
    stand_in("-DSTALE=-1")
    counted = torch.zeros(1, dtype=torch.int64)
    library.convolve(library.Convolution(batch=1000, output=counted.data_ptr()))
    assert counted.item() == 1000


@needs_compiler
def test_without_the_threads_of_pytorch(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("-DSTALE=-1")
    monkeypatch.setattr(library, "_threads", lambda: None)
    assert library.describe() == "baseline instructions, one thread: this PyTorch does not lend its own"
