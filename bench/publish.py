"""Puts the last run's figures where they are quoted: ``python bench/publish.py`` (``make publish``).

Draws the front page's picture, rewrites the tables between markers in README.md and docs/, and files the run under
bench/results/ with the machine's name. Refuses a run during which other programs took the processors.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import plots
from paired import duration
from report import HERE, Case, Results, has_floor, load, markdown_table

from fastcifar.fixedpoint import OVERFLOWS, ROUNDINGS

ROOT = HERE.parent
RUN = HERE / "report" / "bench.json"


# The picture of each family's page: op, workload and mode of a few benchmarks.
PICTURES = {
    "spectral": [
        ("spectral_gate", "[64,8,8,256] float32", "forward"),
        ("spectral_gate", "[64,8,8,256] float32", "forward+backward"),
        ("spectral_gate", "[64,32,32,64] float32", "forward"),
    ],
    "fixedpoint": [
        ("quantize_trainable", "2^22 float32, width 8, rnd_conv, sat", "forward"),
        ("quantize_trainable", "2^22 float32, width 8, rnd_conv, sat", "forward+backward"),
        ("integer linear", "[512,1152] x [1152,256]", "call"),
    ],
    "earlyexit": [
        ("exit_decide confidence", "[4096,10] float32", "call"),
        ("exit_decide entropy", "[4096,1000] float32", "call"),
        ("earlyon wrapper", "[64,3,32,32], 32 to 256 channels, half leave at each", "call"),
    ],
    "diffusion": [
        ("solver_step", "DPM++2M [64,4,128,128] float32", "forward"),
        ("solver_step", "UniPC3 [64,4,128,128] float32", "forward"),
        ("scheduler.step", "UniPC 3 [64,3,32,32] float32", "step"),
    ],
    "accelerate": [
        ("SpikingJelly ResNet, multi-step", "[4,16,3,32,32], 17 layers of spiking", "forward+backward"),
        ("GFNet", "[64,3,32,32], 6 layers of spectral", "forward+backward"),
        ("brevitas CNN", "[64,3,32,32], 8 layers of fixedpoint", "forward+backward"),
    ],
}


def pictures(run: dict[str, Any], machine: str) -> None:
    """Draws those whose benchmarks were all run."""
    found = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if not info.get("mapped"):
            found[info["op"], info["workload"], info["mode"]] = info
    for family, wanted in PICTURES.items():
        if all(key in found for key in wanted):
            path = ROOT / "docs" / "images" / f"bench_{family}.png"
            plots.times([found[key] for key in wanted], machine, path)


def compact(cases: list[Case], ratios: bool = False) -> str:
    """A line a workload: time and multiple of the floor for each candidate and, with ``ratios``, of ours."""
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if row.role != "floor"))
    cells = [["", *names, "floor"]]
    for case in cases:
        rows = {row.name: row for row in case.rows}
        line = [f"{case.title}, {case.mode}"]
        for name in names:
            row = rows.get(name)
            if row is None or row.seconds is None:
                line.append("")
                continue
            times_ours = f"; {row.behind:.1f}" if ratios and row.role != "ours" and row.behind is not None else ""
            line.append(f"{duration(row.seconds)} ({row.floors:.1f}{times_ours})")
        cells.append([*line, duration(case.floor)])
    return markdown_table(cells)


def kept(cases: list[Case]) -> str:
    """A line a workload: what autograd keeps for backward, bytes an element, and the peak of memory."""
    cases = [case for case in cases if case.mode == "forward+backward"]
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if row.role != "floor"))
    cells = [["saved for backward, bytes an element, and peak extra memory", *names]]
    for case in cases:
        rows = {row.name: row for row in case.rows if row.seconds is not None}
        line = [f"{case.op}, {case.title}"]
        line += [f"{rows[name].saved}, {rows[name].peak_mb:.3g} MB" if name in rows else "" for name in names]
        cells.append(line)
    return markdown_table(cells)


def insert(path: Path, marker: str, text: str) -> None:
    """Replaces what stands between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    before = path.read_text()
    pattern = rf"(<!-- {marker} -->).*?(<!-- /{marker} -->)"
    after, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n{m[2]}", before, flags=re.S)
    if count != 1:
        raise ValueError(f"{path}: expected one pair of <!-- {marker} --> markers, found {count}")
    path.write_text(after)


