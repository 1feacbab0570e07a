// How a transform of n points is split into butterflies; its tables, in double precision and rounded.
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "spectral.h"

namespace fastcifar {

// n = first * second, both a butterfly's size where that can be; an even n has an even `first`, so that two rows that
// were packed as a pair meet in one butterfly.
FftPlan make_fft_plan(int n) {
  FftPlan plan;
  plan.n = n;
  const auto cost = [n](int second) {  // how far from what the kernels like best
    const int first = n / second;
    if (first == 1) return 0;
    if (first % 2 == 0 && first <= 8) return 1 + std::abs(first - second);
    if (first % 2 == 1 && first <= 8) return 100 + std::abs(first - second);
    return first % 2 == 1 ? 1000 + first : 1 << 20;
  };
  plan.second = 0;
  for (int second = 1; second <= 8; ++second)
    if (n % second == 0 && (plan.second == 0 || cost(second) < cost(plan.second))) plan.second = second;
  const int first = plan.first = n / plan.second, second = plan.second;
  plan.twiddled = std::gcd(first, second) != 1;
  for (int b = 0; b < second; ++b)
    for (int a = 0; a < first; ++a) {
      plan.in[b * first + a] = plan.twiddled ? second * a + b : (second * a + first * b) % n;
      const double angle = -2 * M_PI * (a * b % n) / n;
      plan.twiddle_float[2 * (b * first + a)] = plan.twiddle[2 * (b * first + a)] = std::cos(angle);
      plan.twiddle_float[2 * (b * first + a) + 1] = plan.twiddle[2 * (b * first + a) + 1] = std::sin(angle);
    }
  for (int c = 0; c < first; ++c)
    for (int d = 0; d < second; ++d) {
      int k = c + first * d;
      if (!plan.twiddled)
        for (k = 0; k % first != c || k % second != d; ++k) {
        }
      plan.out[c * second + d] = k;
    }
  for (int k = 0; k < first; ++k) {
    plan.root_float[2 * k] = plan.root[2 * k] = std::cos(2 * M_PI * k / first);
    plan.root_float[2 * k + 1] = plan.root[2 * k + 1] = std::sin(2 * M_PI * k / first);
  }
  return plan;
}

}  // namespace fastcifar
