"""Instruction counts of the raw kernels, from callgrind: exactly repeatable, whatever else the machine is doing.

    python tests/instructions.py            compare with tests/data/instructions.json; fail beyond +2 %
    python tests/instructions.py --update   write that file anew (for a change that is worth its instructions)

Counts belong to a compiler: the file holds one table for each version that it was made with. valgrind executes AVX2 but
not AVX-512.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).parent / "data" / "instructions.json"
TOLERANCE = 1.02
STEPS, NEURONS = 4, 8192

ISAS, DTYPES, SURROGATES = ("baseline", "avx2"), ("float32", "bfloat16"), range(4)
# Every instance of a kernel is a function of its own, by whose name callgrind counts.
KERNEL = re.compile(r"^\s*([\d,]+).*?(\w+::lif_\w+_blocks<[^>]+>)", re.M)


def run() -> None:
    """Calls each kernel once; this is what runs under callgrind."""
    import numpy as np

    from fastcifar import _host

    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, NEURONS)).astype(np.float32)
    for isa, dtype in itertools.product(ISAS, DTYPES):
        x_ = x if dtype == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)
        out, state = np.empty_like(x_), np.empty(NEURONS, np.float32)
        _host.lif_forward(isa, dtype, STEPS, NEURONS, x_, None, out, state)
        for surrogate in SURROGATES:
            _host.lif_backward(isa, dtype, STEPS, NEURONS, x_, None, None, x_, None, out, None, surrogate=surrogate)


def measure() -> dict[str, int]:
    """Instructions of each kernel, what it calls included, in one run of Python under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*lif_*_blocks<*"]
        command += [f"--callgrind-out-file={out}", sys.executable, __file__, "--run"]
        subprocess.run(command, check=True, capture_output=True)
        command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", out]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = {name.removeprefix("fastcifar::"): int(n.replace(",", "")) for n, name in KERNEL.findall(shown)}
    expected = len(ISAS) * len(DTYPES) * (1 + len(SURROGATES))
    if len(counts) != expected:
        raise RuntimeError(f"expected {expected} kernels in callgrind's output, got {sorted(counts)}")
    return dict(sorted(counts.items()))


def compiler() -> str:
    shown = subprocess.run(["g++", "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=True)
    return f"g++ {shown.stdout.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run()
        return 0
    tables = json.loads(FILE.read_text()) if FILE.exists() else {}
    counts = measure()
    if arguments.update:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(tables | {compiler(): counts}, indent=1) + "\n")
        return 0
    before = tables.get(compiler())
    if before is None:
        print(f"no counts for {compiler()} in {FILE.name}; --update adds them")
        return 3
    worse = False
    for kernel, count in counts.items():
        change = count / before[kernel]
        worse |= change > TOLERANCE
        print(f"{kernel:<60} {count:>9} {count / (STEPS * NEURONS):7.2f} an element-step  {change - 1:+7.2%}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
