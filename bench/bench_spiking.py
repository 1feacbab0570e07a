"""Spiking neurons on the currents that real CIFAR-10 images cause in the second layer of a spiking network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from harness import MODES, Candidate, Workload, cases, compare
from measure import DEVICE
from paired import Paired
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d

from fastcifar import _library
from fastcifar.data import MEAN, STD, cifar10
from fastcifar.spiking import functional, pack, reference
from fastcifar.spiking.neurons import IDS
from fastcifar.spiking.packed import DENSEST, packed_conv2d

KERNEL = _library.owned("neuron_forward", DEVICE.type)
HARD_ATAN = {"tau": 2.0, "v_reset": 0.0, "surrogate": "atan", "detach_reset": True}


def currents(steps: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Input currents ``[T, N, C, 16, 16]`` of the second layer: images, coded directly, through a convolution, its
    normalisation and spiking neurons, and a second convolution with its normalisation; weights from a fixed seed."""
    batch, channels = shape[:2]
    images = cifar10(split="test")[0][:batch].float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first = _normalised(conv2d(images, torch.randn(32, 3, 3, 3, generator=generator), stride=2, padding=1))
        spikes = reference.lif(first.expand(steps, *first.shape))[0]
        weight = torch.randn(channels, 32, 3, 3, generator=generator)
        second = _normalised(conv2d(spikes.flatten(0, 1), weight, padding=1))
    return (second.view(steps, *shape).to(dtype),)


def _normalised(x: Tensor) -> Tensor:
    """Batch normalisation over everything but the channels, without scale or shift."""
    return batch_norm(x, None, None, training=True)


def lif_workload(
    steps: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    title: str = "",
    **settings: object,
) -> tuple[Workload, dict[str, object]]:
    """The workload and the arguments of ``lif``. Least traffic an element-step: forward reads x and writes s; backward
    reads x (the membrane is recomputed from it) and the gradient of s, and writes the gradient of x. Operations as in
    the reference: 8 forward, and 20 backward, of which 8 recompute."""
    own = {name: settings.pop(name) for name in ("full", "keep_mapped", "note") if name in settings}
    workload = Workload(
        family="spiking",
        op="lif",
        title=f"T={steps} x {list(shape)} {title or 'float32'}".replace(", ", ","),
        make=partial(currents, steps, shape, dtype),
        elements=steps * prod(shape),
        forward_bytes=2 * dtype.itemsize,
        backward_bytes=3 * dtype.itemsize,
        forward_flops=8,
        backward_flops=20,
        gradient_tolerance=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps,
        **own,
    )
    return workload, HARD_ATAN | settings


BIG, LONG, SMALL = (64, 128, 16, 16), (16, 64, 16, 16), (8, 64, 16, 16)
IN_CACHE = "fits in the cache, so it may go below a floor that memory sets"
LIF = [
    lif_workload(4, BIG, keep_mapped=True),
    lif_workload(16, LONG),
    lif_workload(32, SMALL, full=True),
    lif_workload(4, SMALL, full=True, note=IN_CACHE),
    lif_workload(1, BIG, full=True),
    lif_workload(4, BIG, torch.bfloat16, title="bfloat16", full=True),
    lif_workload(4, BIG, title="float32 soft reset", v_reset=None, full=True),
    lif_workload(4, BIG, title="float32 reset not detached", detach_reset=False, full=True),
    lif_workload(4, BIG, title="float32 sigmoid", surrogate="sigmoid", full=True),
    lif_workload(4, BIG, title="float32 input not decayed", decay_input=False, full=True),
]
SETTINGS = dict(LIF)


def spikes_of(lif: Callable[..., tuple], settings: dict) -> Callable[[Tensor], Tensor]:
    return lambda x: lif(x, **settings)[0]


def compiled(settings: dict) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()  # else a new shape is compiled as a dynamic one, which is slower
    return spikes_of(torch.compile(reference.lif), settings)


def spikingjelly(settings: dict) -> Callable[[Tensor], Tensor]:
    from spikingjelly.activation_based import functional as sj
    from spikingjelly.activation_based import neuron, surrogate

    names = {"atan": surrogate.ATan, "sigmoid": surrogate.Sigmoid}
    own = settings | {"surrogate_function": names[settings["surrogate"]]()}
    node = neuron.LIFNode(**{name: value for name, value in own.items() if name != "surrogate"}, step_mode="m")

    def call(x: Tensor) -> Tensor:
        out = node(x)
        sj.reset_net(node)  # so that the next sequence starts at rest
        return out

    return call


