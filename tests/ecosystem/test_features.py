"""Every public module with every feature of PyTorch that its users combine it with; table.py draws the outcomes.

What is proven of single ops (compile, export, autocast, torch.func, opcheck) is in conformance.py.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.subjects import ELSEWHERE, SUBJECTS, Subject, public_modules, why_not
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fastcifar.fixedpoint.casting import with_type
from fastcifar.spec import all_specs, identical


def by_subject(feature: str) -> pytest.MarkDecorator:
    """One test a subject; where the feature does not apply, it is skipped with the reason."""

    def case(subject: Subject) -> Any:
        reason = why_not(subject, feature)
        return pytest.param(subject, id=subject.name, marks=[pytest.mark.skip(reason=reason)] if reason else [])

    return pytest.mark.parametrize("subject", [case(subject) for subject in SUBJECTS])


def tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def loss_of(result: Any) -> Tensor:
    """A number that depends on all floating outputs."""
    floats = [t for t in tensors(result) if t.is_floating_point()]
    return sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in floats)  # type: ignore[return-value]


def leaves(subject: Subject) -> tuple[Any, ...]:
    """Inputs that ask for a gradient."""
    inputs = subject.inputs()
    if subject.trains:
        for t in tensors(inputs):
            if t.is_floating_point():
                t.requires_grad_()
    return inputs


def everything(subject: Subject, call: Any, inputs: tuple[Any, ...], parameters: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their sum to inputs and parameters."""
    result = call(*inputs)
    found = [t.detach() for t in tensors(result)]
    if subject.trains:
        wanted = [t for t in (*tensors(inputs), *parameters) if t.requires_grad]
        found += torch.autograd.grad(loss_of(result), wanted, materialize_grads=True) if wanted else []
    return found


def at_rest(module: nn.Module) -> nn.Module:
    """Without the state of earlier calls."""
    for m in module.modules():
        for reset in ("reset", "reset_mem"):
            if hasattr(m, reset):
                getattr(m, reset)()
    return module


def plain(subject: Subject, module: nn.Module) -> list[Tensor]:
    twin = copy.deepcopy(module)
    return everything(subject, twin, leaves(subject), list(twin.parameters()))


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if tolerance == 0.0 or not x.is_floating_point():
            assert identical(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()) if y.numel() else 0)


