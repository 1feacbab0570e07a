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

ISAS, NEURON_IDS, SURROGATES = ("baseline", "avx2"), range(18), range(15)
LIF = 3  # kLIFTimes: tau is a power of two
# Every instance of a kernel is a function of its own, by whose name callgrind counts, and so is what a half-precision
# row takes on its way in and out.
PARTS = "forward_blocks|backward_blocks|surrogate_row|read_row|write_row|write_spikes|write_bytes"
PARTS += "|spectral_gate|spectral_backward|spectral_reduce|fft"
PARTS += "|forward_row|backward_row|integer_product_best|integer_depthwise|few_classes|many_classes|decide"
PARTS += "|solver_step|solver_step_backward"
GRIDS = ((8, 8), (14, 14), (32, 32), (11, 15))  # of every kind of plan one
KERNEL = re.compile(rf"^\s*([\d,]+).*?(\w+::(?:(?:{PARTS})<.+>|normal))\(", re.M)


def run() -> None:
    """Calls each kernel once; this is what runs under callgrind."""
    import numpy as np

    from fastcifar import _host

    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, NEURONS)).astype(np.float32)
    half = (x.view(np.uint32) >> 16).astype(np.uint16)
    state = np.empty(NEURONS, np.float32)
    numbers = [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 2.0, 0.5, 0.5]
    for isa in ISAS:
        calls = [("float32", x, neuron, 0) for neuron in NEURON_IDS] + [("bfloat16", half, LIF, 0)]
        calls += [("float32", x, LIF, surrogate) for surrogate in SURROGATES[1:]]
        for dtype, given, neuron, surrogate in calls:
            out = np.empty_like(given)
            if surrogate == 0:
                _host.neuron_forward(isa, dtype, neuron, STEPS, NEURONS, given, None, out, state, numbers=numbers)
            _host.neuron_backward(
                *(isa, dtype, neuron, STEPS, NEURONS, given, None, None, given, None, out, None),
                numbers=numbers,
                surrogate=surrogate,
                widths=[1.0, 2.0, 0.5],
            )
        for height, width in GRIDS:
            tokens = rng.standard_normal((2, height, width, 32)).astype(np.float32)
            weight = rng.standard_normal((height, width // 2 + 1, 32, 2)).astype(np.float32)
            out, grad_weight = np.empty_like(tokens), np.empty_like(weight)
            _host.spectral_gate(isa, "float32", tokens, weight, out)
            _host.spectral_backward(isa, "float32", tokens, tokens, weight, out, grad_weight)
        fixed_point(isa, x.ravel(), rng)
        for classes in (10, 100):
            logits = rng.standard_normal((1024, classes)).astype(np.float32)
            score, lists = np.empty(1024, np.float32), [np.empty(1024, np.int64) for _ in range(3)]
            for criterion in range(4):
                _host.exit_decide(isa, "float32", logits, 0.3, criterion, score, *lists)
        diffusion(isa, x.ravel(), half.ravel())


def diffusion(isa: str, x, half) -> None:
    """DPM-Solver++ of second order and a step with every term, given and drawn noise, and a backward."""
    import numpy as np

    from fastcifar import _host

    multistep, every = np.zeros((3, 11)), np.tri(3, 11, 7)
    multistep[0, :2], multistep[2, [0, 2, 8]], every[2, 10] = 0.5, 0.5, 0.5
    for dtype, t in (("float32", x), ("bfloat16", half)):
        results = [np.empty_like(t) for _ in range(3)]
        _host.solver_step(isa, dtype, multistep, [t] * 3, [results[0], None, results[2]])
        _host.solver_step(isa, dtype, every, [t] * 8, results, noise=t, uncond=t, guidance=2.0, limit=1.0)
        _host.solver_step(isa, dtype, every, [t] * 8, results, seed=1)
        _host.solver_backward(isa, dtype, every, [t] * 8, [t] * 3, [np.empty_like(t) for _ in range(8)], noise=t)


def fixed_point(isa: str, x, rng) -> None:
    """One mode for each pair of a rounder and a bounder, in both precisions; products of every kind."""
    import numpy as np

    from fastcifar import _host

    double, modes = x.astype(np.float64), ((0, 0), (1, 0), (3, 0), (3, 2), (4, 0))
    for rounding, (overflow, saturated_bits) in itertools.product((4, 5, 7), modes):  # to even, down, at random
        mode = {"rounding": rounding, "overflow": overflow, "saturated_bits": saturated_bits}
        for dtype, given in (("float32", x), ("float64", double)):
            for grad in (None, given):
                _host.fixed_cast(isa, dtype, given, grad, np.empty_like(given), width=8, frac_bits=6, **mode)
    for channels, outputs, kernel in ((24, 40, (3, 3)), (130, 33, (1, 1))):
        images = rng.integers(-128, 128, (2, 9, 9, channels), dtype=np.int16)
        weight = rng.integers(-128, 128, (outputs, *kernel, channels), dtype=np.int16)
        each = rng.integers(-128, 128, (3, 3, channels), dtype=np.int16)
        for wide in (np.int32, np.int64):
            side = 10 - kernel[0]
            _host.integer_conv(isa, images, weight, np.empty((2, side, side, outputs), wide))
            _host.integer_conv(isa, images, each, np.empty((2, 9, 9, channels), wide), padding=[1, 1])


def measure() -> dict[str, int]:
    """Instructions of each kernel in all its calls, what it calls included, in one run of Python under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*_blocks<*"]
        # To the closing bracket: the lambdas in it are no functions to switch at.
        command += ["--toggle-collect=*::spectral_*<float>(fastcifar::SpectralProblem const&, long, long, void*)"]
        ends = "long, long, float?)"
        for taken in ("solver_step<*>(fastcifar::StepProblem const&, ", "solver_step_backward<*StepGradients const&, "):
            command += [f"--toggle-collect=*::{taken}{ends}"]
        names = "cast_items", "integer_product_best", "integer_depthwise", "decide"
        command += [f"--toggle-collect=*::{name}<*" for name in names]
        command += [f"--callgrind-out-file={out}", sys.executable, __file__, "--run"]
        subprocess.run(command, check=True, capture_output=True)
        command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", out]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = {name.replace("fastcifar::", ""): int(n.replace(",", "")) for n, name in KERNEL.findall(shown)}
    if not any("Izhikevich" in name for name in counts):
        raise RuntimeError(f"expected the neurons' kernels in callgrind's output, got {sorted(counts)}")
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
    worse = sorted(counts) != sorted(before)
    if worse:
        print(f"kernels changed: {sorted(set(counts) ^ set(before))}; --update takes them over")
    for kernel, count in counts.items():
        change = count / before.get(kernel, count)
        worse |= change > TOLERANCE
        print(f"{kernel:<60} {count:>9} {change - 1:+7.2%}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
