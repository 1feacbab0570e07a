"""What is handed out: the source distribution, the wheel that comes of it, and what Hugging Face's kernels loads."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fastcifar

ROOT = Path(__file__).parent.parent
EXTENSION = next(Path(fastcifar.__file__).parent.glob("_C*.so"), None)
# A build backend as pip calls it, in the folder of the sources; with torch hidden, as in an isolated build.
BACKEND = """
import sys
if {hidden}:
    sys.modules["torch"] = None
from setuptools import build_meta
print(build_meta.build_{kind}(sys.argv[1]))
"""


def _build(kind, source, out, hidden=True):
    code = BACKEND.format(kind=kind, hidden=hidden)
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(out) / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources without what builds have left."""
    folder = tmp_path_factory.mktemp("tree") / "fastcifar"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "output", "report", "weights")
    folder.mkdir()
    for name in ("csrc", "kernels", "fastcifar"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return _build("sdist", tree, tmp_path_factory.mktemp("sdist"))


def _names(path):
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_sdist_has_all_that_a_build_reads(tree, sdist):
    names = _names(sdist)
    for folder in ("csrc", "kernels", "fastcifar"):
        for path in (tree / folder).rglob("*"):
            if path.is_file():
                assert str(path.relative_to(tree)) in names
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md"} <= names


def test_sdist_is_the_same_with_and_without_torch(tree, sdist, tmp_path):
    assert _names(_build("sdist", tree, tmp_path, hidden=False)) == _names(sdist)


def test_a_wheel_from_the_sdist_without_torch_runs_the_references(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    wheel = _build("wheel", source, tmp_path / "dist")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [
        n for n in names if n.split("/")[0] not in ("fastcifar", f"fastcifar-{fastcifar.__version__}.dist-info")
    ]
    for needed in ("_schemas.inc", "py.typed", "kernels/spectral.py", "fixedpoint/headers/ap_fixed.h"):
        assert f"fastcifar/{needed}" in names
    assert sum(name.endswith(".json") and "schedules" in name for name in names) >= 6
    code = (
        "import fastcifar, torch; from fastcifar.spiking import lif; lif(torch.ones(2, 3)); print(fastcifar.__file__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in shown.stdout


HUB = """
import importlib, sys
from pathlib import Path
import torch
from kernels import get_local_kernel
package = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert "fastcifar" not in sys.modules
spec = importlib.import_module(package.__name__ + ".spec")
library = importlib.import_module(package.__name__ + "._library")
assert library.WHY_NO_EXTENSION is None
for s in spec.all_specs():
    problems = spec.compare(s, s.sample("prime", s.dtypes[0], "cpu", 0), s.options[0])
    assert not problems, problems
print(len(spec.all_specs()), "ops agree")
try:
    import fastcifar
except ImportError as error:
    print("refused:", "another copy of fastcifar is loaded" in str(error))
"""


# By its metadata: from the repository's root its name is that of a folder of ours.
needs_kernels = pytest.mark.skipif(not any(metadata.distributions(name="kernels")), reason="kernels is not installed")


@needs_kernels
@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
def test_hugging_faces_kernels_loads_the_tree(tmp_path):
    assemble = [sys.executable, ROOT / "csrc" / "hub.py", tmp_path]
    folder = subprocess.run(assemble, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(folder).name.startswith("torch-stable-abi210-cpu-")
    shown = subprocess.run([sys.executable, "-c", HUB, tmp_path], cwd="/", capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "ops agree" in shown.stdout
    assert "refused: True" in shown.stdout


@needs_kernels
def test_build_toml_is_valid():
    code = "import sys; from kernels._rust import Build; print(Build.open(sys.argv[1]).general.backends)"
    shown = subprocess.run([sys.executable, "-c", code, ROOT], cwd="/", capture_output=True, text=True, check=False)
    assert "CPU" in shown.stdout, shown.stderr
    assert (ROOT / "torch-ext" / "fastcifar" / "__init__.py").exists()