def snntorch(settings: dict) -> Callable[[Tensor], Tensor]:
    import snntorch as snn

    mechanism = "subtract" if settings["v_reset"] is None else "zero"
    node = snn.Leaky(beta=1 - 1 / settings["tau"], spike_grad=snn.surrogate.atan(2.0), reset_mechanism=mechanism)
    node.to(DEVICE)

    def call(x: Tensor) -> Tensor:
        membrane = torch.zeros_like(x[0])
        spikes = []
        for current in x:
            spike, membrane = node(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return call


@cases(workload for workload, _ in LIF)
def test_lif(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    settings = SETTINGS[workload]
    half = "bfloat16" in workload.title
    narrow = "keeps its membrane in bfloat16 on a CPU: other numbers, so only the cost compares"
    missing = "" if KERNEL else "no kernel serves this device, so this is the reference"
    other = "resets one step later and does not decay its input: only the cost compares"
    candidates = [
        Candidate("eager reference", "reference", lambda: spikes_of(reference.lif, settings)),
        Candidate("torch.compile", "compiled", lambda: compiled(settings)),
        Candidate("SpikingJelly", "peer", lambda: spikingjelly(settings), not half, note=narrow if half else ""),
        Candidate("snnTorch", "peer", lambda: snntorch(settings), checked=False, full=True, note=other),
        Candidate("fastcifar", "ours", lambda: spikes_of(functional.lif, settings), note=missing),
    ]
    compare(paired, workload, mode, mapped, candidates)


# ---- PLIF: the learnt time constant, whose gradient is a sum over all neurons and steps ------------------------------


def plif_workload(steps: int, shape: tuple[int, int, int, int]) -> Workload:
    """As for LIF, and the sum of the gradient of w: 3 operations more. Its tolerance is that of a float32 sum over all
    neurons and steps, which is what eager PyTorch forms."""
    workload, _ = lif_workload(steps, shape)
    return replace(
        workload,
        op="plif",
        make=lambda: (*currents(steps, shape, torch.float32), torch.tensor(0.0)),
        backward_flops=23,
        gradient_tolerance=1e-5,
    )


def plif_of(plif: Callable[..., tuple]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: plif(x, w, v_reset=0.0, surrogate="atan", detach_reset=True)[0]


def compiled_plif() -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()
    return plif_of(torch.compile(reference.plif))


def spikingjelly_plif() -> Callable[[Tensor, Tensor], Tensor]:
    from spikingjelly.activation_based import functional as sj
    from spikingjelly.activation_based import surrogate

    atan = surrogate.ATan()
    return lambda x, w: sj.plif_multi_step(x, torch.zeros_like(x[0]), w, True, 1.0, 0.0, atan, True)[0]


@cases([replace(plif_workload(16, LONG), keep_mapped=True)])
def test_plif(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    candidates = [
        Candidate("eager reference", "reference", lambda: plif_of(reference.plif)),
        Candidate("torch.compile", "compiled", compiled_plif),
        Candidate("SpikingJelly", "peer", spikingjelly_plif),
        Candidate("fastcifar", "ours", lambda: plif_of(functional.plif)),
    ]
    compare(paired, workload, mode, mapped, candidates)


# ---- every neuron beside LIF, and every format of spikes -------------------------------------------------------------

OTHERS: dict[str, Callable[..., tuple]] = {
    "lif": functional.lif,
    "lif, tau = 3": partial(functional.lif, tau=3.0),
    "if": functional.integrate_and_fire,
    "plif": lambda x, **options: functional.plif(x, PARAMETER, **options),
    "qif": functional.qif,
    "eif": functional.eif,
    "klif": lambda x, **options: functional.klif(x, PARAMETER + 1, **options),
    "ilif": functional.ilif,
    "leaky": functional.leaky,
    "izhikevich": partial(functional.izhikevich, a=0.1, b=0.2),
    "cuba_lif": functional.cuba_lif,
    "alif": functional.alif,
    "signed_if": functional.signed_if,
}
PARAMETER = torch.zeros((), device=DEVICE, requires_grad=True)


@pytest.mark.skipif(not KERNEL, reason="no kernel of fastcifar's serves this device")
@pytest.mark.keep_mapped  # else some of them pay for fresh memory, by the luck of the heap, and others do not
@pytest.mark.parametrize("mode", MODES)
def test_every_neuron_takes_the_time_of_lif(paired: Paired, mode: str) -> None:
    """At equal traffic (x in, spikes out, and their gradients): target 1.25 times LIF's own time."""
    (x,) = (t.to(DEVICE) for t in currents(16, LONG, torch.float32))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaf = x.clone().requires_grad_()

    def work(neuron: Callable[..., tuple]) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                neuron(x)

        def forward_and_backward() -> None:
            neuron(leaf)[0].backward(gradient)
            leaf.grad = None

        return forward if mode == "forward" else forward_and_backward

    paired.describe(
        "spiking", op="every neuron", workload=f"T=16 x {list(LONG)} float32, memory kept mapped, {mode}", mode="call"
    )
    for name in OTHERS:
        paired.record(name, role="ours", target=None if name == "lif" else 1.25)
    paired.time({name: work(neuron) for name, neuron in OTHERS.items()})


@pytest.mark.skipif(not KERNEL, reason="no kernel of fastcifar's serves this device")
@pytest.mark.keep_mapped
def test_spikes_as_bytes_and_bits(paired: Paired) -> None:
    """What narrower spikes save of the forward pass at large N: 8 bytes an element-step become 5 and 4.1. With 128 MiB
    of currents it is memory that is measured and not what a call costs."""
    (x,) = (t.to(DEVICE) for t in currents(16, BIG, torch.float32))
    formats = ("float", "uint8", "packed")
    float_spikes, byte_spikes, packed = (functional.lif(x, spike_format=name)[0] for name in formats)
    assert torch.equal(float_spikes, byte_spikes.float())
    assert torch.equal(float_spikes, packed.unpack())
    paired.describe("spiking", op="spike formats", workload=f"T=16 x {list(BIG)}, memory kept mapped", mode="call")
    for name in formats:
        paired.record(name, role="ours", target=None if name == "float" else 0.75)
    paired.time({name: partial(functional.lif, x, spike_format=name) for name in formats})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="no kernel but the CPU's reads bits")
@pytest.mark.parametrize("percent", [5, 10, 20, 30])
def test_packed_convolution(paired: Paired, percent: int) -> None:
    """A 3 x 3 convolution of 128 channels that reads bits, beside torch's own on float spikes in the same layout."""
    generator = torch.Generator().manual_seed(0)
    spikes = (torch.rand(4 * 32, 16, 16, 128, generator=generator) < percent / 100).float().movedim(-1, 1)
    weight = torch.randn(128, 128, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    bits = pack(spikes.unflatten(0, (4, 32)))
    served = bits.density() <= DENSEST
    expected = conv2d(spikes, weight, padding=1)
    difference = (packed_conv2d(bits, weight, padding=1).flatten(0, 1) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    title = f"128 x [128,16,16], 3 x 3, {percent} % fire"
    paired.describe("spiking", op="packed_conv2d", workload=title, mode="call")
    paired.record("torch, float spikes", role="reference", target=None)
    paired.record("packed_conv2d", role="ours", target=1.0, note="" if served else "unpacks, as so many fire")
    paired.time(
        {
            "torch, float spikes": lambda: conv2d(spikes, weight, padding=1),
            "packed_conv2d": lambda: packed_conv2d(bits, weight, padding=1),
        }
    )


@pytest.mark.skipif(not KERNEL, reason="no kernel of fastcifar's serves this device")
def test_call_overhead(paired: Paired) -> None:
    """What a call costs beyond its arithmetic, on 64 neurons and 4 steps: the bare operator, and around it the public
    function without and with a graph to record. Targets, relative to the bare operator: 1.6 and 3.5."""
    op = torch.ops.fastcifar.neuron_forward.default
    x = torch.randn(4, 64, device=DEVICE)
    tracked = x.clone().requires_grad_()
    arguments = (x, *[None] * 7, IDS["lif_times"], [0.5, 1.0, 0.0], 0.0, 0, False)
    assert torch.equal(op(*arguments)[0], functional.lif(x)[0])

    paired.describe("spiking", op="lif", workload="T=4 x [64] float32", mode="call")
    for name, target in (("bare operator", None), ("fastcifar, no graph", 1.6), ("fastcifar, graph", 3.5)):
        paired.record(name, role="ours" if target else "reference", target=target)
    calls = {
        "bare operator": lambda: op(*arguments),
        "fastcifar, no graph": lambda: functional.lif(x),
        "fastcifar, graph": lambda: functional.lif(tracked),
    }
    paired.time(calls, repeats=200, events=False)
