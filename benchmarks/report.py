"""From the JSON of a run to a report and its plots: `python benchmarks/report.py results.json`.

What a CPU's says first is also in README.md, between two marks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import goals, shapes, tables
from benchmarks.records import AUTO, FOURIER, PHASE_NAMES, PHASES, Record, left_out, load

PLOTS = {
    "time": "Time against the kernel size, of the layer that was measured with most of them.",
    "kernel": "Speed-up over nn.Conv in 2-D against the kernel size: geometric means, and every row.",
    "channels": "Speed-up over nn.Conv against the input channels.",
    "features": "Speed-up over nn.Conv against N, the number of features.",
    "memory": "Peak memory of nn.Conv over that of each competitor in 2-D, against the kernel size.",
    "roofline": "Operations of the direct convolution a second against their number per byte, under the "
    "ceilings measured in the same run.",
}


_ROOT = Path(__file__).resolve().parents[1]
_MARKS = ("<!-- benchmarks/report.py writes this -->", "<!-- until here -->")
_UNMEASURED = "Not measured yet: `make bench` does."


def on_gpu(document: Mapping[str, Any]) -> bool:
    return document["machine_info"]["device"] != "cpu"


def slug(document: Mapping[str, Any]) -> str:
    """The name of the device as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", document["machine_info"]["device"].lower()).strip("-")


def plot_names(document: Mapping[str, Any]) -> list[str]:
    """Those that have something to show."""
    return list(PLOTS) if document["benchmarks"] else []


