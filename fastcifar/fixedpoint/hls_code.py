"""The C++ text of a fixed-point network: what :func:`fastcifar.fixedpoint.hls.to_hls` writes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .types import FixedType

HEADERS = ("ap_fixed.h", "recast.h")


@dataclass(frozen=True)
class Constants:
    """Stored integers of a layer and their type."""

    raw: Tensor
    type: FixedType


@dataclass(frozen=True)
class Layer:
    """One function of the network: a call of a template in layers.h."""

    name: str  # a C++ identifier, unique
    function: str  # in layers.h
    inputs: tuple[str, ...]  # names of layers, or "input"
    shape: tuple[int, ...]  # of one example's output
    type: FixedType
    description: str
    constants: dict[str, int]  # members of the layer's shape
    parameters: dict[str, Constants | None] = field(default_factory=dict)  # in the order of the function's arguments
    sum_type: FixedType | None = None


@dataclass(frozen=True)
class Network:
    name: str  # of the top function
    input_type: FixedType
    input_shape: tuple[int, ...]
    layers: list[Layer]
    output: str  # name of the layer that gives the result

    def of(self, name: str) -> tuple[FixedType, tuple[int, ...]]:
        """Type and shape of a layer's output, or of the input."""
        if name == "input":
            return self.input_type, self.input_shape
        (layer,) = [layer for layer in self.layers if layer.name == name]
        return layer.type, layer.shape


def headers() -> Path:
    """The folder of our ``ap_fixed.h``, installed or in the source tree.

    Example:
        >>> from fastcifar.fixedpoint.hls_code import headers
        >>> (headers() / "ap_fixed.h").exists()
        True
    """
    installed = Path(__file__).parent / "headers"  # pyproject.toml maps csrc/fixedpoint there
    return installed if installed.exists() else Path(__file__).parents[2] / "csrc" / "fixedpoint"


def write(folder: Path, network: Network, inputs: Tensor, outputs: Tensor) -> None:
    """Writes the project: ``inputs`` and ``outputs`` are stored integers ``[N, ...]``."""
    texts = {
        f"{network.name}.h": _header(network),
        f"{network.name}.cpp": _source(network),
        "weights.h": _weights(network),
        "test_data.h": _test_data(network, inputs, outputs),
        "test_bench.cpp": _test_bench(network, len(inputs)),
        "Makefile": _makefile(network),
        "README.md": _readme(network, len(inputs)),
        "layers.h": (headers() / "layers.h").read_text(),
        **{f"ap_types/{name}": (headers() / name).read_text() for name in HEADERS},
    }
    (folder / "ap_types").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _joined(items: Sequence[str]) -> str:
    return "\n".join(textwrap.wrap(", ".join(items), 116, initial_indent="    ", subsequent_indent="    "))


def _header(network: Network) -> str:
    output_type, output_shape = network.of(network.output)
    lines = [
        "// Types and top function of the network. Written by fastcifar.",
        "#pragma once",
        "",
        '#include "ap_fixed.h"',
        "",
        "namespace net {",
        "",
        f"typedef {network.input_type} input_t;",
        f"typedef {output_type} output_t;",
        "enum {",
        f"  input_size = {_size(network.input_shape)},  // {_shape(network.input_shape)}",
        f"  output_size = {_size(output_shape)},  // {_shape(output_shape)}",
        "};",
        "",
        "}  // namespace net",
        "",
        "// One example.",
        f"void {network.name}(const net::input_t x[net::input_size], net::output_t y[net::output_size]);",
    ]
    return "\n".join(lines) + "\n"


def _container(type: FixedType) -> str:
    """The narrowest integer type of C++ that holds what ``type`` stores."""
    bits = type.width + (not type.signed)
    return next(
        name for most, name in ((8, "signed char"), (16, "short"), (32, "int"), (64, "long long")) if bits <= most
    )


def _weights(network: Network) -> str:
    lines = ["// The network's parameters as the integers that their types store.", "#pragma once", ""]
    lines += ['#include "ap_fixed.h"', "", "namespace net {", ""]
    for layer in network.layers:
        for name, constants in layer.parameters.items():
            if constants is None:
                continue
            full = f"{layer.name}_{name}"
            lines += [
                f"typedef {constants.type} {full}_t;  // {_shape(constants.raw.shape)}",
                f"static const {_container(constants.type)} {full}[{constants.raw.numel()}] = {{",
                _joined(_integers(constants.raw.flatten())) + "};",
                "",
            ]
    return "\n".join([*lines, "}  // namespace net"]) + "\n"


