"""The package as a whole: what is installed, what is built, what it refuses, and what it says of itself."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import fastcifar
from fastcifar import _library

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastcifar.__file__).parent
EXTENSION = next(PACKAGE.glob("_C*.so"), None)
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")


def _python(*arguments, check=True, **environment):
    """Runs this Python from a folder that is not the repository's."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd="/", env=os.environ | environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """The package as it is installed where there was no compiler."""
    folder = tmp_path_factory.mktemp("pure")
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "--quiet",
            "build",
            "--build-base",
            folder / "base",
            "--build-lib",
            folder / "lib",
        ],
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler"},
        check=True,
        capture_output=True,
    )
    assert not list((folder / "lib" / "fastcifar").glob("*.so"))
    return str(folder / "lib")


def test_without_a_compiler_the_references_run_and_doctor_says_so(pure):
    code = """
import torch, fastcifar
from fastcifar.spiking import lif, reference
print(fastcifar.__file__)
x = torch.randn(4, 5, requires_grad=True)
(a,) = torch.autograd.grad(lif(x)[0].sum(), x)
(b,) = torch.autograd.grad(reference.lif(x)[0].sum(), x)
assert torch.equal(a, b)
"""
    assert pure in _python("-c", code, PYTHONPATH=pure).stdout
    shown = _python("-m", "fastcifar", "doctor", PYTHONPATH=pure).stdout
    assert "references only: the C++ extension is not built" in shown
    assert re.search(r"neuron_forward +cpu +the PyTorch reference", shown)
    assert "every op equals its reference" in _python("-m", "fastcifar", "selftest", PYTHONPATH=pure).stdout


@needs_extension
def test_an_extension_of_another_version_is_refused_in_a_sentence(pure, tmp_path):
    stale = tmp_path / "fastcifar"
    shutil.copytree(Path(pure) / "fastcifar", stale)
    data = EXTENSION.read_bytes()
    stamp = f"fastcifar-build-stamp:{fastcifar.__version__};".encode()
    assert data.count(stamp) == 1
    (stale / "_C.abi3.so").write_bytes(data.replace(stamp, stamp.replace(b"0.", b"9.", 1)))
    refused = _python("-c", "import fastcifar", check=False, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 1
    assert re.search(r"ImportError: fastcifar: the extension _C\.abi3\.so was built for fastcifar 9\.", refused.stderr)


@needs_extension
def test_the_extension_has_no_symbol_of_torchs_unstable_abi():
    undefined = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", EXTENSION], capture_output=True, text=True, check=True
    )
    assert "aoti_torch" in undefined.stdout
    assert not re.findall(r"\b(?:at|c10|torch)::\S+", undefined.stdout)


@needs_extension
def test_the_extension_exports_nothing_but_its_entry_point():
    defined = subprocess.run(["nm", "-D", "--defined-only", EXTENSION], capture_output=True, text=True, check=True)
    ours = {line.split()[-1] for line in defined.stdout.splitlines() if "fastcifar" in line or "PyInit" in line}
    assert ours == {"PyInit__C", "fastcifar_build_stamp"}


def test_the_python_schemas_are_those_of_the_extension():
    for text in _library._schemas():
        name = text.split("(")[0]
        schema = getattr(torch.ops.fastcifar, name).default._schema
        assert str(schema) == str(torch._C.parse_schema(f"fastcifar::{text}"))


@needs_extension
def test_the_wheel_is_small():
    """Under 3 MB, of which the extension, deflated as a wheel holds it, is nearly all."""
    assert len(zlib.compress(EXTENSION.read_bytes())) < 2_500_000


def test_import_adds_little_to_that_of_torch():
    code = "import time, torch; t = time.perf_counter(); import fastcifar; print(time.perf_counter() - t)"
    assert min(float(_python("-c", code).stdout) for _ in range(5)) < 0.150


def test_import_leaves_triton_and_the_peers_alone():
    code = "import sys, torch; before = set(sys.modules); import fastcifar; print(sorted(set(sys.modules) - before))"
    new = ast.literal_eval(_python("-c", code).stdout)
    assert not [m for m in new if m.split(".")[0] in ("triton", "spikingjelly", "numpy", "matplotlib")]


@needs_extension
@pytest.mark.parametrize("offset", [0, 1])
def test_stream_copy_copies_every_byte(each_isa, offset):
    source = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8)[offset:]

    def check(_):
        target = torch.zeros(3_000_001, dtype=torch.uint8)[offset:]
        torch.ops.fastcifar._stream_copy(target, source)
        assert torch.equal(target, source)

    each_isa(check)
    with pytest.raises(RuntimeError, match="_stream_copy: expected two contiguous CPU tensors"):
        torch.ops.fastcifar._stream_copy(torch.zeros(3), torch.zeros(4))


def test_doctor_and_selftest():
    shown = _python("-m", "fastcifar", "doctor").stdout
    for word in ("torch", "CPU kernels", "CPU threads", "GPU", "neuron_forward", "neuron_backward"):
        assert word in shown
    assert "every op equals its reference" in _python("-m", "fastcifar", "selftest").stdout


@needs_extension
def test_selftest_notices_a_wrong_kernel(capsys, monkeypatch):
    from fastcifar.spiking import neurons

    right = neurons._forward
    monkeypatch.setattr(neurons, "_forward", lambda *a: (1 - right(*a)[0], *right(*a)[1:]))
    from fastcifar.spec import all_specs, compare

    (spec,) = [s for s in all_specs() if s.name == "lif"]
    assert compare(spec, spec.sample("prime", torch.float32, "cpu", 0), spec.options[0], ())


def test_keep_memory_mapped_keeps_freed_memory():
    code = """
import resource, torch, fastcifar
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(4)])
fastcifar.keep_memory_mapped()
print([faults() for _ in range(40)])
"""
    unmapped, kept = map(ast.literal_eval, _python("-c", code, THP_MEM_ALLOC_ENABLE="0").stdout.splitlines())
    assert min(unmapped) > 1000
    assert max(kept[-10:]) < 100  # glibc needs about ten allocations to settle


def _modules():
    for found in pkgutil.walk_packages(fastcifar.__path__, "fastcifar."):
        if not found.name.split(".")[-1].startswith("_") and ".kernels" not in found.name:
            yield found.name


@pytest.mark.parametrize("name", sorted(_modules()))
def test_examples_in_docstrings(name):
    if name in ("fastcifar.compat.diffusers", "fastcifar.diffusion.probing"):
        pytest.importorskip("diffusers")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_function_has_an_example_that_runs():
    import fastcifar.spiking as spiking

    for thing in (spiking.lif, spiking.LIF, fastcifar.doctor):
        assert doctest.DocTestFinder().find(thing)[0].examples


def test_no_file_is_longer_than_a_reader_can_hold():
    for folder in ("csrc", "kernels", "fastcifar", "tests", "bench", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if "output" not in path.parts and path.suffix in (".py", ".cpp", ".h", ".inl", ".cu"):
                assert len(path.read_text().splitlines()) <= 450, path
