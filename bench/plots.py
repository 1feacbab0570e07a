"""The pictures of a report, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from paired import duration

if TYPE_CHECKING:
    from report import Case, Row

INK, GRID, FLOOR = "#1f2430", "#d9dce3", "#c2410c"
COLOURS = {"reference": "#b4bac6", "compiled": "#7c88a1", "peer": "#e0a83e", "ours": "#0f766e"}
OTHER_PEER = "#f0d49a"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "fastcifar",
}


def floors(cases: Sequence[Case]) -> str:
    """Bars of time as a multiple of the floor, a panel a mode, as SVG text."""
    return _panels(cases, lambda row: row.floors, "time, as a multiple of the floor", "{:.1f}", log=True, line=1.0)


def memory(cases: Sequence[Case]) -> str:
    """Bars of peak extra memory, a panel a mode, as SVG text."""
    return _panels(cases, lambda row: row.peak_mb, "peak extra memory, MB", "{:.0f}", log=False, line=None)


def hero(cases: Sequence[Case], machine: str, path: Path) -> None:
    """The picture for the README: times of one workload, forward and forward+backward."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        for axes, case in zip(figure.subplots(1, 2), cases, strict=True):
            rows = [row for row in case.rows if row.seconds and row.role != "floor"]
            fastest = next(row for row in rows if row.role == "ours")
            slowest = max(row.seconds for row in rows)
            bars = axes.barh([row.name for row in rows], [row.seconds * 1e3 for row in rows], color=_colours(rows))
            labels = [_hero_label(row, case.baseline if row is fastest else None) for row in rows]
            axes.bar_label(bars, labels, padding=4, fontweight="bold")
            axes.axvline(case.floor * 1e3, color=FLOOR, linestyle="--", linewidth=1.2)
            axes.set(title=case.mode, xlabel="milliseconds; dashed: the floor set by memory")
            axes.set_xlim(0, slowest * 1.3e3)
            _finish(axes)
        figure.suptitle(f"{case.op.upper()} neurons, {case.workload}, on {machine}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None})


def times(tests: Sequence[dict[str, Any]], machine: str, path: Path) -> None:
    """A family's picture: the times of a few benchmarks, one panel each, from what they recorded (``extra_info``)."""
    with mpl.rc_context(STYLE):
        most = max(len(info["candidates"]) for info in tests)
        figure = Figure(figsize=(9, 0.9 + 0.28 * most), layout="constrained")
        for axes, info in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
            shown = {n: f for n, f in info["candidates"].items() if "seconds" in f and f["role"] != "floor"}
            medians = [facts["seconds"]["median"] for facts in shown.values()]
            largest = max(medians)
            unit, scale = ("ms", 1e3) if largest >= 1e-3 else ("microseconds", 1e6)
            colours = [COLOURS[facts["role"]] for facts in shown.values()]
            bars = axes.barh(list(shown), [median * scale for median in medians], color=colours, height=0.75)
            axes.bar_label(bars, [duration(median) for median in medians], padding=3, fontsize=8)
            if "floor" in info["candidates"]:
                floor = info["candidates"]["floor"]["seconds"]["median"]
                axes.axvline(floor * scale, color=FLOOR, linestyle="--", linewidth=1.2)
            axes.set_xlim(0, largest * scale * 1.25)
            mode = "" if info["mode"] == "call" else f", {info['mode']}"
            axes.set(xlabel=unit)
            lines = [*textwrap.wrap(info["op"] + mode, 36), *textwrap.wrap(info["workload"], 38)]
            axes.set_title("\n".join(lines), fontsize=7.5, loc="right")
            axes.tick_params(axis="y", labelsize=8)
            _finish(axes)
        figure.suptitle(f"on {machine}; dashed: the floor set by memory or arithmetic", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _hero_label(row: Row, baseline: str | None) -> str:
    text = duration(row.seconds)
    return f"{text}, {row.speed_up:.1f}x as fast as {baseline}" if baseline and row.speed_up else text


def _panels(cases: Sequence[Case], value, label: str, form: str, *, log: bool, line: float | None) -> str:
    modes = list(dict.fromkeys(case.mode for case in cases))
    tallest = max(sum(len(case.rows) + 0.4 for case in cases if case.mode == mode) for mode in modes)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6 * len(modes), 0.8 + 0.22 * tallest), layout="constrained")
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            top, ticks, highest = 0.0, {}, 1.0
            for case in (case for case in cases if case.mode == mode):
                rows = [row for row in case.rows if row.role != "floor" and value(row) is not None]
                axes.text(0.01, top, case.title, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
                places = [top + 1 + index for index in range(len(rows))]
                values = [value(row) for row in rows]
                bars = axes.barh(places, values, color=_colours(rows), height=0.8)
                axes.bar_label(bars, [form.format(number) for number in values], padding=3, fontsize=8)
                ticks |= dict(zip(places, (row.name for row in rows), strict=True))
                highest = max(highest, *values)
                top += len(rows) + 1.4
            axes.set_yticks(list(ticks), list(ticks.values()))
            axes.set_ylim(-0.6, top - 0.8)
            if log:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(0.7 if log else 0, highest**1.12 * 1.3 if log else highest * 1.12)
            if line is not None:
                axes.axvline(line, color=FLOOR, linestyle="--", linewidth=1.2, zorder=3)
            axes.set(title=mode, xlabel=label)
            _finish(axes)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _colours(rows: Sequence[Row]) -> list[str]:
    peers = [row.name for row in rows if row.role == "peer"]
    return [OTHER_PEER if row.name in peers[1:] else COLOURS[row.role] for row in rows]


def _finish(axes) -> None:
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
