"""What the documentation shows runs as written, and what it points at is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]


def _blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


BLOCKS = [(page, code) for page in PAGES for code in _blocks(page)]


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[page.name for page, _ in BLOCKS])
def test_example_runs_as_written(page, code):
    exec(compile(code, f"an example in {page.name}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_spiking_example_trains_the_same_network_twice(tmp_path):
    plot = ROOT / "examples" / "output" / "spiking_cifar10.png"
    plot.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "examples" / "spiking_cifar10.py", "--quick", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test accuracy" in done.stdout
    assert plot.stat().st_size > 10_000
