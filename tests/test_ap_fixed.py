"""csrc/fixedpoint/ap_fixed.h: every published vector, wider formats beside exact fractions, and what it refuses."""

import csv
import ctypes
import math
import random
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

HEADERS = Path(__file__).parent.parent / "csrc" / "fixedpoint"
DATA = Path(__file__).parent / "data"
Q = ("AP_RND", "AP_RND_ZERO", "AP_RND_MIN_INF", "AP_RND_INF", "AP_RND_CONV", "AP_TRN", "AP_TRN_ZERO")
O = ("AP_SAT", "AP_SAT_ZERO", "AP_SAT_SYM", "AP_WRAP", "AP_WRAP_SM")  # noqa: E741
COMPILER = shutil.which("g++") or shutil.which("c++")
# g++ alone may come without the sanitizer's library.
UBSAN = (
    ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    if COMPILER
    and Path(
        subprocess.run([COMPILER, "-print-file-name=libubsan.so"], capture_output=True, text=True).stdout.strip()
    ).is_absolute()
    else []
)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# Bits go out by range(), as in a program that is to compile with the FPGA tool's own headers too.
PREAMBLE = r"""
#include "ap_fixed.h"
#include <type_traits>
template <class T> T of_bits(uint64_t bits) { T t; t.range(T::width - 1, 0) = bits; return t; }
template <class T> uint64_t bits_of(T t) { return t.range(T::width - 1, 0).to_uint64(); }
template <class T> void cast(const double* x, uint64_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = bits_of(T(x[i]));
}
// The same by way of another fixed-point number where that holds x.
template <class T> void recast(const double* x, uint64_t* out, int n) {
  for (int i = 0; i < n; ++i) {
    const ap_fixed<64, 34> low(x[i]);
    const ap_fixed<64, 60> high(x[i]);
    out[i] = low.to_double() == x[i] ? bits_of(T(low)) : high.to_double() == x[i] ? bits_of(T(high)) : bits_of(T(x[i]));
  }
}
"""


