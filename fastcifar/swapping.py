"""``accelerate(model)``: the modules of known peers become ours, in place, and ``restore(model)`` undoes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import _swaps
from ._observing import MEMORIES, Observed, observe

_BEFORE = "_fastcifar_before"  # what a swapped module was: its rule, class and attributes
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


@dataclass(frozen=True)
class Swap:
    """What became of one module.

    Attributes:
        name: where it is in the model (the first place, if it is shared); ``""`` for the model itself.
        found: its class, with the peer.
        family: ours.
        action: ``"swapped"``, ``"would be swapped"`` (dry run), or ``"left"``.
        by: the class that it is now (or would be); ``""`` where it was left.
        why: why it was left; ``""`` else.
        gain: how many times faster the module's forward is than before, measured on ``inputs``; None where it was not.
    """

    name: str
    found: str
    family: str
    action: str
    by: str = ""
    why: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` found and did; ``print`` shows it as a table.

    Attributes:
        swaps: one a module of a known peer, or nearly of one.
        difference: the largest difference of the model's outputs before and after, over the largest output's magnitude;
            None where it was not verified.
        gain: how many times faster the whole model's forward is, measured on ``inputs``; None where it was not.
    """

    swaps: tuple[Swap, ...] = ()
    difference: float | None = None
    gain: float | None = None

    @property
    def swapped(self) -> tuple[Swap, ...]:
        """Those that were (or would be) swapped."""
        return tuple(swap for swap in self.swaps if swap.action != "left")

    @property
    def left(self) -> tuple[Swap, ...]:
        """Those that stay, each with its reason."""
        return tuple(swap for swap in self.swaps if swap.action == "left")

    def __str__(self) -> str:
        if not self.swaps:
            return "accelerate: no module of a known peer found"
        rows = [("module", "was", "is now", "gain")]
        for s in self.swaps:
            gain = "" if s.gain is None else f"{s.gain:.1f}x"
            rows.append((s.name or "(the model)", s.found, s.by or f"left: {s.why}", gain))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.difference is not None:
            lines.append(f"outputs before and after differ by {self.difference:.2g} of the largest")
        if self.gain is not None:
            lines.append(f"the model's forward takes {1 / self.gain:.2f} of the time it took")
        elif self.swapped:
            lines.append("gain: measured where inputs=... is given; figures of whole models: docs/accelerate.md")
        return "\n".join(lines)


def accelerate(
    model: Any,
    *,
    families: Collection[str] | None = None,
    dry_run: bool = False,
    inputs: Any = None,
    verify: bool = False,
    tolerance: float = 1e-4,
) -> Report:
    """Swaps the modules of known peers for ours, in place and with their state.

    Known are the neurons of SpikingJelly and snnTorch's ``Leaky``; the filters of GFNet, SpectFormer and AFNO, by their
    name and by what their ``forward`` does, since their code is copied around; the fixed-point quantizers of brevitas
    (those with a scale that is a power of two) and of QPyTorch (to the nearest); earlyon's wrapper; and the schedulers
    of diffusers in a pipeline.

    A module stays the object that it is: its class and attributes change. So who holds it, and how many, does not
    matter, and its parameters, buffers, membranes, hooks and mode are the same objects as before; an optimizer goes on,
    and state_dict has the same keys. What is a subclass, has a ``forward`` of its own, or asks for what ours does not
    do, is left, with the reason in the report. On an error nothing is changed.

    Args:
        model: any module, or a diffusers pipeline, whose scheduler is swapped beside its modules; it is changed.
        families: of ``"spiking"``, ``"spectral"``, ``"fixedpoint"``, ``"earlyexit"``, ``"diffusion"``: those to swap.
            Default: all.
        dry_run: whether to report only.
        inputs: a tensor or a tuple of arguments for the model, if it is a module. With it, the gain of each module and
            of the model is measured (three forward passes before and after, without gradients).
        verify: whether the outputs on ``inputs`` before and after are compared. Default False.
        tolerance: how much they may differ, over the largest output's magnitude. Default 1e-4.

    Returns:
        :class:`Report`.

    Raises:
        TypeError: ``model`` is no module and no pipeline, or ``inputs`` is missing where they are to be verified, or
            given for a pipeline.
        ValueError: there is no such family.
        RuntimeError: outputs differ by more than ``tolerance``; the model is then as it was.

    Example:
        >>> import torch
        >>> from fastcifar import accelerate, restore
        >>> accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2))).swaps
        ()
    """
    if not isinstance(model, nn.Module):
        return _accelerate_pipeline(model, families, dry_run, inputs, verify)
    if verify and inputs is None:
        raise TypeError("accelerate: expected inputs to verify the outputs on, got None")
    _check_families(families)
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    places = [(name, m, parent, rule) for name, m, parent in _places(model) if (rule := _wanted(m, families))]
    before = None if inputs is None else observe(model, [m for _, m, _, _ in places], batch)

    swapped: list[nn.Module] = []
    try:
        swaps = [_swap(*place, swapped) for place in places]
        report = Report(tuple(swaps))
        if before is not None:
            after = observe(model, [m for _, m, _, _ in places], batch)
            report = _compared(report, [m for _, m, _, _ in places], before, after)
        if verify and not report.difference <= tolerance:  # type: ignore[operator]
            raise RuntimeError(
                f"accelerate: expected outputs within {tolerance} of those before, over the largest of them; "
                f"got {report.difference}. The model is as it was."
            )
    except BaseException:
        dry_run = True
        raise
    finally:
        if dry_run:
            _restore(swapped[::-1])
    if dry_run:
        would = (replace(s, action="would be swapped") if s.action == "swapped" else s for s in report.swaps)
        report = replace(report, swaps=tuple(would))
    return report


