// Types and top function of the network. Written by fastcifar.
#pragma once

#include "ap_fixed.h"

namespace net {

typedef ap_fixed<8, 4, AP_RND_CONV, AP_SAT> input_t;
typedef ap_ufixed<4, 2, AP_RND_CONV, AP_SAT> output_t;
enum {
  input_size = 5,  // [5]
  output_size = 5,  // [5]
};

}  // namespace net

// One example.
void model(const net::input_t x[net::input_size], net::output_t y[net::output_size]);
