"""That the mutation drill's list is true: each seeded bug's place exists, and every kernel has some."""

import mutants
import pytest

pytest.importorskip("tomllib")


def test_every_mutant_has_its_place():
    for mutant in mutants.mutants():
        text = (mutants.ROOT / mutant.file).read_text()
        assert mutant.changed(text) != text
        assert mutant.arguments()


def test_every_kernel_file_has_a_mutant():
    covered = {mutant.file for mutant in mutants.mutants()}
    own = {
        "vec.h",
        "types.h",
        "dispatch.h",
        "parameters.h",
        "common_kernels.inl",
        "codelets.inl",
        "fft.inl",
        "lanes.inl",
    }
    kernels = [*(mutants.ROOT / "csrc" / "cpu").glob("*.inl"), *(mutants.ROOT / "kernels").glob("*_kernels.py")]
    missing = {str(path.relative_to(mutants.ROOT)) for path in kernels if path.name not in own} - covered
    assert not missing
