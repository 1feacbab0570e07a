// Runs the recorded examples; returns 1 where any bit differs from what PyTorch gave.
#include <cstdio>

#include "model.h"
#include "layers.h"
#include "test_data.h"

using layers::of_bits;

int main() {
  static net::input_t x[net::input_size];
  static net::output_t y[net::output_size];
  long different = 0;
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < net::input_size; ++i) x[i] = of_bits<net::input_t>(recorded_inputs[n][i]);
    model(x, y);
    for (int i = 0; i < net::output_size; ++i) {
      const net::output_t expected = of_bits<net::output_t>(recorded_outputs[n][i]);
      if (y[i] == expected) continue;
      if (++different <= 10)
        std::printf("example %d, output %d: expected %.17g, got %.17g\n", n, i, expected.to_double(),
                    y[i].to_double());
    }
  }
  std::printf("%ld of %ld outputs differ\n", different, long(2) * net::output_size);
  return different != 0;
}