def _build(folder, name, lines, *flags):
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(PREAMBLE + "\n".join(lines))
    fixed = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-shared", "-fPIC", "-O0", f"-I{HEADERS}"]
    subprocess.run([COMPILER, "-std=c++14", *fixed, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _type(width, int_bits, signed, q=5, o=3, n=0):
    return f"ap_{'' if signed else 'u'}fixed<{width}, {int_bits}, {Q[q]}, {O[o]}, {n}>"


def _entry(way, name, format):
    return (
        f'extern "C" void {way}_{name}(const double* x, uint64_t* out, int n) {{ {way}<{_type(*format)}>(x, out, n); }}'
    )


def _ways(k):
    """Every fifth format by way of another fixed-point number too: each format takes the compiler a while."""
    return ("cast", "recast") if k % 5 == 0 else ("cast",)


def _run(function, *arrays):
    function(*[ctypes.c_void_p(a.ctypes.data) for a in arrays], len(arrays[0]))


def _bits(raw, width):
    """Integers modulo 2^width, as the unsigned 64-bit ones that hold them."""
    return np.array([int(r) & ((1 << width) - 1) for r in raw], dtype=np.uint64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ap_fixed")


def test_every_cast_of_the_vectors(folder):
    data = np.load(DATA / "ap_fixed.npz")
    assert (tuple(data["Q"]), tuple(data["O"])) == (Q, O)
    lines = []
    for k, (_, *parameters) in enumerate(data["types"].tolist()):
        for way in _ways(k):
            lines.append(_entry(way, k, parameters))
    library = _build(folder, "vectors", lines)
    for k, (row, width, *_) in enumerate(data["types"].tolist()):
        x, out = np.ascontiguousarray(data["inputs"][row]), np.empty(256, np.uint64)
        for way in _ways(k):
            _run(getattr(library, f"{way}_{k}"), x, out)
            assert np.array_equal(out, _bits(data["raw"][k], width)), (way, data["types"][k])


def _arithmetic_rows():
    """(W1, I1, S1), raw1, (W2, I2, S2), raw2 and {op: (W, I, S, raw)} of every row."""
    with (DATA / "ap_fixed_arith.csv").open(newline="") as file:
        for row in csv.reader(file):
            numbers = [int(v) for v in row[:8]]
            groups = [row[i : i + 5] for i in range(8, len(row), 5)]
            results = {op: tuple(map(int, values)) for op, *values in groups}
            yield tuple(numbers[:3]), numbers[3], tuple(numbers[4:7]), numbers[7], results


@pytest.mark.parametrize("as_simulated", [False, True], ids=["exact", "simulated"])
def test_every_result_of_the_vectors(folder, as_simulated):
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    pairs, lines = {}, []
    for a, _, b, _, results in _arithmetic_rows():
        for op, (width, int_bits, signed, _) in results.items():
            if (a, b, op) in pairs:
                continue
            pairs[a, b, op] = name = f"result_{len(pairs)}"
            lines.append(f"""
extern "C" uint64_t {name}(uint64_t a, uint64_t b) {{
  const auto result = of_bits<{_type(*a)}>(a) {signs[op]} of_bits<{_type(*b)}>(b);
  typedef std::decay_t<decltype(result)> Type;
  typedef {_type(width, int_bits, signed)} Expected;
  static_assert(int(Type::width) == Expected::width && int(Type::iwidth) == Expected::iwidth, "type of the result");
  static_assert(Type(-1) < 0 == Expected(-1) < 0, "sign of the result");
  return bits_of(result);
}}""")
    flags = ["-Wno-parentheses", *(["-DAP_FIXED_SIMULATOR_DIVISION"] if as_simulated else [])]
    library = _build(folder, f"arithmetic_{as_simulated}", lines, *flags, *UBSAN)
    exceptions = 0
    for a, raw_a, b, raw_b, results in _arithmetic_rows():
        for op, (width, _, _, raw) in results.items():
            function = getattr(library, pairs[a, b, op])
            function.argtypes, function.restype = [ctypes.c_uint64] * 2, ctypes.c_uint64
            # The signed minimum by minus one unit: the vectors have the simulator's result.
            if op == "div" and raw_b == -1 and a[2] and raw_a == -(1 << (a[0] - 1)) and raw < 0 and not as_simulated:
                raw, exceptions = -raw, exceptions + 1
            got = function(raw_a & ((1 << a[0]) - 1), raw_b & ((1 << b[0]) - 1))
            assert got == raw & ((1 << width) - 1), (a, raw_a, op, b, raw_b)
    assert exceptions == (0 if as_simulated else 12)


def _exact(x, width, int_bits, signed, q, o, n):
    """The definition, in fractions: the stored integer of x, modulo 2^width."""
    scaled = Fraction(x) * Fraction(2) ** (width - int_bits)
    floor = math.floor(scaled)
    rest, half = scaled - floor, Fraction(1, 2)
    tie = {0: 1, 1: floor < 0, 2: 0, 3: floor >= 0, 4: floor % 2}
    if q <= 4:
        v = floor + (rest > half or (rest == half and bool(tie[q])))
    else:
        v = floor + (q == 6 and floor < 0 and rest > 0)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    bits, top = v % (1 << width), 1 << width - 1
    if o == 2 and signed and v <= low:
        return (top | 1) % (1 << width)
    if low <= v <= high:
        return bits
    if o <= 2:
        return 0 if o == 1 else (low if v < 0 else high) % (1 << width)
    ones = ((1 << n) - 1) << (width - n)  # the N highest bits
    if not signed:
        return bits | ones
    sign = top if v < 0 else 0
    if o == 3:
        return bits if n == 0 else (bits & ~ones) | sign | (0 if v < 0 else ones & ~top)
    if n == 0:
        deleted = top if floor >> width & 1 else 0
        return ((bits ^ (2 * top - 1) if deleted != bits & top else bits) & ~top) | deleted
    flip = bits & top != sign if n == 1 else bool(bits >> (width - n) & 1) == (v < 0)
    bits = bits ^ (2 * top - 1) if flip else bits
    return (bits & ~ones) | sign | (0 if v < 0 else ones & ~top)


def test_formats_up_to_64_bits_beside_exact_fractions(folder):
    """The vectors end at 32 bits."""
    random.seed(0)
    formats = []
    for k in range(120):
        signed, o = k % 3 > 0, k % 5
        signed |= o == 4
        width = random.choice([1, 2, 31, 33, 47, 53, 54, 62, 63, 64])
        formats.append((width, random.randint(-8, 70), signed, k % 7, o, random.choice([0, 1, 3, width]) % (width + 1)))
    lines = [_entry(way, k, f) for k, f in enumerate(formats) for way in ("cast", "recast")]
    library = _build(folder, "wide", lines, *UBSAN)
    for k, f in enumerate(formats):
        unit = 2.0 ** (f[1] - f[0])
        near = [s * (i + t) * unit for s in (1, -1) for i in (0, 1, 2, 5, 2.0**20) for t in (0, 0.25, 0.5, 0.75)]
        edges = [
            s * 2.0 ** (f[1] + e) + t * unit for s in (1, -1) for e in (-1, 0, 1, 40, 70) for t in (-1, -0.5, 0, 0.5, 1)
        ]
        far = [random.choice((1, -1)) * random.random() * 2.0 ** random.randint(-90, 110) for _ in range(60)]
        x = np.array([*near, *edges, *far, 5e-324, -5e-324, 1.7e308, -1.7e308, -0.0])
        expected, out = [_exact(v, *f) for v in x.tolist()], np.empty(len(x), np.uint64)
        for way in ("cast", "recast"):
            _run(getattr(library, f"{way}_{k}"), x, out)
            assert out.tolist() == expected, (way, f)


def test_operators_beside_exact_fractions(folder):
    """Comparisons, shifts, negation, compound assignment, integers on either side, and reading back."""
    types = [(8, 4, 1), (12, -2, 0), (9, 14, 1), (33, 20, 1), (1, 1, 1), (6, 3, 0)]
    lines, cases = [], []
    for i, a in enumerate(types):
        for j, b in enumerate(types):
            lines.append(f"""
extern "C" void operators_{i}_{j}(uint64_t bits_a, uint64_t bits_b, double* out) {{
  typedef {_type(*a, q=4, o=0)} A;
  const auto a = of_bits<A>(bits_a);
  const auto b = of_bits<{_type(*b)}>(bits_b);
  A sum = a, difference = a, product = a, quotient = a;
  sum += b, difference -= b, product *= b;
  if (b != 0) quotient /= b;
  const double results[] = {{
      double(a < b), double(a <= b), double(a == b), double(a != b), double(a > b), double(a >= b),
      double(3 < a), double(a == 3), (-a).to_double(), (a << 1).to_double(), (a >> 2).to_double(),
      (a << -2).to_double(), sum.to_double(), difference.to_double(), product.to_double(), quotient.to_double(),
      (a + 3).to_double(), (3 - a).to_double(), (true * a).to_double(), double(a.to_int64()), double((a >> 70) < 0)}};
  for (double r : results) *out++ = r;
}}""")
            cases.append((i, j, a, b))
    library = _build(folder, "operators", lines, *UBSAN)

    def of_bits(bits, t):
        raw = bits - (1 << t[0]) if t[2] and bits >> (t[0] - 1) else bits
        return raw * Fraction(2) ** (t[1] - t[0])

    def cast(x, t):
        return of_bits(_exact(x, *t, 4, 0, 0), t)

    random.seed(1)
    for i, j, a, b in cases:
        for _ in range(40):
            bits = [random.choice((0, 1 << (t[0] - 1), (1 << t[0]) - 1, random.getrandbits(t[0]))) for t in (a, b)]
            x, y = of_bits(bits[0], a), of_bits(bits[1], b)
            unit, modulus = Fraction(2) ** (a[1] - a[0]), 1 << a[0]
            raw = int(x / unit)
            ratio = (
                x * Fraction(2) ** (a[0] - a[1] + max(b[0] - b[1], 0)) / (y * Fraction(2) ** (b[0] - b[1])) if y else 0
            )
            places = a[0] - a[1] + max(b[0] - b[1], 0) - (b[0] - b[1])
            quotient = cast(Fraction(math.trunc(ratio), 1) * Fraction(2) ** -places, a) if y else x
            expected = [x < y, x <= y, x == y, x != y, x > y, x >= y, x > 3, x == 3, -x, of_bits(2 * raw % modulus, a),
                        (raw >> 2) * unit, (raw >> 2) * unit, cast(x + y, a), cast(x - y, a), cast(x * y, a), quotient,
                        x + 3, 3 - x, x, math.trunc(x), x < 0]  # fmt: skip
            out = (ctypes.c_double * len(expected))()
            getattr(library, f"operators_{i}_{j}")(ctypes.c_uint64(bits[0]), ctypes.c_uint64(bits[1]), out)
            assert [Fraction(v) for v in out] == [Fraction(v) for v in expected], (a, bits[0], b, bits[1])


def test_nan_and_infinity_have_a_rule(folder):
    x = np.array([np.nan, np.inf, -np.inf])
    out = np.empty(3, np.uint64)
    formats = {"saturating": (8, 4, 1, 0, 0), "wrapping": (8, 4, 1, 0, 3), "symmetric": (8, 4, 1, 0, 2)}
    lines = [_entry("cast", name, f) for name, f in formats.items()]
    library = _build(folder, "infinite", lines, *UBSAN)
    for name, expected in {"saturating": [0, 127, 128], "wrapping": [0, 0, 0], "symmetric": [0, 127, 129]}.items():
        _run(getattr(library, f"cast_{name}"), x, out)
        assert out.tolist() == expected


def test_a_tie_at_the_lowest_of_128_bits(folder):
    lines = [
        f'extern "C" int tie_{q}() {{ return ap_fixed<8, 8, {Q[q]}>(ap_fixed<128, 0>(-0.5)).to_int(); }}'
        for q in range(7)
    ]
    library = _build(folder, "tie", lines, *UBSAN)
    assert [getattr(library, f"tie_{q}")() for q in range(7)] == [0, 0, -1, -1, 0, -1, 0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ap_fixed<0, 1> x;", "expected a width of 1 or more"),
        ("ap_fixed<8, 4, AP_TRN, AP_WRAP, 9> x;", "expected from 0 to W saturated bits"),
        ("ap_ufixed<8, 4, AP_TRN, AP_WRAP_SM> x;", "AP_WRAP_SM is defined for signed numbers only"),
        ("auto x = ap_fixed<64, 32>(1) * ap_fixed<65, 32>(1); x.to_double();", "exceeds 128 bits"),
        ("auto x = ap_fixed<8, 4>(1) * 0.5;", "no match for .operator\\*"),
    ],
)
def test_what_it_refuses(tmp_path, code, message):
    source = tmp_path / "refused.cpp"
    source.write_text(f'#include "ap_fixed.h"\nvoid f() {{ {code} }}\n')
    command = [COMPILER, "-std=c++14", "-fsyntax-only", f"-I{HEADERS}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr)
