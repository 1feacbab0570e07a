// The C++ side of every schema, one block a family; defined in cpu/<family>.cpp.
#pragma once
#include <tuple>

#include "common.h"

namespace fastcifar {

// spiking
std::tuple<Tensor, Tensor, Tensor> lif_forward(Tensor x, OptionalTensor v, double tau, bool decay_input,
                                               double v_threshold, std::optional<double> v_reset, bool store_v_seq);
std::tuple<Tensor, Tensor> lif_backward(Tensor grad_spikes, OptionalTensor grad_v_last, OptionalTensor grad_v_seq,
                                        Tensor x, OptionalTensor v, double tau, bool decay_input, double v_threshold,
                                        std::optional<double> v_reset, int64_t surrogate, double alpha,
                                        bool detach_reset);

}  // namespace fastcifar
