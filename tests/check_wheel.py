"""Checks the wheel of a folder: ``python check_wheel.py dist`` (make wheel). Its tag is manylinux, its symbols are
abi3's, nothing is missing or too much, and in a fresh environment it loads its extension and every op agrees.

With two folders it asks whether the same wheel lies in both: ``python check_wheel.py one/dist other/dist``.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path


def only(folder: str) -> Path:
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def contents(wheel: Path) -> None:
    assert "-cp310-abi3-manylinux" in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"fastcifar"}, tops
    extensions = [name for name in names if name.endswith(".so")]
    assert extensions == ["fastcifar/_C.abi3.so"], extensions
    for needed in ("_schemas.inc", "py.typed", "kernels/spectral.py", "fixedpoint/headers/ap_fixed.h"):
        assert f"fastcifar/{needed}" in names, needed
    assert any(name.endswith("licenses/LICENSE") for name in names)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MiB")


def fresh(wheel: Path) -> None:
    """Installed where nothing else is but torch, which is lent by this environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
        (site,) = Path(folder, "lib").glob("python3*/site-packages")
        # After its own site-packages, so that fastcifar is the wheel's and not the editable install's.
        lent = sysconfig.get_paths()["purelib"]
        code = f"import sys; sys.path.append({lent!r}); import runpy; sys.argv = ['fastcifar', "
        for what, said in (("doctor", "CPU kernels"), ("selftest", "every op equals its reference")):
            call = code + f"{what!r}]; runpy.run_module('fastcifar', run_name='__main__')"
            done = subprocess.run([python, "-c", call], cwd="/", capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert said in done.stdout, done.stdout
            assert "references only" not in done.stdout, done.stdout
        print(f"a fresh environment ({site.parent.name}): every op equals its reference")


def main(folders: list[str]) -> None:
    if len(folders) == 2:
        one, other = (hashlib.sha256(only(folder).read_bytes()).hexdigest() for folder in folders)
        assert one == other, f"two builds differ: {one} and {other}"
        print(f"two builds, one wheel: {one}")
        return
    wheel = only(folders[0])
    contents(wheel)
    subprocess.run([sys.executable, "-m", "abi3audit", "--strict", wheel], check=True)
    fresh(wheel)


if __name__ == "__main__":
    main(sys.argv[1:])