def slim(run: dict[str, Any]) -> dict[str, Any]:
    """A run without the single times of every round, and of the machine only what `machine.describe` says."""
    run["machine_info"] = {"fastcifar": run["machine_info"]["fastcifar"]}
    for benchmark in run["benchmarks"]:
        benchmark.pop("stats", None)
        info = benchmark["extra_info"]
        for facts in info["candidates"].values():
            facts.pop("times", None)
        if not has_floor(info):  # a table relative to its first candidate
            base = next(iter(info["candidates"]))
            info["ratios"] = {name: {base: ratios[base]} for name, ratios in info["ratios"].items()}
    return run


def publish(results: Results) -> None:
    about = results.about
    chip = about["gpu"] or f"{about['cpu']} {about['isa']} {about['threads']} threads"
    name = re.sub(r"\W+", "-", chip.lower()).strip("-")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.md").write_text(results.markdown())
    (HERE / "results" / f"{name}.json").write_text(json.dumps(slim(json.loads(RUN.read_text())), indent=1) + "\n")
    if about["device"] != "cpu":
        return
    where = f"{about['cpu']}, {about['threads']} threads"
    neurons = results.families["spiking"]["cases"]
    # Fresh memory, not the op, decides these.
    mapped = {(case.op, case.workload) for case in neurons if case.mapped}
    plain = [case for case in neurons if (case.op, case.workload) not in mapped]
    plots.hero(plain[:2], where, ROOT / "docs" / "images" / "bench_spiking.png")
    pictures(json.loads(RUN.read_text()), where)
    spiking = [case for case in results.families["spiking"]["cases"] if case.op == "lif"]
    plif = [case for case in results.families["spiking"]["cases"] if case.op == "plif"]
    caption = f"Measured by `make bench` on {results.lines[0]}; in brackets the multiple of the floor.\n\n"
    insert(
        ROOT / "README.md",
        "bench",
        caption
        + compact(spiking)
        + "\n\nPLIF, whose learnt time constant takes a sum over all neurons and steps:\n\n"
        + compact(plif),
    )
    insert(ROOT / "docs" / "memory.md", "memory", markdown_table(results.families["memory"]["overhead"][0]))
    for marker, word in (("neurons", "every neuron"), ("formats", "spike formats"), ("packed", "packed_conv2d")):
        found = [cells for cells in results.families["spiking"]["overhead"] if cells[0][0].startswith(word)]
        page = caption.replace("; in brackets the multiple of the floor", "") + "\n\n".join(map(markdown_table, found))
        insert(ROOT / "docs" / "spiking.md", marker, page)
    publish_spectral(results, caption)
    publish_fixedpoint(results, caption)
    publish_earlyexit(results, caption)
    publish_diffusion(results, caption)
    publish_search(results, caption)
    publish_accelerate(json.loads(RUN.read_text()), caption)
    for family, prefix in (("spiking", "grid"), ("spectral", "grid-spectral")):
        grid = HERE / "results" / f"{prefix}-{name}.md"
        if grid.exists():
            insert(ROOT / "docs" / f"{family}.md", "grid", grid.read_text().strip())


def publish_accelerate(run: dict[str, Any], caption: str) -> None:
    cells = [["", "layers before", "after", "times as fast", "whole model", "times as fast"]]
    for info in (benchmark["extra_info"] for benchmark in run["benchmarks"]):
        if info["group"] != "accelerate":
            continue
        before, after, whole_before, whole_after = info["candidates"]
        times = {name: duration(facts["seconds"]["median"]) for name, facts in info["candidates"].items()}
        ratio = info["ratios"][after][before]["median"]
        whole = info["ratios"][whole_after][before]["median"] / info["ratios"][whole_before][before]["median"]
        title = f"{info['op']}, {info['workload']}, {info['mode']}"
        models = f"{times[whole_before]} to {times[whole_after]}"
        cells.append([title, times[before], times[after], f"{1 / ratio:.1f}", models, f"{1 / whole:.2f}"])
    if len(cells) > 1:
        text = caption.replace("; in brackets the multiple of the floor", "") + markdown_table(cells)
        insert(ROOT / "docs" / "accelerate.md", "accelerate", text)


