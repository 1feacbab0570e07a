"""AFNO's token mixers over our kernels: change ``from afno import ...`` to ``from fastcifar.compat.afno import ...``.

Class names, arguments, parameter names and state_dict keys are those of NVlabs/AFNO-transformer. As there, the AFNO and
BFNO mixers contain the residual, return their input's dtype, and count ``hard_thresholding_fraction`` by its rule
(``kept_modes="official"``), while :class:`GlobalFilter` returns float32. What differs: ``.double()`` works (the
official classes fail after it), tokens ``[B, H, W, C]`` are taken, and a wrong argument raises a ValueError or
TypeError that says what was expected.
"""

from ..spectral.modules import AFNO1D, AFNO2D, BFNO2D
from .gfnet import GlobalFilter

__all__ = ["AFNO1D", "AFNO2D", "BFNO2D", "GlobalFilter"]
