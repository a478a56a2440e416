"""From the JSON of a run to a report and its plots: `python benchmarks/report.py results.json`.

Of a CPU only ratios are reported.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import goals, shapes, tables
from benchmarks.records import PHASE_NAMES, PHASES, Record, load

PLOTS = {
    "kernel": "Speed-up over nn.Conv in 2-D against the kernel size: geometric means, and every row.",
    "channels": "Speed-up over nn.Conv against the input channels.",
    "features": "Speed-up over nn.Conv against N, the number of features.",
    "memory": "Peak memory of nn.Conv over that of each competitor in 2-D, against the kernel size.",
    "roofline": "Operations of the direct convolution a second against their number per byte, under the "
    "ceilings measured in the same run.",
}


def on_gpu(document: Mapping[str, Any]) -> bool:
    return document["machine_info"]["device"] != "cpu"


def slug(document: Mapping[str, Any]) -> str:
    """The name of the device as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", document["machine_info"]["device"].lower()).strip("-")


def plot_names(document: Mapping[str, Any]) -> list[str]:
    """Those that have something to show. The roofline is in TFLOP/s, which is not for a CPU's report."""
    drawn = PLOTS if document["benchmarks"] else ()
    return [name for name in drawn if on_gpu(document) or name != "roofline"]


def _head(document: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    facts = dict(document["machine_info"])
    if on_gpu(document):
        lines = [f"# Benchmarks on {facts['device']}", ""]
        lines += ["Medians of the device's own time with a cold L2 cache; a ratio below 1 is a loss."]
    else:
        lines = ["# Benchmarks on a CPU", "", "**No GPU has measured anything in this report.** "]
        lines[-1] += "It holds ratios of wall-clock"
        lines += [
            "times where no fused kernel runs, which say nothing of the kernels' speed. A ratio below 1"
        ]
        lines += ["is a loss."]
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
        + ".",
    ]


def _goals(document: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """On a CPU nothing counts towards a goal."""
    counted = records if on_gpu(document) else []
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
            verdicts = goals.by_class(counted, backend, phase)
            table.append([backend, *(verdict.text for verdict in verdicts)])
            misses += chain.from_iterable(verdict.misses() for verdict in verdicts)
        lines += ["", *tables.markdown(table, labels=1)]
    table = [["everywhere", "ratio (>= 1)"]]
    for backend in goals.BACKENDS:
        for verdict in goals.everywhere(counted, backend):
            table.append([verdict.name, verdict.text])
            misses += verdict.misses()
    lines += ["", *tables.markdown(table, labels=1)]
    if misses:
        lines += ["", "Missed:", "", *misses]
    return lines


def _tier(document: Mapping[str, Any], records: Sequence[Record], tier: tuple[str, int]) -> list[str]:
    gpu = on_gpu(document)
    parts = [
        (tables.SPEED if gpu else tables.SPEED_RATIOS, tables.speed(records, gpu)),
        (tables.MEMORY if gpu else tables.MEMORY_RATIOS, tables.memory(records, gpu)),
        (tables.ROOFLINE if gpu else tables.ROOFLINE_RATIOS, tables.roofline(records, gpu)),
    ]
    if gpu:
        parts.insert(1, (tables.LAUNCHES, tables.launches(records)))
    lines = [f"## {tier[0]}, N = {tier[1]}"]
    for caption, table in parts:
        lines += ["", caption, "", *tables.markdown(table)]
    return lines


def report(document: Mapping[str, Any]) -> str:
    """The whole report, Markdown, a function of the JSON alone."""
    records = load(document)
    sections = [_head(document, records), _goals(document, records)]
    if summary := [f"- {line}" for line in tables.summary(records)]:
        sections.append(["## Summary", "", *summary])
    failures = [f"- {r.row.name}, {r.column}/{r.layout}: {r.failure}" for r in records if r.failure]
    if failures:
        sections.append(["## Failures", "", *failures])
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
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/DEVICE")
    options = parser.parse_args()
    folder = options.output
    if folder is None:
        name = slug(json.loads(options.results.read_text()))
        folder = Path(__file__).resolve().parent / "results" / name
    try:
        write(options.results, folder)
    except ImportError as error:
        parser.exit(1, f"{folder / 'report.md'} is written, but no plot: {error}\n")
    print(folder / "report.md")


if __name__ == "__main__":
    main()
