"""Draws what the suite measured: ``python bench/report.py [JSON ...]`` prints the tables and writes the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import machine
import plots
from paired import duration
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
BUSY = 0.05  # share of the processors that other programs may take before the report says so


@dataclass(frozen=True)
class Row:
    """One candidate (or the floor) on one workload; None where a figure does not apply."""

    name: str
    role: str
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    speed_up: float | None = None  # the baseline's time over this one's
    behind: float | None = None  # this one's time over ours
    floors: float | None = None
    peak_mb: float | None = None
    saved: str = ""
    first_call: float | None = None
    remark: str = ""

    def cells(self) -> list[str]:
        spread = "" if self.p20 is None else f"{duration(self.p20)} to {duration(self.p80)}"
        return [
            self.name,
            duration(self.seconds) or self.remark,
            spread,
            _number(self.speed_up, "x"),
            _number(self.behind, "x"),
            _number(self.floors),
            "" if self.peak_mb is None else f"{self.peak_mb:.3g}",
            self.saved,
            duration(self.first_call),
        ]


@dataclass(frozen=True)
class Case:
    """One workload in one mode."""

    family: str
    op: str
    workload: str
    mode: str
    mapped: bool
    floor: float
    baseline: str
    rows: list[Row]
    remarks: list[str]

    @property
    def title(self) -> str:
        return self.workload + (", memory kept mapped" if self.mapped else "")

    def head(self) -> list[str]:
        return [
            f"{self.op}, {self.title}: {self.mode}",
            "time",
            "20 to 80 %",
            f"over {self.baseline}",
            "ours over it",
            "x floor",
            "peak MB",
            "saved B",
            "first call",
        ]


def read_case(info: dict[str, Any], ceilings: dict[str, float | None]) -> Case:
    """One test's ``extra_info`` as rows."""
    candidates = {name: facts for name, facts in info["candidates"].items() if facts["role"] != "floor"}
    (floor,) = (f["seconds"]["median"] for f in info["candidates"].values() if f["role"] == "floor")
    if ceilings["flops"]:
        floor = max(floor, info["flops"] / ceilings["flops"])
    timed = {name: facts for name, facts in candidates.items() if "seconds" in facts}
    checked = [name for name, facts in timed.items() if facts["checked"]]  # what gives other results is no baseline
    baseline = next((n for n in checked if timed[n]["role"] == "peer"), checked[0])
    ours = next((name for name, facts in timed.items() if facts["role"] == "ours"), None)
    rows, remarks = [], [info["note"]] if info["note"] else []
    for name, facts in candidates.items():
        if facts.get("note"):
            remarks.append(f"{name}: {facts['note']}")
        if name not in timed:
            rows.append(Row(name, facts["role"], remark=facts["skipped"]))
            remarks.append(f"{name}: {facts['skipped']}")
            continue
        seconds, ratios = facts["seconds"], info["ratios"]
        saved = f"{facts['saved_others'] / info['elements']:.3g}" if "saved_others" in facts else ""
        rows.append(
            Row(
                name=name,
                role=facts["role"],
                seconds=seconds["median"],
                p20=seconds["p20"],
                p80=seconds["p80"],
                speed_up=ratios[baseline][name]["median"],
                behind=ratios[name][ours]["median"] if ours else None,
                floors=seconds["median"] / floor,
                peak_mb=facts["peak_bytes"] * 1e-6,
                saved=f"{saved} + x" if facts.get("saved_inputs") else saved,
                first_call=None if info["mapped"] else facts["first_call"],
            )
        )
    rows.append(Row("floor", "floor", floor, floors=1.0))
    if info["other_programs"] > BUSY:
        remarks.append(f"other programs took {info['other_programs']:.0%} of the processors: time this again alone")
    return Case(
        family=info["group"],
        floor=floor,
        baseline=baseline,
        rows=rows,
        remarks=remarks,
        **{name: info[name] for name in ("op", "workload", "mode", "mapped")},
    )


def has_floor(info: dict[str, Any]) -> bool:
    """Whether a workload was timed beside its floor; if not, its first candidate is what the others are relative to."""
    return any(facts["role"] == "floor" for facts in info["candidates"].values())


def read_overhead(info: dict[str, Any]) -> list[list[str]]:
    """A table of single calls: the first candidate is what the others are relative to."""
    base = next(iter(info["candidates"]))
    cells = [[f"{info['op']}, {info['workload']}", "time", "relative", "target", ""]]
    for name, facts in info["candidates"].items():
        ratio = info["ratios"][name][base]["median"]
        target = f"{facts['target']:.3g}" if facts.get("target") else ""
        cells.append([name, duration(facts["seconds"]["median"]), f"{ratio:.2f}", target, facts.get("note", "")])
    return cells


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.{1 if value >= 9.95 else 2}f}{unit}"


