"""Searches the schedules that come with the package: ``python bench/search_schedules.py [smooth-5 ...]``.

Each is searched on noises of its own seed, which ``bench_solver_search.py`` does not use. Some minutes a schedule.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.diffusion import GaussianMixture, search_schedule

OUT = Path(__file__).resolve().parent.parent / "fastcifar" / "diffusion" / "schedules"
NAMES = [f"{mixture}-{steps}" for mixture in ("smooth", "sharp") for steps in (5, 8, 10)]
START, END, NOISES = 1.0, 1e-3, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--budget", type=int, default=2400, help="schedules to try. Default 2400")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes; default: as many as processors")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(NAMES)}")
    torch.set_num_threads(1)
    for name in arguments.names or NAMES:
        which, steps = name.rsplit("-", 1)
        mixture = getattr(GaussianMixture, which)()
        generator = torch.Generator().manual_seed(1_000_000 + arguments.seed)
        noise = torch.randn(NOISES, 16, dtype=torch.float64, generator=generator)
        result = search_schedule(
            mixture.model(),
            arguments.budget,
            int(steps),
            noise=noise,
            start=START,
            end=END,
            targets=mixture.solve(noise, START, END),
            refine=0.7,
            seed=arguments.seed,
            workers=arguments.workers,
        )
        found = result[int(steps)]
        command = f"python bench/search_schedules.py {name} --budget {arguments.budget} --seed {arguments.seed}"
        replace(found, about=command).save(OUT / f"mixture-{name}.json")
        print(f"{name}: error {found.error:.3g} on {NOISES} noises")


if __name__ == "__main__":
    main()
