// What the kernels by wgmma and TMA share: the squares of outputs that their warpgroups work on, the units and
// halos of these, the first product.
//
//   z' [16 channels of a warp, functions x 16 outputs] = x' [channels, patch] bands' [patch, functions x 16]
//
// summed over 16 positions of the patch at a time: as many rows of a warpgroup's 64 as a warp has channels.
#pragma once

#include <cuda.h>

#include "launchers.h"
#include "lattice.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace hyperconv {

constexpr int kRanks = 5;  // basis functions of a pack; of the last one, zeros where there are fewer
constexpr int kColumns = 16 * kRanks;
constexpr int kBandStep = 16 * kColumns * 2;  // bytes of a pack's bands for 16 positions of the patch
constexpr int kSide = 8;                      // outputs of a square, along both axes
constexpr int kSquareUnits = 4;               // of 16 outputs
constexpr int kBox = 64;                      // channels of a copy: 128 bytes
constexpr int kGroups = 2;                    // warpgroups that multiply, beside that of the producer
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kAlignment = 1024;  // of what is swizzled, in shared memory
constexpr int kSharedBytes = 227 * 1024;

__host__ __device__ constexpr int packs_of(int rank) { return ceil_div(rank, kRanks); }

// A unit of 16 outputs, kHeight x kWidth; the patch is laid out kPatchWidth wide, in kSteps times 16 positions;
// the halo of a square in kHaloHeight rows of kPitch positions, a multiple of eight, for the swizzle of a
// lane's rows to be the same throughout.
template <int kUnitHeight, int kUnitWidth, int kPatchWidth, int kPatchSteps, int kHaloHeight, int kHaloPitch>
struct Shape {
  static constexpr int kHeight = kUnitHeight, kWidth = kUnitWidth, kPatch = kPatchWidth,
                       kSteps = kPatchSteps, kRows = kHaloHeight, kPitch = kHaloPitch;
  static constexpr int kHaloBytes = kRows * kPitch * 2 * kBox;
  static constexpr int kBandBytes = kSteps * kBandStep;
  static_assert(kHeight * kWidth == kUnit && kPitch % 8 == 0 && kHaloBytes % kAlignment == 0);

  // First output of a unit in its square.
  static __device__ __forceinline__ int unit_h(int unit) { return unit / (kSide / kWidth) * kHeight; }
  static __device__ __forceinline__ int unit_w(int unit) { return unit % (kSide / kWidth) * kWidth; }
};
using Five = Shape<4, 4, 8, 4, 12, 16>;      // kernels up to 5 x 5
using Seven = Shape<8, 2, 8, 7, 14, 16>;     // up to 7 x 7
using Eleven = Shape<4, 4, 16, 14, 18, 24>;  // up to 11 x 11

// Squares of outputs, of all images.
struct Squares {
  int wide, high, count;

  // First output of a square: width, height, image.
  struct Square {
    int w, h, n;
  };
  __device__ __forceinline__ Square operator[](int i) const {
    const int row = i / wide;
    return {i % wide * kSide, row % high * kSide, row / high};
  }
};

inline Squares squares_of(const Lattice& map) {
  const int wide = ceil_div(map.axis[2].out_size, kSide), high = ceil_div(map.axis[1].out_size, kSide);
  return {wide, high, wide * high * map.batch};
}

// The maps of inputs, a halo to a box, and of outputs, a unit to a box.
template <typename T, class S>
Status encode_halos(CUtensorMap* map, const Lattice& lattice, const void* data, const Strides& strides,
                    int channels) {
  const int sizes[4] = {channels, lattice.axis[2].in_size, lattice.axis[1].in_size, lattice.batch};
  const int box[3] = {kBox, S::kPitch, S::kRows};
  return encode_map(map, std::is_same_v<T, __nv_bfloat16>, data, sizes, strides, box);
}
template <typename T, class S>
Status encode_units(CUtensorMap* map, const Lattice& lattice, const void* data, const Strides& strides,
                    int channels) {
  const int sizes[4] = {channels, lattice.axis[2].out_size, lattice.axis[1].out_size, lattice.batch};
  const int box[3] = {kBox, S::kWidth, S::kHeight};
  return encode_map(map, std::is_same_v<T, __nv_bfloat16>, data, sizes, strides, box);
}

// Whether the planner's numbers are those of a kernel with this shape.
template <class S>
bool fits(const Lattice& map, const Choice& choice, int shared_bytes) {
  return choice.shared_bytes == shared_bytes && choice.slice == S::kSteps && choice.ranks == kRanks &&
         choice.patch_width == S::kPatch && map.axis[1].unit == S::kHeight && map.axis[2].unit == S::kWidth;
}

