"""Writes docs/compatibility.md from the tests' outcomes: ``python table.py outcomes.jsonl`` (make compatibility)."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from ecosystem.subjects import ELSEWHERE, FEATURES, SUBJECTS, why_not

from fastcifar.spec import all_specs

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
# Tests of tests/conformance.py by column of the table of ops.
OPS = {
    "test_compiles_to_one_graph": "torch.compile, one graph, also dynamic",
    "test_exports": "torch.export",
    "test_opcheck": "opcheck",
    "test_autocast_keeps_to_the_same_answer": "autocast",
    "test_torch_func_grad": "torch.func.grad",
    "test_vmap_equals_a_loop": "vmap",
    "test_vmap_of_grad_equals_a_loop": "vmap of grad",
    "test_torch_func_jvp": "jvp",
    "test_derivatives_of_first_and_second_order": "second derivative",
    "test_same_bits_for_any_thread_count_instruction_set_and_repetition": "same bits, any thread count",
}
NO_FORWARD_MODE = "Its surrogate or straight-through gradient has no forward mode: `torch.func.jvp` raises."
REFUSED = "A second derivative is refused in a sentence: there is none of a surrogate."
DECISION = "It decides or counts, and has no gradient."
NEEDS_GPU = "Needs a GPU: `make gpu-check` captures and replays every op there."


def load(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Outcomes (with reasons) of the tests by ``test[row]``: the row is that one of its parameters that names one."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    rows = sorted([s.name for s in SUBJECTS] + [s.name for s in all_specs()], key=len, reverse=True)
    for line in path.read_text().splitlines():
        name, outcome, reason = json.loads(line)
        match = re.search(r"::(test_\w+)\[(.+)\]$", name)
        if match:
            test, parameters = match.groups()
            row = next(
                (r for r in rows if parameters == r or re.search(rf"(^|-){re.escape(r)}($|-)", parameters)), None
            )
            if row:
                found[f"{test}[{row}]"].append((outcome, reason))
    return found


class Notes:
    """Footnotes, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}](#note-{self.texts.index(text) + 1})"

    def lines(self) -> list[str]:
        return [f'{i}. <span id="note-{i}"></span>{text}' for i, text in enumerate(self.texts, 1)]


def cell(outcomes: list[tuple[str, str]], notes: Notes, reason: str | None) -> str:
    """✓ where all passed, a footnote where it does not apply; anything else stops the page."""
    if any(outcome == "failed" for outcome, _ in outcomes):
        return "**fails**"
    if any(outcome == "passed" for outcome, _ in outcomes):
        return "✓"
    if reason is None and outcomes:
        reason = outcomes[0][1]
    return notes.mark(reason) if reason else "**not run**"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def of_ops(found: dict, notes: Notes) -> list[str]:
    rows = []
    for spec in all_specs():
        cells = [f"`{spec.family}.{spec.name}`"]
        for test in OPS:
            reason = None
            if not spec.differentiable and test not in ("test_compiles_to_one_graph", "test_exports", "test_opcheck"):
                reason = DECISION
            elif test == "test_derivatives_of_first_and_second_order" and not spec.smooth:
                reason = REFUSED
            elif test == "test_autocast_keeps_to_the_same_answer" and not spec.dtypes[0].is_floating_point:
                reason = DECISION
            shown = cell(found.get(f"{test}[{spec.name}]", []), notes, reason)
            if test == "test_torch_func_jvp" and shown == "✓" and raises_in_forward_mode(spec):
                shown = notes.mark(NO_FORWARD_MODE)
            cells.append(shown)
        cells.append(notes.mark(NEEDS_GPU))
        rows.append(cells)
    return table(["op", *OPS.values(), "CUDA graphs"], rows)


def raises_in_forward_mode(spec) -> bool:
    inputs = spec.sample("one", torch.float64 if torch.float64 in spec.dtypes else spec.dtypes[0], "cpu", 0)
    options = spec.options[0]
    first, *others = [n for n in inputs if n not in options]
    call = lambda t: spec.reference(**{first: t}, **{n: inputs[n] for n in others}, **options)[0]  # noqa: E731
    try:
        torch.func.jvp(call, (inputs[first],), (torch.ones_like(inputs[first]),))
    except NotImplementedError:
        return True
    return False


def of_modules(found: dict, notes: Notes) -> list[str]:
    rows = []
    for subject in SUBJECTS:
        cells = [f"`{subject.name}`"]
        for feature in FEATURES:
            shown = cell(found.get(f"test_{feature}[{subject.name}]", []), notes, why_not(subject, feature))
            if feature == "checkpoint" and shown == "✓" and (reason := subject.without.get("reentrant")):
                shown += " " + notes.mark(f"Without `use_reentrant`. {reason}")
            cells.append(shown)
        rows.append(cells)
    rows += [[f"`{name}`", notes.mark(reason), *[""] * (len(FEATURES) - 1)] for name, reason in ELSEWHERE.items()]
    return table(["module", *FEATURES.values()], rows)


def of_environments() -> list[str]:
    path = ROOT / "docs" / "data" / "environments.json"
    if not path.exists():
        return ["`make environments` has not been run."]
    head = ["Python", "torch", "numpy", "passed", "skipped", "failed", "remarks"]
    return table(head, [[str(run.get(key.lower(), "")) for key in head] for run in json.loads(path.read_text())])


def page(found: dict) -> str:
    notes = Notes()
    ops, modules = of_ops(found, notes), of_modules(found, notes)
    text = [
        "# What works with what",
        "",
        "Every cell is a test; `make compatibility` runs them and writes this page "
        f"(last: Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, CPU). ✓: the same "
        "outputs and gradients as the plain call. A number: it does not apply, or cannot work, for the reason below.",
        "",
        "A module that keeps a state from call to call (spiking neurons) must begin a checkpointed segment with "
        "`reset()`, since the segment runs twice.",
        "",
        "## Ops",
        "",
        *ops,
        "",
        "`tests/conformance.py` has these, and many more that are not about other features of PyTorch: layouts, "
        "dtypes, sizes, instruction sets.",
        "",
        "## Modules",
        "",
        *modules,
        "",
        "Peers' state_dicts load into the classes of `fastcifar.compat` and back: `tests/test_compat_*.py`.",
        "",
        "## Reasons",
        "",
        *notes.lines(),
        "",
        "## Environments",
        "",
        "One wheel (`cp310-abi3`) in every environment; `make environments` runs the conformance matrix there.",
        "",
        *of_environments(),
        "",
    ]
    return "\n".join(text)


def main() -> int:
    text = page(load(Path(sys.argv[1])))
    PAGE.write_text(text)
    gaps = text.count("**fails**") + text.count("**not run**")
    print(f"{PAGE.relative_to(ROOT)}: {text.count('✓')} cells pass, {gaps} gaps")
    return int(gaps > 0)


if __name__ == "__main__":
    sys.exit(main())
