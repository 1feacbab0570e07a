"""The surrogate gradients g(u) in Triton; formulas and numbers: fastcifar/spiking/surrogate.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bell(scaled, alpha):
    e = tl.exp(-tl.abs(scaled))
    return alpha * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _cos_turns(turns):
    """``cos(2 pi turns)`` of float64 ``turns``.

    Not tl.cos, whose reduction of large arguments keeps a table in local memory. A quarter turn less the distance to
    the nearest whole turn, which is exact, leaves a sine of -pi/2 .. pi/2; 11 terms of its series are enough for
    float64.
    """
    angle = (0.25 - tl.abs(turns - tl.floor(turns + 0.5))) * 6.283185307179586
    square = angle * angle
    series = tl.full(turns.shape, 1.0, tl.float64)
    for k in tl.static_range(10, 0, -1):
        series = 1.0 - square * series * (1.0 / (2 * k * (2 * k + 1)))
    return angle * series


@triton.jit
def _fourier(u, p, q, r):
    turns = u.to(tl.float64) * (q.to(tl.float64) / 6.283185307179586)
    total = tl.full(u.shape, 0.0, tl.float64)
    for i in range(1, r.to(tl.int32)):
        total += _cos_turns((2 * i - 1) * turns)
    return p * total.to(u.dtype)


@triton.jit
def surrogate_grad(u, widths, SURROGATE: tl.constexpr):
    """What stands in for the derivative of the spike at ``u``, the membrane above its threshold.

    ``widths`` are the three numbers of the surrogate, in the dtype of ``u``.
    """
    p, q, r = widths
    if SURROGATE == 0:  # atan
        z = q * u
        g = p / (1.0 + z * z)
    elif SURROGATE == 1:  # sigmoid
        g = _bell(q * u, p)
    elif SURROGATE == 2:  # triangle
        g = tl.where(tl.abs(u) > r, 0.0, p - q * tl.abs(u))
    elif SURROGATE == 3:  # two levels
        g = tl.where(tl.abs(u) < r, p, q)
    elif SURROGATE == 4:  # exponential
        g = p * tl.exp(-(q * tl.abs(u - r)))
    elif SURROGATE == 5:  # inverse square
        distance = q + r * tl.abs(u)
        g = p / (distance * distance)
    elif SURROGATE == 6:  # Gaussian
        z = q * u
        g = p * tl.exp(-(z * z))
    elif SURROGATE == 7:  # inverse
        g = p / (q + tl.abs(u))
    elif SURROGATE == 8:  # one-sided
        g = tl.where(u >= r, p, q)
    elif SURROGATE == 9:  # S2NN
        g = tl.where(u < 0.0, _bell(p * u, p), q / (u + 1.0))
    elif SURROGATE == 10:  # q-pseudo-spike
        g = tl.exp2(q * tl.log2(1.0 + p * tl.abs(u)))
    elif SURROGATE == 11:  # square wave's Fourier series
        g = _fourier(u, p, q, r)
    elif SURROGATE == 12:  # log-tailed
        g = tl.where(u > 1.0, 1.0 / u, tl.where(u <= 0.0, p, 1.0))
    elif SURROGATE == 13:  # fake numerical
        inverse = 1.0 / tl.abs(u)
        g = tl.where(inverse > p, p, inverse)
    else:  # sparse fast sigmoid
        distance = 1.0 + p * tl.abs(u)
        g = tl.where(u > q, 1.0 / (distance * distance), 0.0)
    return g
