// The C++ side of every schema, one block a family; defined in cpu/<family>.cpp.
#pragma once
#include <tuple>

#include "common.h"

namespace fastcifar {

// spiking
std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_forward(Tensor x, OptionalTensor v, OptionalTensor w,
                                                          OptionalTensor leak, OptionalTensor threshold,
                                                          OptionalTensor gain, OptionalTensor scale,
                                                          OptionalTensor shift, int64_t neuron,
                                                          std::vector<double> numbers, std::optional<double> v_reset,
                                                          int64_t spike_format, bool store_v_seq);
std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_backward(
    Tensor grad_spikes, OptionalTensor grad_v_last, OptionalTensor grad_w_last, OptionalTensor grad_v_seq, Tensor x,
    OptionalTensor v, OptionalTensor w, OptionalTensor leak, OptionalTensor threshold, OptionalTensor gain,
    OptionalTensor scale, OptionalTensor shift, int64_t neuron, std::vector<double> numbers,
    std::optional<double> v_reset, int64_t surrogate, std::vector<double> widths, bool detach_reset, int64_t wanted);

// A convolution of spikes that are bits, [images, height, width, channels / 8], float32 out [images, y, x, outputs].
Tensor packed_conv(Tensor bits, Tensor weight, OptionalTensor bias, int64_t height, int64_t width,
                   std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation);

// spectral
Tensor spectral_gate_forward(Tensor x, Tensor weight, bool wide);
std::tuple<Tensor, Tensor> spectral_gate_backward(Tensor grad, Tensor x, Tensor weight, bool wants_x,
                                                  bool wants_weight);
Tensor spectrum_forward(Tensor x, int64_t blocks, double inner);
Tensor spectrum_inverse(Tensor spectrum, int64_t width, double inner);
Tensor spectrum_real_parts(Tensor half, int64_t channels);

// fixedpoint
Tensor fixed_quantize(Tensor x, OptionalTensor frac_bits, OptionalTensor seed, int64_t width, int64_t int_bits,
                      bool is_signed, int64_t rounding, int64_t overflow, int64_t saturated_bits);
Tensor fixed_to_raw(Tensor x, OptionalTensor seed, int64_t width, int64_t int_bits, bool is_signed, int64_t rounding,
                    int64_t overflow, int64_t saturated_bits);
std::tuple<Tensor, Tensor> fixed_quantize_backward(Tensor grad, Tensor x, OptionalTensor frac_bits, OptionalTensor seed,
                                                   int64_t width, int64_t int_bits, bool is_signed, int64_t rounding,
                                                   int64_t overflow, int64_t saturated_bits, bool wrap_gradient,
                                                   bool wants_x, bool wants_frac_bits);
Tensor limit_digits(Tensor x, int64_t k, bool is_signed);
Tensor integer_conv(Tensor x, Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool wide);

// earlyexit
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> exit_decide(Tensor logits, OptionalTensor thresholds,
                                                               double threshold, int64_t criterion, double temperature,
                                                               bool strict);

// diffusion
std::tuple<Tensor, Tensor, Tensor> solver_step(Tensor x, OptionalTensor output, OptionalTensor uncond,
                                               std::vector<Tensor> history, OptionalTensor noise, OptionalTensor seed,
                                               OptionalTensor coefficients, std::vector<double> numbers,
                                               double guidance, double limit, int64_t stream, int64_t wanted);
void solver_step_into(Tensor x, OptionalTensor output, OptionalTensor uncond, std::vector<Tensor> history,
                      OptionalTensor noise, OptionalTensor seed, OptionalTensor coefficients,
                      std::vector<double> numbers, double guidance, double limit, int64_t stream, OptionalTensor x_next,
                      OptionalTensor converted, OptionalTensor corrected);
void solver_table_step(Tensor ring, OptionalTensor output, Tensor table, int64_t step, OptionalTensor uncond,
                       OptionalTensor noise, OptionalTensor seed, double guidance);
std::tuple<Tensor, Tensor> solver_step_backward(OptionalTensor grad_x_next, OptionalTensor grad_converted,
                                                OptionalTensor grad_corrected, Tensor x, OptionalTensor output,
                                                OptionalTensor uncond, std::vector<Tensor> history,
                                                OptionalTensor noise, OptionalTensor seed, OptionalTensor coefficients,
                                                std::vector<double> numbers, double guidance, double limit,
                                                int64_t stream, int64_t wants);
Tensor normal_numbers(Tensor seed, int64_t stream, int64_t n);
Tensor magnitude_quantile(Tensor x, double q);

// diffusion: tree search
Tensor tree_select(Tensor value, Tensor visits, Tensor taken, Tensor start, Tensor count, Tensor pool, Tensor allowed,
                   Tensor roots, OptionalTensor uniform, int64_t descents, int64_t levels, int64_t width, double lam,
                   double c_uct);
Tensor tree_sample(Tensor value, Tensor start, Tensor count, Tensor pool, Tensor roots, Tensor uniform, double lam);
void tree_backup(Tensor value, Tensor parent, Tensor depth, Tensor start, Tensor count, Tensor pool, Tensor nodes,
                 double lam);

}  // namespace fastcifar
