#include "model.h"

#include "layers.h"
#include "weights.h"

namespace net {

typedef ap_ufixed<4, 2, AP_RND_CONV, AP_SAT> layer_1_t;
struct layer_1_shape {
  enum {
    size = 5,
  };
};

// FixedReLU: [5] -> [5]
static void layer_1(const input_t x[5], layer_1_t y[5]) {
  layers::relu<layer_1_shape>(x, y);
}

}  // namespace net

void model(const net::input_t x[net::input_size], net::output_t y[net::output_size]) {
  net::layer_1(x, y);
}