def _check_families(families: Collection[str] | None) -> None:
    known = sorted({rule.family for rule in (*_swaps._PACKAGES.values(), *_swaps._COPIED.values())} | {"diffusion"})
    for family in families or ():
        if family not in known:
            raise ValueError(f"accelerate: expected families of {', '.join(known)}; got {family!r}")


def _parts(pipeline: Any) -> dict[str, Any]:
    """What a pipeline is made of, by name."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"expected model to be a torch.nn.Module or a diffusers pipeline, got {type(pipeline).__name__}"
        )
    return components


def _accelerate_pipeline(
    pipeline: Any, families: Collection[str] | None, dry_run: bool, inputs: Any, verify: bool
) -> Report:
    """A pipeline's modules one by one, and its scheduler; all or nothing."""
    try:
        parts = _parts(pipeline)
    except TypeError as error:
        raise TypeError(f"accelerate: {error}") from None
    if inputs is not None or verify:
        raise TypeError("accelerate: expected no inputs for a pipeline, which may be verified module by module")
    _check_families(families)
    swaps: list[Swap] = []
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]
    earlier = {id(m) for part in modules for m in _ours_in(part)}
    schedulers: list[Any] = []
    try:
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                of_part = accelerate(part, families=families, dry_run=dry_run).swaps
                swaps += [replace(s, name=f"{name}.{s.name}".rstrip(".")) for s in of_part]
            elif (not families or "diffusion" in families) and (swap := _swap_scheduler(name, part, dry_run)):
                swaps.append(swap)
                if swap.action == "swapped":
                    schedulers.append(part)
    except BaseException:
        _restore([m for part in modules for m in _ours_in(part) if id(m) not in earlier])
        for scheduler in schedulers:
            scheduler.__class__ = vars(scheduler).pop(_BEFORE)
        raise
    return Report(tuple(swaps))


def _swap_scheduler(name: str, scheduler: Any, dry_run: bool) -> Swap | None:
    """Ours are subclasses of diffusers' own, so the object becomes one by its class alone."""
    kind = type(scheduler)
    found = f"diffusers.{kind.__name__}"
    if kind.__module__.partition(".")[0] != "diffusers" or not kind.__name__.endswith("Scheduler"):
        return None
    from .compat import diffusers as ours

    if kind.__name__ not in ours.__all__:
        return Swap(name, found, "diffusion", "left", why="it has no counterpart")
    try:
        # What our constructor refuses of these settings is refused here.
        getattr(ours, kind.__name__).from_config(scheduler.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        return Swap(name, found, "diffusion", "left", why=str(error))
    if not dry_run:
        vars(scheduler)[_BEFORE] = kind
        scheduler.__class__ = getattr(ours, kind.__name__)
    action = "would be swapped" if dry_run else "swapped"
    return Swap(name, found, "diffusion", action, by=f"fastcifar {kind.__name__}")


def restore(model: Any) -> int:
    """Undoes :func:`accelerate`: modules are what they were, with the state that they have by now.

    Args:
        model: the module or pipeline as it was given to :func:`accelerate`, or a copy of it.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: ``model`` is no module and no pipeline.
        ValueError: a module has got parameters or buffers that the peer's has not. Nothing of that module's model (of a
            pipeline: of that part) is restored then.

    Example:
        >>> import torch
        >>> from fastcifar import restore
        >>> restore(torch.nn.Linear(2, 2))
        0
    """
    if not isinstance(model, nn.Module):
        try:
            parts = _parts(model)
        except TypeError as error:
            raise TypeError(f"restore: {error}") from None
        count = sum(restore(part) for part in parts.values() if isinstance(part, nn.Module))
        for part in parts.values():
            if not isinstance(part, nn.Module) and _BEFORE in getattr(part, "__dict__", {}):
                part.__class__ = vars(part).pop(_BEFORE)
                count += 1
        return count
    swapped = _ours_in(model)
    _restore(swapped)
    return len(swapped)


def _ours_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _BEFORE in vars(module)]