def _head(document: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    facts = dict(document["machine_info"])
    if on_gpu(document):
        lines = [f"# Benchmarks on {facts['device']}", ""]
        lines += ["Medians of the device's own time with a cold L2 cache; a ratio below 1 is a loss."]
    else:
        lines = ["# Benchmarks on a CPU", ""]
        lines += ["Medians of the wall clock with warm caches, all threads; a ratio below 1 is a loss."]
    planned = len(PHASES) * len(shapes.GPU if on_gpu(document) else shapes.CPU)
    rows = len({record.row for record in records})
    brand = facts.get("cpu", {}).get("brand_raw")
    commit = document["commit_info"]
    told = {name: value for name, value in facts.items() if name != "cpu"}
    told |= {"CPU": brand, "commit": f"{str(commit['id'])[:12]}{'+' if commit['dirty'] else ''}"}
    return [
        *lines,
        "Every competitor passed the correctness gate before it was timed; baselines ran in both",
        "layouts, the faster is shown.",
        "",
        f"{rows} of the suite's {planned} rows were run, on {document['datetime'][:10]}: "
        + ", ".join(f"{name} {value}" for name, value in told.items())
        + f". {_ceilings(document)}",
    ]


def _ceilings(document: Mapping[str, Any]) -> str:
    """What the machine did at most in the same run."""
    found = document["ceilings"]
    rates = [f"{rate / 1e9:,.0f} GFLOP/s in {d}" for d, rate in found["flops_per_second"].items()]
    if not rates or not found["bytes_per_second"]:
        return ""
    text = f"Ceilings, measured in the same run: the product of large matrices at {' and '.join(rates)}"
    return f"{text}, a copy in memory at {found['bytes_per_second'] / 1e9:,.0f} GB/s."


def _machine(document: Mapping[str, Any]) -> str:
    """What a CPU's first tables were measured on and with."""
    facts = document["machine_info"]
    brand = facts.get("cpu", {}).get("brand_raw") or "CPU"
    return (
        f"{facts['threads']} threads of an {brand} ({facts['instructions']}), torch {facts['torch']}, "
        f"fp32 and N = 4 (R = 5) where not said otherwise, `backend='auto'`. By default a layer has "
        f"N = 8 from 49 taps on. Forward is a call in evaluation, without gradients: a layer keeps its "
        f"kernel, as nn.ConvNd has its own."
    )


def _figure(folder: str) -> str:
    return f"![{PLOTS['time']}]({folder}time.svg)"


def headline(document: Mapping[str, Any]) -> list[str]:
    """A CPU's first figure and tables, Markdown."""
    found = tables.headline(load(document))
    if not found:
        return [_UNMEASURED]
    lines = [_figure("")]
    for caption, table in found:
        lines += ["", caption, "", *tables.markdown(table, labels=1)]
    return [*lines, "", f"{_machine(document)} {_ceilings(document)}"]


def brief(document: Mapping[str, Any], folder: str) -> list[str]:
    """Of `headline` the figure, which is in `folder`, and the first table; of the second its range."""
    records = load(document)
    found = tables.headline(records)
    if not found:
        return [_UNMEASURED]
    caption, table = found[0]
    lines = [_figure(folder), "", caption, "", *tables.markdown(table, labels=1), "", _machine(document)]
    if against := tables.span(records, AUTO, FOURIER):
        lines.append(f"Against a dense convolution by FFT, for large kernels: {against}.")
    return lines


def with_headline(text: str, document: Mapping[str, Any]) -> str:
    """README.md with what the CPU's results say between the marks."""
    begin, end = _MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md: expected the marks {begin} and {end} once each; put them back")
    before, rest = text.split(begin)
    lines = brief(document, f"benchmarks/results/{slug(document)}/")
    return "\n".join([f"{before}{begin}", *lines, f"{end}{rest.split(end)[1]}"])


def _cpu_goals(records: Sequence[Record]) -> list[str]:
    lines = [
        "## Goals",
        "",
        "Speed-ups of `auto` over nn.Conv in its better layout, 64, 128 and 256 channels at 64², 32²",
        "and 16², N = 4, two threads.",
    ]
    misses: list[str] = []
    for (dtype, phase), targets in goals.CPU_TARGETS.items():
        table = [[f"{PHASE_NAMES[phase]}, {dtype}", *(f"k = {kernel}" for kernel in goals.CPU_KERNELS)]]
        for channels in targets:
            verdicts = goals.on_cpu(records, dtype, phase, channels)
            cells = [f"{verdict.brief} (>= {verdict.target:g})" for verdict in verdicts]
            table.append([f"{channels} channels", *cells])
            misses += chain.from_iterable(verdict.misses() for verdict in verdicts)
        lines += ["", *tables.markdown(table, labels=1)]
    table = [["both passes", "ratio"]]
    for verdict in goals.elsewhere_on_cpu(records):
        table.append([f"{verdict.name} (>= {verdict.target:g})", verdict.text])
        misses += verdict.misses()
    lines += ["", *tables.markdown(table, labels=1)]
    return [*lines, "", "Missed:", "", *misses] if misses else lines


def _gpu_goals(records: Sequence[Record]) -> list[str]:
    headings = [f"{name} (>= {{}})" for name in goals.CLASSES]
    lines = [
        "## Goals",
        "",
        "Set for a GPU of the H200's class, bf16, N = 4: speed-ups over nn.Conv in its better layout,",
        "by kernel size and, where not said otherwise, in 2-D, of layers with 64 channels or more. A",
        "goal is met if its worst row meets it.",
    ]
    misses: list[str] = []
    for phase in PHASES:
        targets = goals.TARGETS[phase].values()
        heading = [text.format(target) for text, target in zip(headings, targets, strict=True)]
        table = [[PHASE_NAMES[phase], *heading]]
        for backend in goals.BACKENDS:
            verdicts = goals.by_class(records, backend, phase)
            table.append([backend, *(verdict.text for verdict in verdicts)])
            misses += chain.from_iterable(verdict.misses() for verdict in verdicts)
        lines += ["", *tables.markdown(table, labels=1)]
    table = [["everywhere", "ratio (>= 1)"]]
    for backend in goals.BACKENDS:
        for verdict in goals.everywhere(records, backend):
            table.append([verdict.name, verdict.text])
            misses += verdict.misses()
    lines += ["", *tables.markdown(table, labels=1)]
    if misses:
        lines += ["", "Missed:", "", *misses]
    return lines


def _tier(document: Mapping[str, Any], records: Sequence[Record], tier: tuple[str, int]) -> list[str]:
    parts = [
        (tables.SPEED, tables.speed(records)),
        (tables.MEMORY, tables.memory(records)),
        (tables.ROOFLINE, tables.roofline(records)),
    ]
    if on_gpu(document):
        parts.insert(1, (tables.LAUNCHES, tables.launches(records)))
    else:
        rates = tables.rates(records, document["ceilings"]["flops_per_second"])
        parts.insert(1, (tables.RATES, rates))
    lines = [f"## {tier[0]}, N = {tier[1]}"]
    for caption, table in parts:
        lines += ["", caption, "", *tables.markdown(table)]
    return lines


def report(document: Mapping[str, Any]) -> str:
    """The whole report, Markdown, a function of the JSON alone."""
    records = load(document)
    sections = [_head(document, records)]
    if on_gpu(document):
        sections.append(_gpu_goals(records))
    else:
        sections += [["## Against the kernel size", "", *headline(document)], _cpu_goals(records)]
    if summary := [f"- {line}" for line in tables.summary(records)]:
        sections.append(["## Summary", "", *summary])
    failures = [f"- {r.row.name}, {r.column}/{r.layout}: {r.failure}" for r in records if r.failure]
    if failures:
        sections.append(["## Failures", "", *failures])
    omitted = Counter((record.column, record.layout, record.failure) for record in left_out(document))
    if omitted:
        lines = [f"- {column}/{layout}, {n} rows: {why}" for (column, layout, why), n in omitted.items()]
        sections.append(["## Left out", "", *lines])
    plots = [["", PLOTS[name], "", f"![{PLOTS[name]}]({name}.svg)"] for name in plot_names(document)]
    if plots:
        sections.append(["## Plots", *chain.from_iterable(plots)])
    for tier in dict.fromkeys(record.row.tier for record in records):
        sections.append(_tier(document, [r for r in records if r.row.tier == tier], tier))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def write(source: Path, folder: Path) -> None:
    """The report of `source`, a copy of it and the plots, into `folder`.

    Raises:
        ImportError: matplotlib is missing; the report is written all the same.
    """
    document = json.loads(source.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(report(document))
    drawn = plot_names(document)
    if not drawn:
        return
    from benchmarks import plots

    for name in drawn:
        plots.draw(name, load(document), document["ceilings"], folder / f"{name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    text = "folder; default: benchmarks/results/DEVICE, and of a CPU also README.md"
    parser.add_argument("--output", type=Path, help=text)
    options = parser.parse_args()
    folder = options.output
    if folder is None:
        document = json.loads(options.results.read_text())
        folder = _ROOT / "benchmarks" / "results" / slug(document)
        if not on_gpu(document):
            readme = _ROOT / "README.md"
            readme.write_text(with_headline(readme.read_text(), document))
    try:
        write(options.results, folder)
    except ImportError as error:
        parser.exit(1, f"{folder / 'report.md'} is written, but no plot: {error}\n")
    print(folder / "report.md")


if __name__ == "__main__":
    main()
