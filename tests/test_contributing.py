"""CONTRIBUTING.md is true: what it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_paths_exist():
    named = re.findall(r"`([\w./-]+\.(?:py|inl|h|cpp|inc|md|toml))`", TEXT) + re.findall(r"\]\(([\w./-]+)\)", TEXT)
    assert len(named) > 30
    bare = {"functional.py", "modules.py", "ops.h", "_library.py", "__init__.py"}  # of the step or family at hand
    assert not [name for name in named if name not in bare and not (ROOT / name).exists()]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z-]+)", TEXT)) - {"test"} <= targets
    assert "test" in targets


def test_the_example_is_what_the_page_says():
    for path, text in (
        ("fastcifar/_schemas.inc", '"limit_digits(Tensor x, int k, bool signed_digits) -> Tensor",'),
        ("fastcifar/_rules.py", "def limit_digits_fake"),
        ("fastcifar/_rules.py", "def limit_digits_vmap"),
        ("csrc/cpu/fixedpoint.inl", '#include "digits.inl"'),
        ("csrc/cpu/fixedpoint.cpp", "std::min<int64_t>(k, 64)"),
        ("csrc/ops.h", "Tensor limit_digits("),
        ("tests/data/mutants.toml", "csrc/cpu/digits.inl"),
    ):
        assert text in (ROOT / path).read_text(), path
