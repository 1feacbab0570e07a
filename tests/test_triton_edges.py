"""Where one number decides: Triton's neurons exactly at the threshold (in the interpreter without a GPU).

Found by the mutation drill: random currents never come there.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import spiking  # noqa: E402

from fastcifar.spiking.neurons import IDS  # noqa: E402

BELOW, ABOVE = 0.99999994, 1.0000001
# The neuron, its leak, and what a current is multiplied by on its way into the membrane.
NEURONS = {
    "if": (0.0, 1.0, 1.0),
    "lif": (2.0, 2.0, 1.0),
    "cuba_lif": (0.5, 1.0, 1.0),
    "qif": (2.0, 2.0, 1.0),
    "alif": (2.0, 2.0, 1.0),
    "leaky_subtract": (0.9, 1.0, 0.0),  # snnTorch's fires above the threshold only
}


@pytest.mark.parametrize("neuron", NEURONS)
def test_exactly_at_the_threshold(neuron):
    leak, scale, at = NEURONS[neuron]
    x = torch.tensor([[1.0, BELOW, ABOVE, -1.0]], device=DEVICE) * scale
    numbers = [leak, 1.0, 0.0, *[0.0] * 6][:9]
    spikes, *_ = spiking.neuron_forward(
        x, *[None] * 7, IDS[neuron], numbers, None if "leaky" in neuron else 0.0, 0, False
    )
    assert spikes.tolist() == [[at, 0.0, 1.0, 0.0]]
