"""DDP and FSDP over all subjects in two processes: ``python distributed.py ddp|fsdp results.json``.

Each process takes inputs of its own; the gradients must be the mean of what the two plain modules give.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent.parent))
from ecosystem.subjects import SUBJECTS, Subject, why_not
from ecosystem.test_features import is_float, loss_of

from fastcifar.fixedpoint.casting import with_type


def own_inputs(subject: Subject, rank: int) -> tuple:
    def scaled(t):
        if not is_float(t):
            return t
        return with_type(t / (1 + rank), t.fixed_type) if hasattr(t, "fixed_type") else t / (1 + rank)

    return pytree.tree_map(scaled, subject.inputs())


def gradients(module: nn.Module, subject: Subject, rank: int) -> list[Tensor]:
    loss_of(module(*own_inputs(subject, rank))).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def problem(kind: str, subject: Subject, rank: int) -> str:
    """What is wrong; an empty string where nothing is."""
    module = subject.make().eval()
    expected = gradients(copy.deepcopy(module), subject, rank)
    for g in expected:
        dist.all_reduce(g)
    wrapped: nn.Module
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        found = gradients(wrapped, subject, rank)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # fully_shard refuses scalars: they stay whole, and their gradients are their process's own.
        scalars = {p for p in module.parameters() if p.dim() == 0}
        mesh = init_device_mesh("cpu", (2,))
        wrapped = fully_shard(module, mesh=mesh, ignored_params=scalars)  # type: ignore[assignment]
        found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(wrapped, subject, rank)]
    for name, a, b in zip(dict(module.named_parameters()), found, expected, strict=True):
        if kind == "fsdp" and a.dim() == 0:
            continue
        try:
            torch.testing.assert_close(a, b / 2, rtol=1e-5, atol=1e-6)
        except AssertionError as error:
            return f"gradient to {name}: {error}"
    return ""


def work(rank: int, kind: str, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    results: dict[str, str] = {}
    for subject in SUBJECTS:
        if why_not(subject, kind):
            continue
        try:
            results[subject.name] = problem(kind, subject, rank)
        except Exception as error:
            results[subject.name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (sys.argv[1], f"{folder}/meeting", sys.argv[2]), nprocs=2)