// Calls function(T{}, S{}) with the number format and the shape.
template <class Function>
Status with_shape(Number number, const Choice& choice, const Function& function) {
  const auto with = [&](auto element) -> Status {
    if (choice.slice == Five::kSteps) return function(element, Five{});
    if (choice.slice == Seven::kSteps) return function(element, Seven{});
    if (choice.slice == Eleven::kSteps) return function(element, Eleven{});
    return kUnknownPlan;
  };
  if (number == Number::kHalf) return with(__half{});
  if (number == Number::kBfloat16) return with(__nv_bfloat16{});
  return kUnknownPlan;
}

// The warpgroup of this thread, once one thread has made the barriers.
template <class Barriers>
__device__ __forceinline__ int warpgroup(const Barriers& barriers) {
  if (threadIdx.x == 0) {
    barriers();
    ptx::fence_proxy_async();  // the barriers, which the copy engine arrives at
  }
  __syncthreads();  // the barriers are there
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
}

// What the threads of a block do: one of the first warpgroup copies, and the other warpgroups multiply, with the
// registers that it gives up.
template <class Barriers, class Produce, class Consume>
__device__ __forceinline__ void run_roles(const Barriers& barriers, const Produce& produce,
                                          const Consume& consume) {
  const int group = warpgroup(barriers) - 1;
  if (group < 0) {
    ptx::fewer_registers<24>();
    if (threadIdx.x == 0) produce();
  } else {
    ptx::more_registers<240>();
    consume(group);
  }
}

// Position in a ring, and the parity of the phase that this round waits for.
template <int kSize>
struct Ring {
  int at = 0;
  uint32_t parity;
  __device__ __forceinline__ explicit Ring(uint32_t parity) : parity(parity) {}
  __device__ __forceinline__ void advance() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Where dynamic shared memory begins to be aligned.
__device__ __forceinline__ uint32_t aligned_base() {
  const uint32_t address = ptx::shared_address(ptx::dynamic_shared());
  return (address + kAlignment - 1) & ~(kAlignment - 1);
}

// From a halo's first byte to a lane's row of the first 8x8 matrices of a unit's patch: eight positions, or the
// next eight, by channels 0..7, or 8..15. The next 16 channels are an XOR with 32.
template <class S>
__device__ __forceinline__ uint32_t patch_row(int unit, int lane, int next_positions, int next_channels) {
  const int next = S::kPatch == 8 ? S::kPitch : 8;
  const int column = S::unit_w(unit) + lane % 8;
  const int position = S::unit_h(unit) * S::kPitch + column + next_positions * next;
  return position * 2 * kBox + ((next_channels ^ column % 8) << 4);
}
// The same for x': matrices 0 and 1 of ldmatrix are channels 0..7 and 8..15, 2 and 3 the next positions.
template <class S>
__device__ __forceinline__ uint32_t transposed_row(int unit, int lane) {
  return patch_row<S>(unit, lane, lane / 16, lane / 8 % 2);
}
// From those matrices to the next 16 positions.
template <class S>
constexpr int kPatchStep = (S::kPatch == 8 ? 2 * S::kPitch : S::kPitch) * 2 * kBox;

// What a lane holds of x' for 16 channels and 16 kSteps positions of the patch, by its row of the first matrices:
// the others are a constant further.
template <class S, int kSteps>
__device__ __forceinline__ void load_patch(uint32_t (&patch)[kSteps][4], uint32_t row) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) ptx::ldmatrix_x4_trans(patch[j], row + j * kPatchStep<S>);
}

// The right operand of the functions from `first` on, of a pack's bands at this address.
__device__ __forceinline__ uint64_t band_descriptor(uint32_t bands, int first = 0) {
  return ptx::core_descriptor(bands + first * kUnit * 16, kColumns / 8 * 128);
}

// z' of kWidth / 16 functions, or what these positions of the patch `add` to it: a group of products, committed.
template <typename T, class S, int kWidth, int kSteps>
__device__ __forceinline__ void form(float (&z)[kWidth / 2], const uint32_t (&patch)[kSteps][4],
                                     uint64_t bands, bool add = false) {
  static_assert(S::kSteps % kSteps == 0);
  ptx::wgmma_fence();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    ptx::Wgmma<T, kWidth>::multiply(z, patch[j], bands + j * (kBandStep >> 4), add || j > 0);
  }
  ptx::wgmma_commit();
}

}  // namespace hyperconv
