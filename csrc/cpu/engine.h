// What crosses between Python and the engine: plain structures, no PyTorch header, so that one binary
// serves every Python and every PyTorch and is built where neither is installed.
// hyperconv_ext/backends/cpu/library.py declares the same fields in the same order.
#pragma once
#include <cstdint>

namespace hyperconv {

// Of activations and coefficients. What is computed with is float, or double beside kDouble.
enum Dtype : int32_t { kFloat, kDouble, kBfloat16, kHalf };

// z by taps, by transforms, or by taps of planes, for few source channels.
enum Algorithm : int32_t { kTaps, kFft, kPlanes };

// Results asked for, as bits.
enum Wanted : int32_t { kOutput = 1, kCoefficients = 2, kBasis = 4 };

// One spatial axis: hyperconv_ext/backends/lattice.py has the meaning of each number.
struct Axis {
  int32_t out_size, in_size, kernel, phases, tile, tiles, step, stride, jump, patch, taps, scale, shift,
      divisor, inverse, residues, dilation, modulus, bands, back, first, tap_step;
};

// Circles of `size` points along an axis, by stages of these radices (0 ends them); 1: none.
struct Circle {
  int32_t size, radices[4];
};

// Element strides of an activation [B, C, D, H, W].
struct Strides {
  int64_t batch, axis[3], channel;
};

// One convolution and its gradients, of a source s and coefficients A, at the positions of a target t:
//
//     z[s, r, q] = sum_k phi_r(k) s[where tap k of position q falls]    (where: the axes)
//     output[t, q] = bias[t] + sum_{s, r} A[t, s, r] z[s, r, q]
//     dA[t, s, r] = sum_q target[t, q] z[s, r, q]
//     dphi_r(k) = sum_{s, q} (sum_t A[t, s, r] target[t, q]) s[where tap k of position q falls]
//
// The forward operator has s = x and t = y; the input gradient s = g and t = x, whose target is x itself.
struct Convolution {
  int32_t dtype, algorithm, wanted;
  int32_t batch, groups, source_channels, target_channels, rank;  // channels per group
  // Into how many slices of the tiles, and parts of the blocks of source channels (at most their number),
  // sums are dealt, whatever the threads: it decides how they round.
  int32_t slices, parts;
  int32_t threads;  // at most
  Axis axis[3];
  Circle circle[3];
  Strides source_strides, target_strides, output_strides;
  int64_t coefficient_group, coefficient_target, coefficient_source, coefficient_rank;  // strides of A
  const void *source, *target, *coefficients;
  const void* basis;       // [R, taps], in the type that is computed with
  const void* bias;        // [groups * target_channels], or null
  const void* roots;       // of unity for the circles, stage after stage
  void* output;
  void* coefficients_gradient;  // strides as A's
  void* basis_gradient;         // [R, taps], in the type that is computed with
};

constexpr int kMaxLayers = 16;

// The coordinate MLP, see hyperconv_ext/backends/reference.py. Parameters are contiguous float (or double).
struct Mlp {
  int32_t dtype;  // kFloat or kDouble
  int32_t taps, layers, activation, linear_output, constant, threads, windowed;
  int32_t widths[kMaxLayers + 1];
  double slope, gain;
  const void* coordinates;  // [K, widths[0]], or with a window, if `windowed`, one column more
  const void* weight[kMaxLayers];
  const void* bias[kMaxLayers];
  void* basis;            // [R, K], written by the forward pass
  const void* gradient;   // [R, K], read by the backward pass
  void* weight_gradient[kMaxLayers];
  void* bias_gradient[kMaxLayers];
};

// 0, or what went wrong.
enum Status : int32_t { kDone, kNoMemory, kUnknown };

// PyTorch's: runs body(begin, end, context) on pieces of [begin, end), perhaps on several threads.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*body)(int64_t, int64_t, void*), void* context);

// The engine compiled for one level of instructions.
struct Engine {
  Status (*convolve)(const Convolution&, ParallelFor);
  Status (*mlp_forward)(const Mlp&, ParallelFor);
  Status (*mlp_backward)(const Mlp&, ParallelFor);
  uint64_t (*digest)(const void* const* blocks, const int64_t* bytes, int32_t count);
};

extern const Engine kBaseline;
#if defined(__x86_64__)
extern const Engine kAvx2, kAvx512, kAvx512Bf16;
#endif

}  // namespace hyperconv