def _layer(network: Network, layer: Layer) -> Iterator[str]:
    yield f"typedef {layer.type} {layer.name}_t;"
    if layer.sum_type is not None:
        yield f"typedef {layer.sum_type} {layer.name}_sum_t;  // holds every sum"
    yield f"struct {layer.name}_shape {{"
    yield "  enum {"
    yield from (f"    {key} = {value}," for key, value in layer.constants.items())
    yield "  };"
    yield "};"
    yield ""
    shapes = ", ".join(_shape(network.of(name)[1]) for name in layer.inputs)
    yield f"// {layer.description}: {shapes} -> {_shape(layer.shape)}"
    letters = ("x",) if len(layer.inputs) == 1 else ("a", "b")
    arguments = [f"const {name}_t {letter}[{_size(network.of(name)[1])}]"
                 for letter, name in zip(letters, layer.inputs, strict=True)]  # fmt: skip
    yield f"static void {layer.name}({', '.join(arguments)}, {layer.name}_t y[{_size(layer.shape)}]) {{"
    template = f"{layer.name}_shape" + (f", {layer.name}_sum_t" if layer.sum_type is not None else "")
    passed = [
        f"layers::stored<{layer.name}_{key}_t>({layer.name}_{key})" if constants else "layers::NoBias()"
        for key, constants in layer.parameters.items()
    ]
    yield f"  layers::{layer.function}<{template}>({', '.join([*letters, *passed, 'y'])});"
    yield "}"
    yield ""


def _source(network: Network) -> str:
    lines = [
        f'#include "{network.name}.h"',
        "",
        '#include "layers.h"',
        '#include "weights.h"',
        "",
        "namespace net {",
        "",
    ]
    for layer in network.layers:
        lines += _layer(network, layer)
    lines += ["}  // namespace net", ""]
    lines += [f"void {network.name}(const net::input_t x[net::input_size], net::output_t y[net::output_size]) {{"]
    buffers = {"input": "x", network.output: "y"}
    for layer in network.layers:
        if layer.name not in buffers:
            buffers[layer.name] = f"{layer.name}_y"
            lines.append(f"  static net::{layer.name}_t {layer.name}_y[{_size(layer.shape)}];")
    for layer in network.layers:
        arguments = [buffers[name] for name in (*layer.inputs, layer.name)]
        lines.append(f"  net::{layer.name}({', '.join(arguments)});")
    return "\n".join([*lines, "}"]) + "\n"


def _integers(raw: Tensor) -> list[str]:
    least = -(1 << 63)  # no literal of C++ has this value
    return [
        "-9223372036854775807LL - 1" if r == least else f"{r}{'' if abs(r) < 1 << 31 else 'LL'}" for r in raw.tolist()
    ]


def _test_data(network: Network, inputs: Tensor, outputs: Tensor) -> str:
    lines = ["// Examples and the results that PyTorch gave for them, as stored integers.", "#pragma once", ""]
    for name, values in (("inputs", inputs), ("outputs", outputs)):
        flat = values.flatten(1)
        lines.append(f"static const long long recorded_{name}[{len(flat)}][{flat.shape[1]}] = {{")
        lines += [f"    {{\n{_joined(_integers(row))}}}," for row in flat]
        lines += ["};", ""]
    return "\n".join(lines)


def _test_bench(network: Network, count: int) -> str:
    return f"""\
// Runs the recorded examples; returns 1 where any bit differs from what PyTorch gave.
#include <cstdio>

#include "{network.name}.h"
#include "layers.h"
#include "test_data.h"

using layers::of_bits;

int main() {{
  static net::input_t x[net::input_size];
  static net::output_t y[net::output_size];
  long different = 0;
  for (int n = 0; n < {count}; ++n) {{
    for (int i = 0; i < net::input_size; ++i) x[i] = of_bits<net::input_t>(recorded_inputs[n][i]);
    {network.name}(x, y);
    for (int i = 0; i < net::output_size; ++i) {{
      const net::output_t expected = of_bits<net::output_t>(recorded_outputs[n][i]);
      if (y[i] == expected) continue;
      if (++different <= 10)
        std::printf("example %d, output %d: expected %.17g, got %.17g\\n", n, i, expected.to_double(),
                    y[i].to_double());
    }}
  }}
  std::printf("%ld of %ld outputs differ\\n", different, long({count}) * net::output_size);
  return different != 0;
}}
"""


def _makefile(network: Network) -> str:
    return f"""\
# make test                              with the ap_fixed.h that came with this project
# make test AP_TYPES=folder              with the FPGA tool's own headers
AP_TYPES ?= ap_types
CXXFLAGS ?= -O2

test: test_bench
\t./test_bench

test_bench: test_bench.cpp {network.name}.cpp $(wildcard *.h)
\t$(CXX) -std=c++14 $(CXXFLAGS) -I$(AP_TYPES) test_bench.cpp {network.name}.cpp -o $@
"""


def _readme(network: Network, count: int) -> str:
    rows = [
        f"| {layer.name} | {layer.description} | {_shape(layer.shape)} | `{layer.type}` |" for layer in network.layers
    ]
    return (
        f"""\
# {network.name}

A fixed-point network as C++ over `ap_fixed` types, written by fastcifar. `make test` compiles it and runs {count}
recorded examples through it; it fails where any bit differs from PyTorch's result. `make test AP_TYPES=folder` takes
`ap_fixed.h` from another folder, such as the FPGA tool's `include`.

For synthesis: top function `{network.name}` in `{network.name}.cpp`, test bench `test_bench.cpp`.

| layer | | output | type |
| --- | --- | --- | --- |
| input | | {_shape(network.input_shape)} | `{network.input_type}` |
"""
        + "\n".join(rows)
        + "\n"
    )
