"""From records to the JSON, the tables, the goals, the report and its plots."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from . import goals, records, report, shapes, tables
from .records import Record, compared
from .shapes import Shape

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = sorted(Path(__file__).parent.glob("results/*/results.json"))
_A = Shape("any", 2, 64, 64, (8, 8), (5, 5))
_B = replace(_A, batch=4)
_LABELS = (
    ("conv", "contiguous", True, 3e-3),
    ("conv", "channels_last", True, 2e-3),
    ("hypernet+conv", "contiguous", True, 4e-3),
    ("triton", "channels_last", False, 1e-3),
    ("slow", "contiguous", False, 8e-3),
    ("wrong", "contiguous", False, None),
)


def _records(shape: Shape = _A, phase: str = "forward", dtype: str = "bf16") -> list[Record]:
    return [
        Record(
            shape,
            dtype,
            phase,
            column,
            layout,
            baseline,
            seconds,
            seconds and seconds / 10,
            rounds=5 if seconds else 0,
            memory=2**20 if baseline else 2**19,
            eager_seconds=2e-3,
            graph_seconds=None if column == "slow" else 5e-4,
            minimal_bytes=1000,
            direct_flops=10**9,
            least_flops=10**8,
            executed_flops=5e8,
            floor_seconds=5e-4,
            failure="" if seconds else "output: too far off",
        )
        for column, layout, baseline, seconds in _LABELS
    ]


def _document(found: list[Record], device: str = "NVIDIA H200") -> dict[str, Any]:
    """As pytest-benchmark writes it, after `clean`."""
    known = {"node": "secret", "system": "Linux", "cpu": {"flags": ["x"], "count": 2}}
    document: dict[str, Any] = {
        "machine_info": records.machine_facts(known, {"device": device, "torch": "2.99"}),
        "commit_info": {"id": "0123456789abcdef", "dirty": False, "project": "secret", "branch": "b"},
        "datetime": "2030-01-02T03:04:05+00:00",
        "benchmarks": [
            {
                "params": {"shape": "x"},
                "extra_info": record.to_info(),
                "stats": dict.fromkeys(("min", "max", "stddev", "mean"), 0.0)
                | {"median": record.seconds, "iqr": record.spread, "rounds": 5, "data": [1.0]},
            }
            for record in found
            if not record.failure
        ],
    }
    document["benchmarks"].append({"extra_info": {"plans": {}}, "stats": {"median": 1.0}})  # cut
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": {"bf16": 6e14}}
    failed, passed = ([r for r in found if bool(r.failure) == wrong] for wrong in (True, False))
    omitted = [replace(record, column="slower", failure="too slow") for record in passed[:1]]
    records.clean(document, failed, omitted, ceilings)
    return json.loads(json.dumps(document))


def test_the_json_gives_the_records_back_and_names_nobody() -> None:
    found = _records()
    document = _document(found)
    assert sorted(records.load(document), key=repr) == sorted(found, key=repr)
    assert "secret" not in json.dumps(document) and "flags" not in json.dumps(document)
    assert all("data" not in entry["stats"] for entry in document["benchmarks"])
    info = document["benchmarks"][3]["extra_info"]
    assert info["effective_tflops"] == pytest.approx(1.0)
    assert info["actual_tflops"] == pytest.approx(0.5)
    assert info["achieved"] == pytest.approx(0.5)
    assert [record.column for record in records.left_out(document)] == ["slower"]
    del document["left_out"]  # as before there was any
    assert records.left_out(document) == []


@pytest.mark.parametrize(
    ("bytes", "flops", "expected"), [(100.0, 10.0, 10.0), (100.0, 1000.0, 50.0), (0.0, 0.0, 0.0)]
)
def test_floor_is_the_slower_side_of_the_roofline(bytes: float, flops: float, expected: float) -> None:
    assert records.floor_seconds(bytes, flops, bandwidth=10.0, rate=20.0) == expected


def test_minimal_bytes() -> None:
    numel_in, numel_out = 2 * 64 * 64, 2 * 64 * 64
    assert records.minimal_bytes(_A, "forward", 10, 2) == 2 * (numel_in + numel_out + 10)
    assert records.minimal_bytes(_A, "step", 10, 2) == 2 * (3 * numel_in + 2 * numel_out + 30)


def test_the_better_layout_is_compared() -> None:
    cells = compared(_records())[_records()[0].row]
    assert cells["conv"].layout == "channels_last"
    assert records.speedup(cells, "triton", "conv") == pytest.approx(2.0)
    assert records.memory_saving(cells, "triton", "conv") == pytest.approx(2.0)
    assert records.speedup(cells, "wrong", "conv") is None
    assert records.speedup(cells, "absent", "conv") is None


def test_a_baseline_that_failed_in_one_layout_gives_no_ratio() -> None:
    found = _records()
    found[0] = replace(found[0], seconds=None, failure="out of memory")
    line = tables.speed(found)[1]
    assert line[3] == "FAILED" and line[5] == "1000 - ±10%"
    assert not any("against conv," in text for text in tables.summary(found))


def test_tables_show_losses_and_failures() -> None:
    head, row = tables.speed(_records())
    assert head[3:] == ["conv", "hypernet+conv", "triton", "slow", "wrong"]
    assert row[3:5] == ["2000 1.00x ±10% channels_last", "4000 0.50x ±10% contiguous"]
    assert row[5:] == ["1000 2.00x ±10%", "8000 0.25x ±10%", "FAILED"]
    once = [replace(record, rounds=1) for record in _records()]
    assert tables.speed(once)[1][5] == "1000 2.00x once"
    assert tables.memory(_records())[1][5] == "0.5 2.00x"
    assert len(tables.memory([replace(r, memory=None) for r in _records() if not r.failure])) == 1
    assert tables.rates(_records(), {"bf16": 1e12})[1][5] == "500.0 50%"
    assert tables.launches(_records())[1][5:7] == ["2000 / 500.0 / 1000", "2000 / - / 8000"]
    assert tables.roofline(_records())[1][5] == "50% 1.0 / 0.5"


def test_renderings() -> None:
    table = [["shape", "dtype", "pass", "conv"], ["a", "fp32", "forward", "1.00x"]]
    assert tables.align(table)[1] == "a      fp32   forward  1.00x"
    expected = [
        "| shape | dtype | pass | conv |",
        "| :-- | :-- | :-- | --: |",
        "| a | fp32 | forward | 1.00x |",
    ]
    assert tables.markdown(table) == expected


def _timed(shape: Shape, phase: str, **seconds: float) -> list[Record]:
    """Records of a CPU in fp32, by column."""
    labels = {"conv": True, "fft_conv": True, "auto": False}
    return [
        Record(
            shape,
            "fp32",
            phase,
            name.replace("_", " "),
            "contiguous",
            labels[name],
            value,
            0.0,
            5,
            memory=1000,
        )
        for name, value in seconds.items()
    ]


def _cpu_records() -> list[Record]:
    other = replace(shapes.CPU_STAGES[0], num_features=16)
    found = []
    for k in (3, 11):
        shape = next(s for s in shapes.CPU_STAGES if (s.in_channels, *s.kernel_size) == (128, k, k))
        fourier = {"fft_conv": 4e-3} if k == 11 else {}
        found += _timed(shape, "forward", conv=2e-3 * k, auto=1e-3, **fourier)
        found += _timed(shape, "step", conv=5e-3 * k, auto=4e-3, **fourier)
    return [*found, *_timed(other, "forward", conv=1e-3, auto=2e-3)]


def test_ratios_by_layer_and_kernel_size() -> None:
    (_, first), (_, second) = tables.headline(_cpu_records())
    assert first == [
        ["layer", "k = 3", "k = 11"],
        ["128 → 128 at 32²", "6.00x / 3.75x", "22.0x / 13.8x"],
        ["64 → 64 at 64², N = 16", "0.50x / -", ""],
    ]
    assert second == [["layer", "k = 11"], ["128 → 128 at 32²", "4.00x / 1.00x"]]
    assert tables.headline(_records()) == []
    against = tables.span(_cpu_records(), "auto", "conv")
    assert against == "0.50x to 22.0x forward, 3.75x to 13.8x forward + backward"
    assert tables.span(_records(), "auto", "conv") == ""


def test_summary_counts_wins_and_names_the_worst() -> None:
    lines = tables.summary([*_records(), *_records(_B)])
    assert lines[0].startswith(
        "triton against conv, forward: faster in 2 of 2 rows, geometric mean 2.00x"
    )
    assert any(line.startswith("slow") and "0 of 2" in line and _A.name in line for line in lines)


def test_classes_of_the_goals() -> None:
    def name(dims: int, kernel: int, channels: int = 64) -> str:
        return goals.class_of(Shape("any", 1, channels, 64, (8,) * dims, (kernel,) * dims))

    assert [name(2, k) for k in (3, 5, 7, 9, 11, 15, 31)] == [
        "k=3",
        "k=5",
        "k=7",
        "",
        "k=11",
        "k>=15",
        "k>=15",
    ]
    assert [name(3, k) for k in (3, 5, 7)] == ["", "3-D k=5", ""]
    assert name(1, 31) == name(2, 5, channels=32) == ""
    planned = {goals.class_of(shape) for shape, _ in shapes.GPU}
    assert planned == {"", *goals.CLASSES}


def _of_class(seconds: dict[str, float | None]) -> list[Record]:
    """nn.Conv at 1 s and triton at `seconds` for shapes of the suite, by name."""
    labels = [("conv", True), ("triton", False)]
    return [
        Record(
            shapes.SHAPES[name],
            "bf16",
            "forward",
            column,
            "channels_last",
            baseline,
            1.0 if baseline else value,
            failure="" if baseline or value else "wrong",
        )
        for name, value in seconds.items()
        for column, baseline in labels
    ]


def test_a_goal_is_met_by_its_worst_row() -> None:
    names = [
        s.name for s, d in shapes.GPU if (d, s.num_features, goals.class_of(s)) == ("bf16", 4, "k=5")
    ]
    assert len(names) == 6  # four of resnet, two of unet

    def verdict(*seconds: float | None) -> goals.Verdict:
        found = _of_class(dict(zip(names, seconds, strict=False)))
        return goals.by_class(found, "triton", "forward")[goals.CLASSES.index("k=5")]

    assert verdict(*[0.5] * 6).text == "met: 2.00x, worst 2.00x"
    assert verdict(0.5, 0.5).text == "met: 2.00x, worst 2.00x (2 of 6 rows)"
    missed = verdict(0.25, 1.0, 0.5, 0.5, 0.5, 0.5)
    assert missed.text == "missed: 2.00x, worst 1.00x"
    goal = "- triton, forward, k=5, >= 1.8"
    assert missed.misses() == [goal, f"  - {names[1]} bf16 forward: 1.00x, 0.80 short"]
    failed = verdict(0.5, None)
    assert failed.text == "missed: 2.00x, worst 2.00x (1 failed) (2 of 6 rows)"
    assert failed.misses() == [goal, f"  - {names[1]} bf16 forward: failed"]
    assert verdict().text == "not measured" and verdict(0.5).misses() == []


def test_other_types_count_towards_no_goal() -> None:
    found = [replace(record, dtype="fp16") for record in _of_class({shapes.RESNET[0].name: 0.5})]
    assert {verdict.status for verdict in goals.by_class(found, "triton", "forward")} == {"not measured"}


def test_goals_against_the_hyper_network_and_for_memory() -> None:
    found = [*_records(), *_records(phase="step")]
    ahead, compiled, memory = goals.everywhere(found, "triton")
    assert ahead.status == "met" and set(ahead.ratios.values()) == {4.0}
    assert compiled.status == "not measured"
    assert memory.status == "met" and len(memory.ratios) == 1
    heavy = [replace(r, memory=2**21) if r.column == "triton" else r for r in found]
    memory = goals.everywhere(heavy, "triton")[2]
    assert memory.status == "missed" and "0.50x, 0.50 short" in memory.misses()[1]


def test_goals_of_a_cpu() -> None:
    found = _cpu_records()
    verdicts = goals.on_cpu(found, "fp32", "forward", 128)
    assert [v.brief for v in verdicts] == [
        "met: 6.00x",
        *["not measured"] * 2,
        "met: 22.00x",
        "not measured",
    ]
    step = goals.on_cpu(found, "fp32", "step", 128)[3]
    assert step.brief == "missed: 13.75x" and step.rows == 1 and "0.25 short" in step.misses()[1]
    assert {
        v.rows
        for key in goals.CPU_TARGETS
        for c in goals.CPU_TARGETS[key]
        for v in goals.on_cpu([], *key, c)
    } == {1}
    others = {verdict.name: verdict for verdict in goals.elsewhere_on_cpu(found)}
    assert all(verdict.rows for verdict in others.values())
    assert others["every row but 1x1"].text == "missed: 5.09x, worst 0.50x (5 of 94 rows)"
    assert others["against an FFT convolution, k >= 11"].status == "met"
    assert others["peak memory of a training step"].brief == "met: 1.00x"


def test_report_of_a_gpu() -> None:
    text = report.report(_document([*_records(), *_records(phase="step")]))
    assert text.startswith("# Benchmarks on NVIDIA H200\n")
    assert "1000 2.00x ±10%" in text and "2000 / - / 8000" in text and "50% 1.0 / 0.5" in text
    assert "FAILED" in text and "wrong/contiguous: output: too far off" in text
    assert "met: 2.00x, worst 2.00x (1 of 6 rows)" in text
    assert "roofline.svg" in text


def _cpu_document() -> dict[str, Any]:
    document = _document(_cpu_records(), device="cpu")
    document["machine_info"] |= {"threads": "2", "instructions": "avx512"}
    document["ceilings"]["flops_per_second"] = {"fp32": 2e11}
    return document


def test_report_of_a_cpu() -> None:
    text = report.report(_cpu_document())
    assert text.startswith("# Benchmarks on a CPU\n")
    assert "the product of large matrices at 200 GFLOP/s in fp32" in text
    assert "| 128 → 128 at 32² | 6.00x / 3.75x | 22.0x / 13.8x |" in text
    assert "met: 22.00x (>= 18)" in text and "k = 11, >= 14" in text
    assert "- slower/contiguous, 1 rows: too slow" in text
    assert "cuda" not in text


def test_the_head_of_a_cpu_s_report_goes_between_the_marks() -> None:
    begin, end = report._MARKS
    document = _cpu_document()
    text = report.with_headline(f"before\n{begin}\nold\n{end}\nafter\n", document)
    assert text.startswith(f"before\n{begin}\n![") and text.endswith(f"\n{end}\nafter\n")
    assert "(benchmarks/results/cpu/time.svg)" in text and "old" not in text
    assert "by FFT, for large kernels: 4.00x to 4.00x forward, 1.00x" in text
    assert report.with_headline(text, document) == text
    with pytest.raises(ValueError, match="put them back"):
        report.with_headline("no marks", document)


def test_report_of_a_run_in_which_everything_failed(tmp_path: Path) -> None:
    source = tmp_path / "any.json"
    failed = [replace(r, seconds=None, spread=None, failure="lost") for r in _records()]
    for found in (failed, []):
        source.write_text(json.dumps(_document(found)))
        report.write(source, tmp_path)
        text = (tmp_path / "report.md").read_text()
        assert text.count(": lost\n") == len(found) and "x ±" not in text


def test_plots_are_a_function_of_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [*_records(), *_records(replace(_A, num_features=16)), *_records(phase="step")]
    source = tmp_path / "any.json"
    source.write_text(json.dumps(_document(found)))
    for folder in ("one", "two"):
        report.write(source, tmp_path / folder)
    for name in report.PLOTS:
        one, two = ((tmp_path / folder / f"{name}.svg").read_text() for folder in ("one", "two"))
        assert one == two
        assert "triton" in one
    faster = [replace(r, seconds=r.seconds and r.seconds / 2) if not r.baseline else r for r in found]
    source.write_text(json.dumps(_document(faster)))
    report.write(source, tmp_path / "three")
    for name in ("time", "kernel", "channels", "features", "roofline"):
        assert (tmp_path / "three" / f"{name}.svg").read_text() != (
            tmp_path / "one" / f"{name}.svg"
        ).read_text()


@pytest.mark.parametrize("command", [["benchmarks/report.py"], ["-m", "benchmarks.report"]])
def test_command(command: list[str], tmp_path: Path) -> None:
    source = tmp_path / "any.json"
    source.write_text(json.dumps(_document(_records())))
    # As on a machine without matplotlib.
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text("raise ImportError('none here')")
    arguments = [sys.executable, *command, str(source), "--output", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(blocked)}
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=_ROOT, env=environment, check=False
    )
    assert done.returncode == 1
    assert "report.md is written" in done.stderr and "pip install matplotlib" in done.stderr
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "report.md").read_text() == report.report(written)


def test_folder_of_a_device() -> None:
    assert report.slug(_document([], device="NVIDIA H200 141GB")) == "nvidia-h200-141gb"


@pytest.mark.parametrize("path", _RESULTS, ids=lambda path: path.parent.name)
def test_committed_reports_are_those_of_their_results(path: Path) -> None:
    document = json.loads(path.read_text())
    assert path.with_name("report.md").read_text() == report.report(document)
    assert path.parent.name == report.slug(document)


def test_the_readme_shows_the_committed_results() -> None:
    document = json.loads((Path(__file__).parent / "results/cpu/results.json").read_text())
    text = (_ROOT / "README.md").read_text()
    assert report.with_headline(text, document) == text
