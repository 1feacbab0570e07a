"""Assembles what Hugging Face's ``kernels`` loads, ``build/hub/<variant>/``, from this tree and its built extension.

The package goes by another name there, and its ops keep theirs. So one process has either this or an installed
fastcifar: the second one to be imported is refused in a sentence.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from pathlib import Path

import build_config

ROOT = Path(__file__).parent.parent
KEPT = ("*.py", "*.inc", "*.json", "*.h", "py.typed")


def variant() -> str:
    """The name of the folder: the stable ABI that the extension is built for, and the machine."""
    target = next(flag for flag in build_config.STABLE_ABI if "TORCH_TARGET_VERSION" in flag)
    version = int(target.partition("=")[2], 16)
    major, minor = version >> 56, version >> 48 & 0xFF
    return f"torch-stable-abi{major}{minor}-cpu-{platform.machine()}-{platform.system().lower()}"


def assemble(out: Path) -> Path:
    """Writes the variant's folder under ``out`` and returns it."""
    extension = next((ROOT / "fastcifar").glob("_C*.so"), None)
    if extension is None:
        raise FileNotFoundError("hub: expected a built extension in fastcifar/ (make test builds it)")
    folder = out / variant()
    shutil.rmtree(folder, ignore_errors=True)
    parts = {"fastcifar": folder, "kernels": folder / "kernels", "csrc/fixedpoint": folder / "fixedpoint" / "headers"}
    for source, target in parts.items():
        for path in sorted({p for pattern in KEPT for p in (ROOT / source).rglob(pattern)}):
            place = target / path.relative_to(ROOT / source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    shutil.copyfile(extension, folder / extension.name)
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', project, re.M).group(1)  # type: ignore[union-attr]
    (folder / "_version.py").write_text(f'__version__ = "{version}"  # no package of that name is installed here\n')
    metadata = {
        "id": f"_fastcifar_cpu_{version.replace('.', '_')}",
        "name": "fastcifar",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    print(assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"))
