"""The Triton kernels of a step of a linear solver and of its gradients. kernels/diffusion.py launches them.

The specification is ``fastcifar/diffusion/reference.py``, which float32 and float64 equal bit for bit given the same
noise. They must be launched with ``enable_fp_fusion=False`` for that. Each is one stream over memory: every tensor that
has a coefficient is read once, every result written once.

Samples lie one after the other, `length` elements each, and a program takes a tile of one of them. Where noise is
drawn, a tile is taken in four parts of every fourth run of 16 elements: the four words of a counter make a number for
each (``normal_numbers`` of the reference says which), so that no thread needs what another one has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .normal_kernels import _normal

COEFFICIENTS = tl.constexpr(33)


@triton.jit
def _narrowed(value, dtype: tl.constexpr):
    """As torch converts: float64 to 16 bits by way of float32."""
    if dtype == tl.bfloat16 or dtype == tl.float16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _read(pointer, offset, mask, used, COMPUTE: tl.constexpr):
    """A tile of a tensor; zeros where there is none, or no coefficient asks for it."""
    if pointer is None:
        value = tl.zeros(offset.shape, COMPUTE)
    else:
        asked = tl.full(offset.shape, used, tl.int32) != 0
        value = tl.load(pointer + offset, mask=mask & asked, other=0.0).to(COMPUTE)
    return value


@triton.jit
def _guided(output_ptr, uncond_ptr, offset, mask, used, guidance, COMPUTE: tl.constexpr):
    output = _read(output_ptr, offset, mask, used, COMPUTE)
    if uncond_ptr is not None:
        base = _read(uncond_ptr, offset, mask, used, COMPUTE)
        output = base + (output - base) * tl.full((), guidance, COMPUTE)
    return output


@triton.jit
def _coefficient(coefficients_ptr, number, at, COMPUTE: tl.constexpr):
    if coefficients_ptr is not None:
        number = tl.load(coefficients_ptr + at)
    return tl.full((), number, COMPUTE)


@triton.jit
def _program_row(coefficients_ptr, at, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, COMPUTE: tl.constexpr):
    return (
        _coefficient(coefficients_ptr, c0, at, COMPUTE),
        _coefficient(coefficients_ptr, c1, at + 1, COMPUTE),
        _coefficient(coefficients_ptr, c2, at + 2, COMPUTE),
        _coefficient(coefficients_ptr, c3, at + 3, COMPUTE),
        _coefficient(coefficients_ptr, c4, at + 4, COMPUTE),
        _coefficient(coefficients_ptr, c5, at + 5, COMPUTE),
        _coefficient(coefficients_ptr, c6, at + 6, COMPUTE),
        _coefficient(coefficients_ptr, c7, at + 7, COMPUTE),
        _coefficient(coefficients_ptr, c8, at + 8, COMPUTE),
        _coefficient(coefficients_ptr, c9, at + 9, COMPUTE),
        _coefficient(coefficients_ptr, c10, at + 10, COMPUTE),
    )


@triton.jit
def _used(program, term: tl.constexpr, ALL: tl.constexpr):
    """Whether a term has a coefficient in any row; with ALL it is read all the same."""
    if ALL:
        used = tl.full((), 1, tl.int32)
    else:
        used = ((program[0][term] != 0) | (program[1][term] != 0) | (program[2][term] != 0)).to(tl.int32)
    return used


@triton.jit
def _sum(row, terms, GIVEN: tl.constexpr, COUNT: tl.constexpr):
    """From left to right, over the terms that are given (a bit each). A coefficient of 0 hides what is not finite."""
    total = tl.zeros(terms[0].shape, terms[0].dtype)
    for t in tl.static_range(COUNT):
        if GIVEN >> t & 1:
            total = total + tl.where(row[t] != 0, terms[t], 0.0) * row[t]
    return total


@triton.jit
def _clamped(x, limit):  # NaN stays NaN
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def _tile(length, blocks, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, where it begins, the first element of its tile, and where the sample ends. Where noise is
    drawn, tiles start at multiples of 64, so that the first may start before its sample. Divisions have 32 bits."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    begin = sample * length
    start = begin // 64 * 64 if SHIFTED else begin
    return sample, begin, start + (program % blocks).to(tl.int64) * BLOCK, begin + length


@triton.jit
def _part(base, begin, end, k, part: tl.constexpr, PARTS: tl.constexpr):
    """The elements of a part of a tile, and which of them exist."""
    if PARTS == 1:
        offset = base + k
        mask = offset < end
    else:
        offset = base + (k // 16 * 64 + k % 16 + 16 * part)
        mask = (offset >= begin) & (offset < end)
    return offset, mask


@triton.jit
def _take(
    x_ptr, output_ptr, uncond_ptr, h1_ptr, h2_ptr, h3_ptr, h4_ptr, h5_ptr, h6_ptr,
    offset, mask, z, program, guidance, limit,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, LIMITED: tl.constexpr, ALL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All terms, `converted` before its clamp, and x_next."""
    x = _read(x_ptr, offset, mask, _used(program, 0, ALL), COMPUTE)
    output = _guided(output_ptr, uncond_ptr, offset, mask, _used(program, 1, ALL), guidance, COMPUTE)
    h1 = _read(h1_ptr, offset, mask, _used(program, 2, ALL), COMPUTE)
    h2 = _read(h2_ptr, offset, mask, _used(program, 3, ALL), COMPUTE)
    h3 = _read(h3_ptr, offset, mask, _used(program, 4, ALL), COMPUTE)
    h4 = _read(h4_ptr, offset, mask, _used(program, 5, ALL), COMPUTE)
    h5 = _read(h5_ptr, offset, mask, _used(program, 6, ALL), COMPUTE)
    h6 = _read(h6_ptr, offset, mask, _used(program, 7, ALL), COMPUTE)
    unclamped = tl.zeros(offset.shape, COMPUTE)
    corrected = unclamped
    x_next = unclamped
    inputs = (x, output, h1, h2, h3, h4, h5, h6)
    if ROWS & 1:
        unclamped = _sum(program[0], inputs, GIVEN, 8)
    converted = unclamped
    if LIMITED:
        converted = _clamped(unclamped, tl.full((), limit, COMPUTE))
    if ROWS & 2:
        corrected = _sum(program[1], (x, output, h1, h2, h3, h4, h5, h6, converted), GIVEN, 9)
    terms = (x, output, h1, h2, h3, h4, h5, h6, converted, corrected, z)
    if ROWS & 4:
        x_next = _sum(program[2], terms, GIVEN, 11)
    return terms, unclamped, x_next