def _places(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Every module once, with its name and the one that holds it."""
    by_name = dict(model.named_modules())
    return [(name, m, by_name.get(name.rpartition(".")[0]) if name else None) for name, m in by_name.items()]


def _wanted(module: nn.Module, families: Collection[str] | None) -> _swaps.Rule | str | None:
    rule = _swaps.rule_for(module)
    return None if isinstance(rule, _swaps.Rule) and families and rule.family not in families else rule


def _swap(
    name: str, module: nn.Module, parent: nn.Module | None, rule: _swaps.Rule | str, swapped: list[nn.Module]
) -> Swap:
    found = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
    if isinstance(rule, str):
        return Swap(name, found, "", "left", why=rule)
    if isinstance(module, torch.jit.ScriptModule):
        return Swap(name, found, rule.family, "left", why="it is scripted")
    if hasattr(module, "parametrizations"):
        return Swap(name, found, rule.family, "left", why="its parameters are parametrized")
    made = rule.make(module, parent)
    if isinstance(made, str):
        return Swap(name, found, rule.family, "left", why=made)
    try:
        _become(module, rule, *made)
    except (TypeError, ValueError) as error:  # what ours refuses
        return Swap(name, found, rule.family, "left", why=str(error))
    swapped.append(module)
    return Swap(name, found, rule.family, "swapped", by=f"fastcifar {type(module).__name__.removeprefix('_')}")


def _become(module: nn.Module, rule: _swaps.Rule, ours: type[nn.Module], arguments: dict[str, Any]) -> None:
    """Makes the object one of ours, which knows what it was; on an error it is what it was."""
    kind, attributes = type(module), dict(vars(module))
    rule.leave(module)
    try:
        vars(module).clear()
        module.__class__ = ours
        ours.__init__(module, **arguments)
        _carry(attributes, module)
    except BaseException:
        _turn_back(module, rule, kind, attributes)
        raise
    vars(module)[_BEFORE] = (rule, kind, attributes)


def _restore(modules: Sequence[nn.Module]) -> None:
    """All of them, or none on an error."""
    undone: list[tuple[nn.Module, _swaps.Rule, type[nn.Module], dict[str, Any]]] = []
    try:
        for module in modules:
            now = dict(vars(module))
            rule, kind, attributes = now[_BEFORE]
            undone.append((module, rule, type(module), now))
            _turn_back(module, rule, kind, attributes)
            _carry(now, module)
    except BaseException:
        for module, rule, ours, now in reversed(undone):
            rule.leave(module)
            vars(module).clear()
            module.__class__ = ours
            vars(module).update(now)
            # Ours hooks what it wraps as the peer does, so the hooks that were taken away are set as after a restore.
            rule.enter(module)
        raise


def _turn_back(module: nn.Module, rule: _swaps.Rule, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    vars(module).clear()
    module.__class__ = kind
    vars(module).update(attributes)
    rule.enter(module)


def _carry(old: dict[str, Any], module: nn.Module) -> None:
    """Parameters, buffers, memories, hooks and mode of the attributes ``old``, the very objects."""
    new = vars(module)
    for kind in ("_parameters", "_buffers"):
        if old[kind].keys() != new[kind].keys():
            raise ValueError(f"its {kind[1:]} are {sorted(old[kind])}, where ours are {sorted(new[kind])}")
        new[kind].update(old[kind])
    for name in (*_HOOKS, *MEMORIES, "training"):
        if name in old and name in new:
            new[name] = old[name]


def _compared(report: Report, modules: Sequence[nn.Module], before: Observed, after: Observed) -> Report:
    difference = 0.0 if len(before.outputs) == len(after.outputs) else float("inf")
    for old, new in zip(before.outputs, after.outputs, strict=False):
        if old.shape != new.shape:
            difference = float("inf")
        elif old.numel() and not torch.equal(old, new):
            largest = old.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            worst = ((old.double() - new.double()).abs().max() / largest).item()
            difference = max(difference, worst) if worst == worst else float("inf")  # NaN on one side
    gains = [
        before.of_modules[key] / after.of_modules[key] if s.action == "swapped" and key in before.of_modules else None
        for s, key in zip(report.swaps, map(id, modules), strict=True)
    ]
    swaps = tuple(replace(s, gain=gain) for s, gain in zip(report.swaps, gains, strict=True))
    return replace(report, swaps=swaps, difference=difference, gain=before.seconds / after.seconds)
