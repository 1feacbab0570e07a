"""The raw kernels execute no more instructions than tests/data/instructions.json says, give or take 2 %."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastcifar._host", reason="fastcifar._host is not built (FASTCIFAR_HOST=1)")


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_no_kernel_needs_more_instructions_than_recorded():
    script = Path(__file__).parent / "instructions.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
