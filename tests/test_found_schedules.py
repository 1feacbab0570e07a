"""The schedules that the package ships."""

from __future__ import annotations

import pytest
import torch

from fastcifar.diffusion import FoundSchedule, GaussianMixture, sample

START, END = 1.0, 1e-3


@pytest.mark.parametrize("evaluations", [5, 8, 10])
@pytest.mark.parametrize("name", ["smooth", "sharp"])
def test_shipped_schedules_are_what_they_say(name: str, evaluations: int) -> None:
    found = FoundSchedule.load(f"mixture-{name}-{evaluations}")
    table, mixture = found.table(), getattr(GaussianMixture, name)()
    assert int(table.evaluates.sum()) == evaluations
    noise = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = mixture.solve(noise, START, END, tolerance=1e-8)
    errors = (sample(mixture.model(), noise, table) - targets).square().mean(1).sqrt()
    assert float(errors.median()) < found.error  # which is the mean, with its tail
    assert f"search_schedules.py {name}-{evaluations}" in found.about