def publish_spectral(results: Results, caption: str) -> None:
    if "spectral" not in results.families:
        return
    family, page = results.families["spectral"], ROOT / "docs" / "spectral.md"
    gate = [case for case in family["cases"] if case.op == "spectral_gate"]
    others = [case for case in family["cases"] if case.op in ("afno", "fnet")]
    for path in (page, ROOT / "README.md"):
        insert(path, "spectral", caption + compact(gate))
    insert(page, "kept", kept(gate + others))
    named = [replace(case, workload=f"{case.op}, {case.workload}") for case in others]
    insert(page, "mixers", caption + compact(named))
    insert(page, "training", "\n\n".join(map(markdown_table, family["overhead"])))


def publish_fixedpoint(results: Results, caption: str) -> None:
    if "fixedpoint" not in results.families:
        return
    family, page = results.families["fixedpoint"], ROOT / "docs" / "fixedpoint.md"
    plain = caption.replace("; in brackets the multiple of the floor", "")
    both = caption.replace("the multiple of the floor", "the multiples of the floor and of our time")
    casts = [case for case in family["cases"] if case.op == "quantize_trainable"]
    for path in (page, ROOT / "README.md") if casts else ():
        insert(path, "fixedpoint", both + compact(casts, ratios=True))
    tables = family["overhead"]
    modes = [by_modes(cells) for cells in tables if cells[0][0].startswith("every mode")]
    products = [cells for cells in tables if cells[0][0].startswith("integer ")]
    for marker, found in (("modes", modes), ("products", products)):
        if not found:  # in a run of a part
            continue
        insert(page, marker, plain + "\n\n".join(map(markdown_table, found)))


def by_modes(cells: list[list[str]]) -> list[list[str]]:
    """The table of every mode, a line a candidate named "rounding, overflow", as lines of roundings and columns of
    overflows: the multiple of the time of the fastest, which is the first candidate."""
    relative = {tuple(name.split(", ")): ratio for name, _, ratio, *_ in cells[1:]}
    head = f"{cells[0][0]}: times the {cells[1][1]} of the fastest"
    return [[head, *OVERFLOWS], *([rounding, *(relative[rounding, o] for o in OVERFLOWS)] for rounding in ROUNDINGS)]


def publish_earlyexit(results: Results, caption: str) -> None:
    if "earlyexit" not in results.families:
        return
    tables = results.families["earlyexit"]["overhead"]
    ops = [cells for cells in tables if cells[0][0].startswith(("exit_decide", "compact", "find_thresholds"))]
    models = [cells for cells in tables if cells not in ops]
    plain = caption.replace("; in brackets the multiple of the floor", "")
    for marker, found in (("ops", ops), ("models", models)):
        if found:
            insert(ROOT / "docs" / "earlyexit.md", marker, plain + "\n\n".join(map(markdown_table, found)))


# A marker of docs/diffusion.md, and how the tables between it begin.
DIFFUSION = {
    "parts": ("solver_step,", "normal_numbers,", "dynamic_threshold,"),
    "schedulers": ("scheduler.step,",),
    "tree": ("tree search",),
}


def publish_diffusion(results: Results, caption: str) -> None:
    if "diffusion" not in results.families:
        return
    family, page = results.families["diffusion"], ROOT / "docs" / "diffusion.md"
    both = caption.replace("the multiple of the floor", "the multiples of the floor and of our time")
    steps = [case for case in family["cases"] if case.op == "solver_step"]
    small = [case for case in steps if "[64,3,32,32]" in case.workload]
    for path, found in ((page, steps), (ROOT / "README.md", small)):
        if found:
            insert(path, "diffusion", both + compact(found, ratios=True))
    plain = caption.replace("; in brackets the multiple of the floor", "")
    named: dict[str, list[list[list[str]]]] = {}
    for cells in family["overhead"]:
        marker = next((m for m, words in DIFFUSION.items() if cells[0][0].startswith(words)), "papers")
        named.setdefault(marker, []).append(cells)
    for marker, found in named.items():
        insert(page, marker, plain + "\n\n".join(map(markdown_table, found)))


def publish_search(results: Results, caption: str) -> None:
    if "solver_search" in results.families:
        plain = caption.replace("; in brackets the multiple of the floor", "")
        tables = results.families["solver_search"]["overhead"]
        insert(ROOT / "docs" / "diffusion_search.md", "searched", plain + "\n\n".join(map(markdown_table, tables)))


def main() -> int:
    results = load([RUN])
    if results.busy:
        print("publish: other programs ran during the benchmarks, and slow the peers' loops most; run them alone")
        return 1
    publish(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
