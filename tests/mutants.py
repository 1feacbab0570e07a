"""The mutation drill: ``python tests/mutants.py [words]`` (make mutants): one seeded bug at a time must fail a test.

tests/data/mutants.toml lists the bugs. Each is put into a copy of the tree, where only what it touches is built: of a
kernel its family's baseline kernels alone, without optimization, linked in front of the others; of a host file that
file; of Python and Triton nothing. The tests named for it then run with the baseline kernels in use and must fail.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "data" / "mutants.toml"
OBJECTS = ROOT / "build" / "objects" / "_C"
MATRIX = "tests/conformance.py"
# Files by the family file that includes them, and the tests that answer for a file.
OF = {
    "neurons": "spiking",
    "surrogates": "spiking",
    "rows": "spiking",
    "cast": "fixedpoint",
    "digits": "fixedpoint",
    "normal": "diffusion",
}
OF |= {
    "power": "earlyexit",
    "lanes": "earlyexit",
    "fft": "spectral",
    "codelets": "spectral",
    "grid": "spectral",
    "butterflies": "spectral",
}
SPIKING = [
    "tests/test_spiking.py",
    "tests/test_neurons.py",
    MATRIX,
    "-k",
    "not spikingjelly and not snntorch and not peer",
]
TESTS = {
    "spiking": SPIKING,
    "surrogates": ["tests/test_surrogates.py"],
    "packed": ["tests/test_packed.py"],
    "spectral": [
        "tests/test_spectral.py",
        "tests/test_mixers.py",
        MATRIX,
        "-k",
        "spect or fnet or gate or large or odd",
    ],
    "fixedpoint": ["tests/test_fixedpoint.py", MATRIX, "-k", "test_fixedpoint or quantize or digits"],
    "integer_matmul": ["tests/test_fixed_products.py"],
    "earlyexit": [
        "tests/test_earlyexit.py",
        "tests/test_earlyexit_rows.py",
        MATRIX,
        "-k",
        "exit or row or class or score",
    ],
    "diffusion": [
        "tests/test_diffusion.py",
        "tests/test_solver_run.py",
        MATRIX,
        "-k",
        "test_diffusion or test_solver_run or solver_step",
    ],
    "tree": ["tests/test_tree_kernels.py"],
}
# Triton's kernels, in its interpreter.
TRITON = {"spiking": "triton", "neuron_kernels": "triton", "neurons": "triton", "surrogates": "triton"}
TRITON |= {"normal_kernels": "triton_diffusion", "diffusion_kernels": "triton_diffusion"}
TRITON |= {"earlyexit_kernels": "triton_earlyexit", "fixedpoint_kernels": "triton_fixedpoint"}
TRITON |= {"digits_kernels": "triton_fixedpoint"}
TRITON |= {"spectral_kernels": "triton_spectral", "spectral_large_kernels": "triton_spectral"}
TESTS["normal"] = ["tests/test_diffusion.py", "tests/test_host_diffusion.py"]


@dataclass(frozen=True)
class Mutant:
    """A bug: ``old`` becomes ``new`` in ``file``."""

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    nth: int = 0  # which of several places, from 1; 0: there is one

    @property
    def part(self) -> str:
        return Path(self.file).stem

    @property
    def family(self) -> str:
        return OF.get(self.part, self.part)

    def arguments(self) -> list[str]:
        if self.tests:
            return list(self.tests)
        if self.file.startswith("kernels/"):
            edges = ["tests/test_triton_edges.py"] if TRITON[self.part] == "triton" else []
            return [*edges, f"tests/test_{TRITON[self.part]}.py", "-k", "not spill and not ahead"]
        return TESTS.get(self.part) or TESTS[self.family]

    def changed(self, text: str) -> str:
        """The file with the bug in it.

        Raises:
            ValueError: the text is not there, or several times where ``nth`` does not say which.
        """
        count = text.count(self.old)
        if count < max(self.nth, 1) or (count > 1 and not self.nth):
            raise ValueError(f"{self.file}: expected once, found {count} times: {self.old!r}")
        pieces, place = text.split(self.old), max(self.nth, 1)
        return self.old.join(pieces[:place]) + self.new + self.old.join(pieces[place:])


def mutants() -> list[Mutant]:
    with LIST.open("rb") as file:
        entries = tomllib.load(file)["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in entries]


def copy_of_the_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "output", "_host*")
    for name in ("fastcifar", "kernels", "csrc", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    for host in (ROOT / "fastcifar").glob("_host*"):
        shutil.copy2(host, folder / "fastcifar" / host.name)
    (folder / "fastcifar" / "kernels").symlink_to("../kernels")
    shutil.copytree(ROOT / "csrc" / "fixedpoint", folder / "fastcifar" / "fixedpoint" / "headers")
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"):
        shutil.copy2(ROOT / name, folder / name)


def compile_and_link(folder: Path, mutant: Mutant) -> str | None:
    """Builds the copy's extension; what the compiler said where it could not."""
    import torch

    sys.path.insert(0, str(ROOT / "csrc"))
    import build_config

    source = Path(mutant.file)
    out = folder / "mutant.o"
    torch_root = Path(torch.__file__).parent
    flags = [f for f in build_config.CXX_FLAGS if not f.startswith(("-O", "-W"))] + ["-O1", "-w", "-fPIC"]
    if source.suffix == ".cpp":
        unit = folder / source
        flags += [*build_config.STABLE_ABI, f"-I{torch_root / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        flags += [f"-I{torch_root / 'include/torch/csrc/api/include'}", "-DFASTCIFAR_VERSION=" + version()]
        flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    else:  # the family's kernels for the baseline, in front of those of all families
        unit = folder / "mutant.cpp"
        included = folder / "csrc" / "cpu" / f"{mutant.family}.inl"
        unit.write_text(f'#define FASTCIFAR_ISA baseline\n#define FASTCIFAR_VECTOR_BYTES 16\n#include "{included}"\n')
    done = subprocess.run(["c++", *flags, "-c", unit, "-o", out], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-800:]
    replaced = OBJECTS / source.with_suffix(".o") if source.suffix == ".cpp" else None
    objects = [out, *(o for o in sorted(OBJECTS.rglob("*.o")) if o != replaced)]
    libraries = [f"-L{torch_root / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    target = folder / "fastcifar" / "_C.abi3.so"
    target.unlink()
    command = ["c++", "-shared", "-Wl,--allow-multiple-definition", *objects, *libraries, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr[-800:] if done.returncode else None


def version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)  # type: ignore[union-attr]


def run_tests(folder: Path, arguments: list[str]) -> tuple[str, str]:
    """``killed``, ``survived`` or ``error``, and the test that failed or what went wrong."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "FASTCIFAR_CPU_ISA": "baseline",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
    except subprocess.TimeoutExpired:
        return "killed", "it did not end"
    if done.returncode == 0:
        return "survived", done.stdout.strip().splitlines()[-1]
    if done.returncode < 0:
        return "killed", f"signal {-done.returncode}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode != 1 or not failed or "error" in done.stdout.splitlines()[-1].lower():
        return "error", (done.stdout + done.stderr)[-800:]
    return "killed", failed[0].removeprefix("tests/")


def drill(mutant: Mutant, folder: Path) -> tuple[str, str, float]:
    begin = time.monotonic()
    path = folder / mutant.file
    original, extension = path.read_text(), folder / "fastcifar" / "_C.abi3.so"
    path.write_text(mutant.changed(original))
    try:
        if Path(mutant.file).parts[0] == "csrc" and (problem := compile_and_link(folder, mutant)):
            return "error", problem, time.monotonic() - begin
        outcome, why = run_tests(folder, mutant.arguments())
    finally:
        path.write_text(original)
        extension.unlink(missing_ok=True)
        shutil.copy2(ROOT / "fastcifar" / "_C.abi3.so", extension)
    return outcome, why, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file or description has one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [m for m in mutants() if not options.words or any(w in f"{m.file} {m.what}" for w in options.words)]
    folders = [ROOT / "build" / "mutants" / str(k) for k in range(options.jobs)]
    for folder in folders:
        copy_of_the_tree(folder)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        free = folders.copy()

        def one(mutant: Mutant) -> tuple[Mutant, str, str, float]:
            folder = free.pop()
            try:
                return (mutant, *drill(mutant, folder))
            finally:
                free.append(folder)

        counts: dict[str, int] = {}
        for mutant, outcome, why, seconds in pool.map(one, chosen):
            counts[outcome] = counts.get(outcome, 0) + 1
            print(f"{outcome:<9} {seconds:5.0f} s  {mutant.file}: {mutant.what}\n{'':19}{why}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())), f"of {len(chosen)}")
    return int(set(counts) != {"killed"})


if __name__ == "__main__":
    sys.exit(main())