@triton.constexpr_function
def _slot(wants, bit):
    """How many gradients come before this one."""
    return bin(wants & ((1 << bit) - 1)).count("1")


@triton.jit
def _keep(grads_ptr, slot: tl.constexpr, total, offset, mask, value):
    tl.store(grads_ptr + slot * total + offset, _narrowed(value, grads_ptr.dtype.element_ty), mask=mask)


_NUMBERS = ["stream", *(f"c{i}" for i in range(33))]


@triton.jit(do_not_specialize=_NUMBERS)
def _step_kernel(
    x_ptr,  # float32, float64, bfloat16 or float16; None where it has no coefficient, and so all up to noise
    output_ptr,
    uncond_ptr,
    h1_ptr,
    h2_ptr,
    h3_ptr,
    h4_ptr,
    h5_ptr,
    h6_ptr,
    noise_ptr,
    seed_ptr,  # one int64, in place of noise; else None
    coefficients_ptr,  # [33] or [samples, 33], float64 or float32; None where they are c0 ... c32
    x_next_ptr,  # out; None where not wanted
    converted_ptr,  # out
    corrected_ptr,  # out
    length: tl.int64,  # elements of a sample
    blocks: tl.int32,  # programs of a sample
    stream: tl.int64,
    guidance: tl.float64,
    limit: tl.float64,
    c0: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    c3: tl.float64,
    c4: tl.float64,
    c5: tl.float64,
    c6: tl.float64,
    c7: tl.float64,
    c8: tl.float64,
    c9: tl.float64,
    c10: tl.float64,
    c11: tl.float64,
    c12: tl.float64,
    c13: tl.float64,
    c14: tl.float64,
    c15: tl.float64,
    c16: tl.float64,
    c17: tl.float64,
    c18: tl.float64,
    c19: tl.float64,
    c20: tl.float64,
    c21: tl.float64,
    c22: tl.float64,
    c23: tl.float64,
    c24: tl.float64,
    c25: tl.float64,
    c26: tl.float64,
    c27: tl.float64,
    c28: tl.float64,
    c29: tl.float64,
    c30: tl.float64,
    c31: tl.float64,
    c32: tl.float64,
    GIVEN: tl.constexpr,  # a bit for each of the eleven terms that exist
    ROWS: tl.constexpr,  # bits 1, 2 and 4 for the rows that anyone asks for
    LIMITED: tl.constexpr,
    EACH: tl.constexpr,  # coefficients for each sample
    COMPUTE: tl.constexpr,  # tl.float64 for float64, else tl.float32
    BLOCK: tl.constexpr,
):
    """One step. Bytes an element: what is read and written, 12 in float32 for the three tensors of a DDIM step.
    Instructions: two a term and some 20; drawn noise takes 70 more, for which an H200 has time while it moves 11 bytes.
    """
    sample, begin, base, end = _tile(length, blocks, seed_ptr is not None, BLOCK)
    at = sample * COEFFICIENTS if EACH else sample * 0
    program = (
        _program_row(coefficients_ptr, at, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, COMPUTE),
        _program_row(coefficients_ptr, at + 11, c11, c12, c13, c14, c15, c16, c17, c18, c19, c20, c21, COMPUTE),
        _program_row(coefficients_ptr, at + 22, c22, c23, c24, c25, c26, c27, c28, c29, c30, c31, c32, COMPUTE),
    )
    PARTS: tl.constexpr = 1 if seed_ptr is None else 4
    k = tl.arange(0, BLOCK // PARTS)
    numbers = (0, 0, 0, 0)
    if seed_ptr is not None:
        numbers = _normal(base // 4 + k, seed_ptr, stream)
    for part in tl.static_range(PARTS):
        offset, mask = _part(base, begin, end, k, part, PARTS)
        z = _read(noise_ptr, offset, mask, _used(program, 10, False), COMPUTE)
        if PARTS > 1:
            z = numbers[part].to(COMPUTE)
        terms, _, x_next = _take(
            *(x_ptr, output_ptr, uncond_ptr, h1_ptr, h2_ptr, h3_ptr, h4_ptr, h5_ptr, h6_ptr),
            *(offset, mask, z, program, guidance, limit, GIVEN, ROWS, LIMITED, False, COMPUTE),
        )
        if converted_ptr is not None:
            tl.store(converted_ptr + offset, _narrowed(terms[8], converted_ptr.dtype.element_ty), mask=mask)
        if corrected_ptr is not None:
            tl.store(corrected_ptr + offset, _narrowed(terms[9], corrected_ptr.dtype.element_ty), mask=mask)
        if x_next_ptr is not None:
            tl.store(x_next_ptr + offset, _narrowed(x_next, x_next_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def _step_backward_kernel(
    grad_x_next_ptr,  # gradients with respect to the results, laid out as x; None where there is none
    grad_converted_ptr,
    grad_corrected_ptr,
    x_ptr,  # as in _step_kernel; None where nothing depends on it
    output_ptr,
    uncond_ptr,
    h1_ptr,
    h2_ptr,
    h3_ptr,
    h4_ptr,
    h5_ptr,
    h6_ptr,
    noise_ptr,
    seed_ptr,
    coefficients_ptr,
    grads_ptr,  # out: gradients to what WANTS names, one tensor of `total` elements after the other
    sums_ptr,  # out: float64 [programs, 33], of the coefficients; what is not written is 0; None: not wanted
    total: tl.int64,
    length: tl.int64,
    blocks: tl.int32,
    stream: tl.int64,
    guidance: tl.float64,
    limit: tl.float64,
    c0: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    c3: tl.float64,
    c4: tl.float64,
    c5: tl.float64,
    c6: tl.float64,
    c7: tl.float64,
    c8: tl.float64,
    c9: tl.float64,
    c10: tl.float64,
    c11: tl.float64,
    c12: tl.float64,
    c13: tl.float64,
    c14: tl.float64,
    c15: tl.float64,
    c16: tl.float64,
    c17: tl.float64,
    c18: tl.float64,
    c19: tl.float64,
    c20: tl.float64,
    c21: tl.float64,
    c22: tl.float64,
    c23: tl.float64,
    c24: tl.float64,
    c25: tl.float64,
    c26: tl.float64,
    c27: tl.float64,
    c28: tl.float64,
    c29: tl.float64,
    c30: tl.float64,
    c31: tl.float64,
    c32: tl.float64,
    GUIDED: tl.constexpr,  # there are two outputs
    WANTS: tl.constexpr,  # bits 0 to 7 for x, output and history, 8 for uncond, 9 for noise, 10 for the coefficients
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,  # of the rows that have to be computed again
    LIMITED: tl.constexpr,
    EACH: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of _step_kernel. Bytes an element: the gradients that are given and wanted, and the terms of
    `converted` where it was clamped, or all terms for the coefficients. No atomics, so equal calls give equal bits."""
    sample, _, base, end = _tile(length, blocks, False, BLOCK)
    at = sample * COEFFICIENTS if EACH else sample * 0
    program = (
        _program_row(coefficients_ptr, at, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, COMPUTE),
        _program_row(coefficients_ptr, at + 11, c11, c12, c13, c14, c15, c16, c17, c18, c19, c20, c21, COMPUTE),
        _program_row(coefficients_ptr, at + 22, c22, c23, c24, c25, c26, c27, c28, c29, c30, c31, c32, COMPUTE),
    )
    OF_PROGRAM: tl.constexpr = WANTS >> 10 & 1
    offset = base + tl.arange(0, BLOCK)
    mask = offset < end
    if seed_ptr is None:
        z = _read(noise_ptr, offset, mask, 1, COMPUTE)
    else:  # of four numbers one: the loop over parts would hold more than there are registers
        z0, z1, z2, z3 = _normal((offset >> 6 << 4) + (offset & 15), seed_ptr, stream)
        word = offset >> 4 & 3
        z = tl.where(word < 2, tl.where(word == 0, z0, z1), tl.where(word == 2, z2, z3)).to(COMPUTE)
    terms, unclamped, _ = _take(
        *(x_ptr, output_ptr, uncond_ptr, h1_ptr, h2_ptr, h3_ptr, h4_ptr, h5_ptr, h6_ptr),
        *(offset, mask, z, program, guidance, limit, GIVEN, ROWS, LIMITED, OF_PROGRAM, COMPUTE),
    )
    to_next = _read(grad_x_next_ptr, offset, mask, 1, COMPUTE)
    to_corrected = _read(grad_corrected_ptr, offset, mask, 1, COMPUTE) + to_next * program[2][9]
    to_converted = _read(grad_converted_ptr, offset, mask, 1, COMPUTE) + to_next * program[2][8]
    to_converted = to_converted + to_corrected * program[1][8]
    if LIMITED:
        to_converted = tl.where(tl.abs(unclamped) <= tl.full((), limit, COMPUTE), to_converted, 0.0)
    to = (to_converted, to_corrected, to_next)
    for t in tl.static_range(8):
        if (WANTS >> t & 1) or (t == 1 and WANTS >> 8 & 1):
            grad = to_converted * program[0][t] + to_corrected * program[1][t]
            grad = grad + to_next * program[2][t]
            if WANTS >> t & 1:
                mine = grad * tl.full((), guidance, COMPUTE) if t == 1 and GUIDED else grad
                _keep(grads_ptr, _slot(WANTS, t), total, offset, mask, mine)
            if t == 1 and WANTS >> 8 & 1:
                mine = grad * tl.full((), 1 - guidance, COMPUTE)
                _keep(grads_ptr, _slot(WANTS, 8), total, offset, mask, mine)
    if WANTS >> 9 & 1:
        _keep(grads_ptr, _slot(WANTS, 9), total, offset, mask, to_next * program[2][10])
    if OF_PROGRAM:
        into = sums_ptr + tl.program_id(0).to(tl.int64) * COEFFICIENTS
        for row in tl.static_range(3):
            for t in tl.static_range(11):
                if (GIVEN >> t & 1) and (t < 8 + row or (row == 2 and t == 10)):
                    value = terms[t]
                    finite = tl.where((value - value) != 0, 0.0, value)  # infinity and NaN are hidden by 0
                    value = tl.where(program[row][t] == 0, finite, value)
                    product = tl.where(mask, to[row] * value, 0.0)
                    tl.store(into + row * 11 + t, tl.sum(product.to(tl.float64), 0))
