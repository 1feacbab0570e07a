"""Hostile calls of public names: the calls that a name's own example makes are recorded, one or two of their
arguments replaced. Only what is documented may be raised: ValueError, TypeError, and RuntimeError, which is also
torch's own; never what says that the library met something that it had not thought of. Part of tests/fuzz.py."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from fuzz_mutations import NUMBERS, other_tensor
from torch import Tensor

from fastcifar.spec import FAMILIES, OpSpec, all_specs

ALLOWED = (ValueError, TypeError, RuntimeError)
# And what their docstrings name besides.
NAMED = {
    "diffusion.SolverRun": (IndexError,),  # of a step beyond the last
    "earlyexit.compact": (IndexError,),  # torch's own, of rows that are not there: to look first would wait for a GPU
    "earlyexit.scatter_results": (IndexError,),
    "earlyexit.JointExitLoss": (IndexError,),  # and of a target that is no class
}
INTEGERS = (-(2**63), -7, -1, 0, 1, 2, 3, 4, 5, 7, 8, 33, 64, 65, 300)
TEXTS = ("", "nonsense", "mean")
KEPT = 8  # calls of an example


def modules() -> Iterator[ModuleType]:
    for family in FAMILIES:
        yield importlib.import_module(f"fastcifar.{family}")
        yield importlib.import_module(f"fastcifar.{family}.functional")


@lru_cache
def _public() -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for module in modules():
        for name, value in sorted(vars(module).items()):
            ours = getattr(value, "__module__", "").startswith("fastcifar.")
            if name.startswith("_") or not ours or not callable(value) or id(value) in seen:
                continue
            if ">>>" in (value.__doc__ or ""):
                seen.add(id(value))
                found[f"{module.__name__.removeprefix('fastcifar.')}.{name}"] = value
    declared = {f"{spec.family}.{spec.name}": spec for spec in all_specs()}
    return declared | found


def names() -> list[str]:
    return sorted(_public())


class Quiet(doctest.DocTestRunner):
    """Whether an example is right is not asked here: tests of the documentation do that."""

    def report_failure(self, *arguments: Any) -> None:
        pass

    def report_unexpected_exception(self, *arguments: Any) -> None:
        pass


Call = tuple[Callable, tuple, dict]  # what to call, once what came before it is made anew


def recorded(name: str) -> list[Call]:
    """The calls that the example makes: of the function, or of the class and its forward."""
    target, inside = _public()[name], [0]
    if isinstance(target, OpSpec):
        inputs = target.sample("prime", target.dtypes[0], "cpu", 0)
        return [(target.function, (), inputs | options) for options in target.options]
    calls: list[Call] = []
    patches: list[tuple[Any, str, Any]] = []

    def recorder(of: Callable, make: Callable[[tuple, dict], Call]) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            if inside[0] == 0 and len(calls) < KEPT:
                calls.append(make(_copied(args), _copied(kwargs)))
            inside[0] += 1
            try:
                return of(*args, **kwargs)
            finally:
                inside[0] -= 1

        return record

    if inspect.isclass(target):
        for method in ("__init__", "forward"):
            own = getattr(target, method, None)
            if own is None or not inspect.isfunction(own):
                continue

            def make(args: tuple, kwargs: dict, method: str = method, own: Callable = own) -> Call:
                return (target, args[1:], kwargs) if method == "__init__" else (own, args, kwargs)

            patches.append((target, method, recorder(own, make)))
    else:
        wrapped = recorder(target, lambda args, kwargs: (target, args, kwargs))
        for module in modules():
            patches += [(module, n, wrapped) for n, value in vars(module).items() if value is target]
        patches.append((importlib.import_module(target.__module__), target.__name__, wrapped))
    tests = doctest.DocTestFinder(recurse=False).find(target, name, globs={})
    before = [(owner, n, owner.__dict__.get(n)) for owner, n, _ in patches]
    for owner, n, value in patches:
        setattr(owner, n, value)
    try:
        for test in tests:
            Quiet(verbose=False).run(test, out=lambda text: None, clear_globs=False)
    finally:
        for owner, n, value in before:
            setattr(owner, n, value) if value is not None else delattr(owner, n)
    return calls


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError):  # a generator, a tensor with a graph
        return value


def other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, Tensor) and rng.random() < 0.9:
        return other_tensor(value, rng)
    if isinstance(value, bool) and rng.random() < 0.5:
        return not value
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice(INTEGERS)
    if isinstance(value, float) and rng.random() < 0.8:
        return rng.choice(NUMBERS)
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        items, place = list(value), rng.randrange(len(value))
        how = rng.randrange(3)
        if how == 0:
            items.pop(place)
        elif how == 1:
            items.append(items[place])
        else:
            items[place] = other(items[place], rng)
        return type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(value, str) and rng.random() < 0.8:
        return rng.choice(TEXTS)
    return rng.choice(
        (None, 3, -1, 0, 0.5, "nonsense", (), [1, 2], {}, torch.zeros(2, 3), torch.ones(1).long(), object())
    )


def signature_defaults(function: Callable) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    keywords = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind in keywords and p.default is not p.empty}


class Calls:
    """Calls of one public name by their number."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.calls = name, seed, recorded(name)
        self.allowed = (*ALLOWED, *NAMED.get(name, ()))

    def __call__(self, call: int) -> bool:
        if not self.calls:
            return False
        rng = random.Random(f"{self.seed} {self.name} {call}")
        torch.manual_seed(call)
        function, args, kwargs = rng.choice(self.calls)
        args, kwargs = list(_copied(args)), dict(_copied(kwargs))
        defaults = signature_defaults(function)
        for _ in range(rng.randint(1, 2)):
            method = 1 if inspect.isfunction(function) and function.__name__ == "forward" else 0
            places: list[Any] = [*range(method, len(args)), *kwargs, *list(defaults)[max(0, len(args) - method) :]]
            if not places:
                break
            place = rng.choice(places)
            if isinstance(place, int):
                args[place] = other(args[place], rng)
            else:
                kwargs[place] = other(kwargs.get(place, defaults.get(place)), rng)
        try:
            function(*args, **kwargs)
        except self.allowed:
            return False
        except Exception as error:
            shown = {"args": args, "kwargs": kwargs}
            raise AssertionError(f"{self.name} raises {type(error).__name__}: {error}\nwith {_brief(shown)}") from error
        return True


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {value.dtype}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_brief(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_brief(v) for v in value) + "]"
    return repr(value)[:200]