def grown(subject: Subject, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with three times the batch."""

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() <= subject.batch:
            return t
        wide = torch.cat([t, t.flip(subject.batch), t], subject.batch)
        return with_type(wide, t.fixed_type) if hasattr(t, "fixed_type") else wide

    return pytree.tree_map(one, inputs)


def test_every_public_module_is_here():
    named = {subject.name for subject in SUBJECTS} | set(ELSEWHERE)
    assert set(public_modules()) <= named
    assert not named & set(ELSEWHERE) & {subject.name for subject in SUBJECTS}


def test_the_page_has_every_row_and_no_gap():
    page = (Path(__file__).parent.parent.parent / "docs" / "compatibility.md").read_text()
    rows = [*(s.name for s in SUBJECTS), *ELSEWHERE, *(f"{s.family}.{s.name}" for s in all_specs())]
    assert not [row for row in rows if f"| `{row}` |" not in page], "make compatibility writes the page"
    assert "**" not in page


@by_subject("compile")
def test_compile(subject):
    torch._dynamo.reset()
    module = subject.make()
    compiled = copy.deepcopy(module)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    same(everything(subject, call, leaves(subject), list(compiled.parameters())), plain(subject, module))


@by_subject("dynamic")
def test_dynamic(subject):
    torch._dynamo.reset()
    module = subject.make().eval()
    call = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True, dynamic=True)
    for inputs in (subject.inputs(), grown(subject, subject.inputs())):
        with torch.no_grad():
            same(tensors(call(*inputs)), tensors(copy.deepcopy(module)(*inputs)))
        at_rest(call)


@by_subject("export")
def test_export(subject):
    module = subject.make().eval()
    with torch.no_grad():
        expected = tensors(copy.deepcopy(module)(*subject.inputs()))
        program = torch.export.export(copy.deepcopy(module), subject.inputs())
        same(tensors(program.module()(*subject.inputs())), expected)


@by_subject("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(subject, dtype):
    """Outputs are finite, and near those of full precision where nothing is rounded to a spike or a level."""
    module = subject.make().eval()
    with torch.no_grad():
        expected = tensors(copy.deepcopy(module)(*subject.inputs()))
        with torch.autocast("cpu", dtype=dtype):
            found = tensors(copy.deepcopy(module)(*subject.inputs()))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            a, b = a.double().nan_to_num(), b.double().nan_to_num()  # NaN: what no head has said
            error = (a - b).abs().mean() / b.abs().mean().clamp(min=1e-6)
            assert error < 0.02


@by_subject("scaler")
def test_scaler(subject):
    module = subject.make()
    parameters = list(module.parameters())
    inputs = leaves(subject)
    wanted = [t for t in (*tensors(inputs), *parameters) if t.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss_of(module(*inputs))).backward()
    found = [t.grad if t.grad is not None else torch.zeros_like(t) for t in wanted]
    optimizer = torch.optim.SGD(wanted, 0.1)
    scaler.unscale_(optimizer)
    same(found, plain(subject, subject.make())[-len(wanted) :], 1e-5)
    scaler.step(optimizer)
    scaler.update()


@by_subject("grad")
def test_grad(subject):
    """torch.func.grad over the parameters of functional_call, or over the first input where there are none."""
    module = subject.make().eval()
    expected = plain(subject, module)
    parameters = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    if parameters:
        buffers = dict(copy.deepcopy(module).named_buffers())

        def by_parameters(p: dict[str, Tensor]) -> Tensor:
            return loss_of(torch.func.functional_call(module, (p, buffers), subject.inputs()))

        found = torch.func.grad(by_parameters)(parameters)
        same(list(found.values()), expected[-len(parameters) :], 1e-6)
        return
    first, *rest = subject.inputs()
    if not isinstance(first, Tensor):
        pytest.skip("Its input is a list of tensors; the ops that it calls are in the table of ops.")
    (gradient,) = [torch.func.grad(lambda t: loss_of(module(t, *rest)))(first)]
    count = len([t for t in tensors(subject.inputs()) if t.is_floating_point()])
    assert identical(gradient, expected[-count])


@by_subject("vmap")
def test_vmap(subject):
    """Over a dimension before the others, without gradients: an ensemble's members, or crops of an image."""
    module = subject.make().eval()
    batches = [subject.inputs(), pytree.tree_map(lambda t: t / 2 if is_float(t) else t, subject.inputs())]
    with torch.no_grad():
        expected = [tensors(copy.deepcopy(module)(*inputs)) for inputs in batches]
        stacked = pytree.tree_map(lambda *ts: torch.stack(ts) if is_float(ts[0]) else ts[0], *batches)
        dims = pytree.tree_map(lambda t: 0 if is_float(t) else None, batches[0])
        found = torch.func.vmap(lambda *t: tuple(tensors(copy.deepcopy(module)(*t))), in_dims=dims)(*stacked)
    same(list(found), [torch.stack(pair) for pair in zip(*expected, strict=True)], 1e-6)


def is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


@by_subject("checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(subject, use_reentrant):
    module = subject.make()
    twin = copy.deepcopy(module)
    if use_reentrant and "reentrant" in subject.without:
        pytest.skip(subject.without["reentrant"])

    def segment(*t: Any) -> Any:
        return at_rest(twin)(*t)  # run twice, so it must begin with the same state

    inputs = leaves(subject)
    wanted = [t for t in (*tensors(inputs), *twin.parameters()) if t.requires_grad]
    loss_of(checkpoint(segment, *inputs, use_reentrant=use_reentrant)).backward()
    expected = plain(subject, module)
    same([torch.zeros_like(t) if t.grad is None else t.grad for t in wanted], expected[-len(wanted) :])


@by_subject("copy")
def test_copy(subject):
    module = subject.make()
    if subject.trains:
        loss_of(module(*leaves(subject))).backward()  # copies are asked for in the middle of training, too
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = subject.make()
    fresh.load_state_dict(module.state_dict(), strict=True)
    twins = [copy.deepcopy(module), torch.load(buffer, weights_only=False), fresh, module]
    with torch.no_grad():
        results = [tensors(at_rest(m.eval())(*subject.inputs())) for m in twins]
    for other in results[1:]:
        same(other, results[0])


@by_subject("meta")
def test_meta(subject):
    module = subject.make().eval()
    with torch.no_grad():
        real = tensors(copy.deepcopy(module)(*subject.inputs()))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def faked(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                fake = mode.from_tensor(t)
                return with_type(fake, t.fixed_type) if hasattr(t, "fixed_type") else fake

            fake = tensors(module(*pytree.tree_map(faked, subject.inputs())))
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype) == (r.shape, r.dtype)


# ---- several processes, and packages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """What was wrong with each subject in two processes, by kind."""

    @functools.cache
    def run(kind: str) -> dict[str, str]:
        out = tmp_path_factory.mktemp(kind) / "results.json"
        script = Path(__file__).parent / "distributed.py"
        done = subprocess.run([sys.executable, script, kind, out], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return run


@by_subject("ddp")
def test_ddp(subject, distributed):
    assert distributed("ddp")[subject.name] == ""


@by_subject("fsdp")
def test_fsdp(subject, distributed):
    assert distributed("fsdp")[subject.name] == ""


class Together(nn.Module):
    """All of a family in one program: a package takes a compiler many seconds."""

    def __init__(self, subjects: list[Subject]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([subject.make().eval() for subject in subjects])

    def forward(self, *groups: Any) -> list[list[Tensor]]:
        return [tensors(part(*group)) for part, group in zip(self.parts, groups, strict=True)]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """Outputs of a family's subjects, by their package and by themselves."""

    @functools.cache
    def run(family: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        chosen = [s for s in SUBJECTS if s.name.startswith(f"{family}.") and not why_not(s, "aoti")]
        inputs = tuple(s.inputs() for s in chosen)
        with torch.no_grad():
            expected = Together(chosen)(*inputs)
            program = torch.export.export(Together(chosen), inputs)
        path = tmp_path_factory.mktemp(family) / "model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        found = torch._inductor.aoti_load_package(str(path))(*inputs)
        return {s.name: pair for s, pair in zip(chosen, zip(found, expected, strict=True), strict=True)}

    return run


@pytest.mark.skipif(not os.environ.get("FASTCIFAR_ECOSYSTEM"), reason="a minute of compiling: make compatibility")
@by_subject("aoti")
def test_aoti(subject, packaged):
    same(*packaged(subject.name.partition(".")[0])[subject.name], 1e-5)
