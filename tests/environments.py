"""The wheel of dist/ in other environments: ``python environments.py python ...`` (make environments).

Each argument is the python of an environment that has torch, numpy, pytest, hypothesis, apytypes, scipy and tqdm. The
wheel is installed there without its dependencies, the conformance matrix and each family's own tests run from another
folder, and the outcome goes into docs/data/environments.json, which ``make compatibility`` renders. Tests of peers are
not among them.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "data" / "environments.json"
TESTS = [
    "conformance.py",
    *(f"test_{name}.py" for name in ("spiking", "spectral", "fixedpoint", "earlyexit", "diffusion")),
]
FACTS = """
import platform, torch, numpy
print(platform.python_version(), torch.__version__.partition("+")[0], numpy.__version__)
"""


def run(python: str, wheel: Path) -> dict[str, str | int]:
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel], check=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        shutil.copyfile(ROOT / "pyproject.toml", Path(folder, "pyproject.toml"))
        facts = subprocess.run([python, "-c", FACTS], cwd=folder, capture_output=True, text=True, check=True)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    failed = sorted(set(re.findall(r"^FAILED tests/(\S+)", done.stdout, re.M)))
    versions = dict(zip(("python", "torch", "numpy"), facts.stdout.split(), strict=True))
    today = datetime.date.today().isoformat()
    return {
        **versions,
        **{w: counts.get(w, 0) for w in ("passed", "skipped", "failed")},
        "failures": failed,
        "date": today,
    }


def main(pythons: list[str]) -> int:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    for python in pythons:
        result = run(python, wheel)
        known = json.loads(OUT.read_text()) if OUT.exists() else []
        print(json.dumps(result, indent=1), flush=True)
        key = [result[name] for name in ("python", "torch", "numpy")]
        (old,) = [e for e in known if [e[n] for n in ("python", "torch", "numpy")] == key] or [{}]
        known = [e for e in known if e is not old] + [{**result, "remarks": old.get("remarks", "")}]
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(sorted(known, key=lambda e: e["python"]), indent=1) + "\n")
    return int(not pythons)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
