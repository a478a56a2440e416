// The launchers: one per kernel family, what library.cpp calls once it has checked the tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lattice.h"

namespace hyperconv {

// What became of a launch.
struct Status {
  cudaError_t error;  // the runtime's own
  bool known = true;  // whether the plan is one that this library can carry out

  bool good() const { return error == cudaSuccess && known; }
};
constexpr Status kUnknownPlan = {cudaSuccess, false};

// `error` of our own call to the runtime. It is returned, so that it must not stay behind to surface at the
// next call of somebody else's; what others left is neither looked at nor cleared.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// How the operands are multiplied.
enum class Number { kHalf, kBfloat16, kTf32, kIeee };

// An activation of unknown element type; see Source in staging.cuh.
struct Operand {
  const void* data;
  Strides strides;
  int channels;  // per group
};

// The coordinate MLP, of activated layers act(gain * (W h + b)). widths[0] is D, widths[n + 1] the features of layer n.
constexpr int kMaxLayers = 8, kMaxWidth = 64;

enum class Activation { kLeakyRelu, kRelu, kGelu, kSilu, kTanh, kSine };

struct MlpArguments {
  const float* coordinates;        // [K, D], or [K, D + 1] with a window
  const void* weight[kMaxLayers];  // [features, previous features]
  const void* bias[kMaxLayers];    // [features]
  int widths[kMaxLayers + 1];
  int layers, taps;
  Activation activation;
  float slope;         // of the leaky ReLU
  float gain;
  bool linear_output;  // the last layer is W h + b
  bool windowed;       // its inputs are multiplied by the column beside the coordinates
};

// Banded matrices and rearranged coefficients, written by one small launch before the others.
struct PrepareArguments {
  const float* basis;          // [R, K]; not read if an MLP computes it
  void* bands;                 // [bands, R, chunks, 32 lanes, 8], or null: write none
  const void* coefficients;    // any strides, or null: write none
  void* packed;                // [groups, in / 16, R, out_tiles, 32 lanes, 8]
  int64_t stride_group, stride_in, stride_out, stride_rank;
  int groups, in_channels, out_channels, out_tiles, rank;
  // float16 only, whose factors are scaled by powers of two. With bands, by phi's sums of magnitudes; without,
  // by the largest of `norms` [norm_rows, R], the sums of A's magnitudes over a group's outputs.
  const float* norms;
  int norm_rows;
  float* scales;          // [R], written: what the sums of the kernel that follows are to be multiplied by; or null
  bool transposed_bands;  // as right operands: k, along the patch, changes first among a lane's pairs
};
Status prepare(Number number, const Lattice& map, const PrepareArguments& arguments,
               cudaStream_t stream);
// The same with phi from the MLP, float32 [R, K], written too, but not in float16; a constant 1 after the features, if R has
// room. `wide`: the MLP's parameters are float32, else of the operands' type.
Status prepare_from_mlp(Number number, const Lattice& map, const PrepareArguments& arguments,
                        const MlpArguments& mlp, bool wide, float* basis, cudaStream_t stream);

// The same as wgmma's right operands (ptx::core_descriptor), for the kernels of squares.cuh, which take `pack`
// functions at a time: bands [packs, steps, 2, pack, 16 t, 8], a patch's rows `patch_width` wide, and
// coefficients [out / outputs, in / 16, packs * pack, 2, outputs, 8]; zeros for the functions beyond the last.
Status prepare_cores(Number number, const Lattice& map, const PrepareArguments& arguments, int outputs,
                     int pack, int steps, int patch_width, cudaStream_t stream);

// Sizes of a block that the planner chose (hyperconv_ext/backends/cuda/tiles.py).
struct Choice {
  int out_tiles;  // output channels of a block, in tiles of 16
  int ranks;      // basis functions at a time
  int warps;
  int slice;        // 16-row tiles of the patch whose bands are in shared memory together
  int halo_stages;  // halos in shared memory together
  int shared_bytes;
  int patch_width;  // positions of a row of the patch as squares.cuh has it; 0: not by wgmma
};

struct ConvArguments {
  Operand x;
  const void* bands;
  const void* packed;
  const void* bias;  // [out channels], or null
  void* y;
  Strides y_strides;
  int y_channels;  // per group
  int groups, rank;
  bool aligned;
};
Status basis_conv(Number number, const Lattice& map, const Choice& choice,
                  const ConvArguments& arguments, cudaStream_t stream);
// The same on what `prepare_cores` has written, a block's output channels together.
Status basis_conv_sm90(Number number, const Lattice& map, const Choice& choice,
                       const ConvArguments& arguments, cudaStream_t stream);

struct CoefficientArguments {
  Operand g, x;
  const void* bands;
  float* partial;  // [splits, C_out, C_in / groups, R]; [C_out, C_in / groups, R], zeros, if `atomic`
  int groups, rank, splits;
  bool atomic, aligned;
  const float* scales;  // of `prepare`
};
Status coefficient_gradient(Number number, const Lattice& map, const Choice& choice,
                            const CoefficientArguments& arguments, cudaStream_t stream);
// The same on bands of `prepare_cores`; `partial` is [splits, R, C_out, C_in].
Status coefficient_gradient_sm90(Number number, const Lattice& map, const Choice& choice,
                                 const CoefficientArguments& arguments, cudaStream_t stream);

struct BasisArguments {
  Operand g, x;
  const void* packed;
  float* partial;  // [splits, pieces, R, K]; [R, K], zeros, if `atomic`
  int groups, rank, splits;
  bool atomic, aligned;
  const float* scales;  // of `prepare`
};
// Pieces of the patch, each with a sum of its own: a block holds the gradients of one.
int basis_gradient_pieces(const Lattice& map);
Status basis_gradient(Number number, const Lattice& map, const Choice& choice,
                      const BasisArguments& arguments, cudaStream_t stream);
// The same on what `prepare_cores` has written, 64 of x's channels together; the pieces are blocks of input and
// of output channels.
int basis_gradient_sm90_pieces(const Choice& choice, int in_channels, int out_channels);
Status basis_gradient_sm90(Number number, const Lattice& map, const Choice& choice,
                           const BasisArguments& arguments, cudaStream_t stream);

// Of a layer: g is the gradient of its output, x its input.
struct JointArguments {
  Operand g, x;
  const void *bands, *packed;  // of `prepare_cores`
  void* dx;
  Strides dx_strides;
  int dx_channels;
  float* partial;  // [splits, R, channels of g, of x]; [R, ...], zeros, if `atomic`
  int groups, rank, splits;
  bool atomic, aligned;
  const float* scales;  // of `prepare_cores`
};
Status joint_gradient_sm90(Number number, const Lattice& map, const Choice& choice,
                           const JointArguments& arguments, cudaStream_t stream);

// basis: float32 [features + constant, K]; the last row is ones if `constant`.
Status coordinate_mlp(Number number, const MlpArguments& arguments, float* basis, bool constant,
                      cudaStream_t stream);
// gradient: float32 [at least features, K]. The sums have the parameters' shapes and dtype.
struct MlpGradients {
  void* weight[kMaxLayers];
  void* bias[kMaxLayers];
};
Status coordinate_mlp_backward(Number number, const MlpArguments& arguments, const float* gradient,
                               const MlpGradients& sums, cudaStream_t stream);

}  // namespace hyperconv