def rich_table(family: str, cases: Sequence[Case]) -> Table:
    """One family's table for a terminal, without the spread, for which a line has no room."""
    table = Table(title=family, title_style="bold", title_justify="left", box=box.SIMPLE)
    for index, name in enumerate(["", *_without_spread(cases[0].head()[1:], 0)]):
        heading = name.replace(" ", "\n") if index != 1 else name
        table.add_column(heading, justify="right" if index else "left", max_width=None if index else 30)
    for case in cases:
        table.add_row(escape(case.head()[0]), style="italic")
        for row in case.rows:
            style = {"ours": "bold green", "floor": "dim"}.get(row.role)
            table.add_row(*_without_spread(row.cells(), 1), style=style, end_section=row is case.rows[-1])
    return table


def _without_spread(cells: list[str], time: int) -> list[str]:
    return cells[: time + 1] + cells[time + 2 :]


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    lines = [cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Results:
    """What one or more JSON files of the same machine hold."""

    about: dict[str, Any]
    lines: list[str]  # the machine, in words
    families: dict[str, dict[str, Any]]
    failed: list[str]
    infos: list[dict[str, Any]]

    @property
    def busy(self) -> bool:
        """Whether other programs ran meanwhile, which slows the peers' loops most."""
        return any(info["other_programs"] > BUSY for info in self.infos)

    def markdown(self) -> str:
        sections = ["\n".join(f"- {line}" for line in self.lines)]
        for name, family in self.families.items():
            tables = [[case.head(), *(row.cells() for row in case.rows)] for case in family["cases"]]
            notes = "\n".join(f"- {text}" for text in family["remarks"])
            sections += [f"## {name}", *map(markdown_table, tables + family["overhead"]), notes]
        return "\n\n".join(section for section in sections if section) + "\n"


def load(files: Sequence[Path]) -> Results:
    """Reads files that ``pytest bench --benchmark-json=FILE`` wrote.

    Raises:
        ValueError: a file is missing, or they are from different machines or versions.
    """
    if missing := [path for path in files if not path.exists()]:
        raise ValueError(f"{missing[0]} is not there; run: pytest bench --benchmark-json={missing[0]}")
    data = [json.loads(path.read_text()) for path in files]
    about = data[0]["machine_info"]["fastcifar"]
    if any(other["machine_info"]["fastcifar"] != about for other in data):
        raise ValueError("the files are from different machines or versions: never compare across them")
    measured = [ceilings for file in data for ceilings in file["ceilings"]]
    ceilings = {name: max((c[name] for c in measured if c[name]), default=None) for name in measured[0]}
    infos = [benchmark["extra_info"] for file in data for benchmark in file["benchmarks"]]
    families = {}
    for name in dict.fromkeys(info["group"] for info in infos):
        own = [info for info in infos if info["group"] == name]
        cases = [read_case(info, ceilings) for info in own if has_floor(info)]
        overhead = [read_overhead(info) for info in own if not has_floor(info)]
        families[name] = {
            "cases": cases,
            "overhead": overhead,
            "remarks": list(dict.fromkeys(f"{c.title}, {c.mode}: {text}" for c in cases for text in c.remarks)),
            "pictures": [plots.floors(cases), plots.memory(cases)] if cases else [],
        }
    failed = [line for file in data for line in file["remarks"]]
    return Results(about, machine.lines(about, ceilings), families, failed, infos)


def show(results: Results) -> None:
    """Prints the tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for name, family in results.families.items():
        if family["cases"]:
            console.print(rich_table(name, family["cases"]))
        for cells in family["overhead"]:
            table = Table(*cells[0])
            for row in cells[1:]:
                table.add_row(*row)
            console.print(table)
    remarks = results.failed + [text for family in results.families.values() for text in family["remarks"]]
    for text in (*results.lines, *remarks):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[HERE / "report" / "bench.json"])
    parser.add_argument("--out", type=Path, default=HERE / "report", help="folder of index.html and results.md")
    arguments = parser.parse_args()
    try:
        results = load(arguments.files)
    except ValueError as error:
        parser.error(str(error))
    show(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    template = environment.get_template("report.html.j2")
    page = template.render(lines=results.lines, failed=results.failed, families=results.families)
    (arguments.out / "index.html").write_text(page)
    (arguments.out / "results.md").write_text(results.markdown())
    print(f"written: {arguments.out / 'index.html'}, {arguments.out / 'results.md'}")


if __name__ == "__main__":
    main()
