// The network's parameters as the integers that their types store.
#pragma once

#include "ap_fixed.h"

namespace net {

}  // namespace net
