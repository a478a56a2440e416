// basis_conv_fwd and basis_conv_bwd_input by wgmma and TMA: two axes, stride and dilation 1, as many input as
// output channels. A persistent block has one producer, which keeps the copy engine busy, and two consumer
// warpgroups. A consumer works on 8 x 8 outputs at a time; each of its four warps on a unit of 16 of them:
//
//   z' [16 channels, 5 x 16 outputs] = x' [16 channels, patch] bands' [patch, 80]    (16 positions at a time)
//   y [16 outputs, out]             += z_r [16 outputs, 16 channels] A_r [16, out]
//
// The channels are the rows of the first product, so that its left operand is the patch: of another unit in
// every warp, while all of them share the bands. movmatrix turns z' into the left operand of the second product
// in registers. z of the next 16 channels is on its way before y of these begins, and runs beside it.
#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "lattice.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace hyperconv {
namespace {

constexpr int kRanks = 5;            // basis functions, the last ones zero where there are fewer
constexpr int kColumns = 16 * kRanks;
constexpr int kBandStep = 16 * kColumns * 2;  // bytes of the bands for 16 positions of the patch
constexpr int kGroups = 2;                    // consumers
constexpr int kSide = 8;                      // outputs of a consumer, along both axes
constexpr int kBox = 64;                      // channels of a copy: 128 bytes
constexpr int kThreads = 128 * (kGroups + 1);

// A unit of 16 outputs, kHeight x kWidth; the patch is laid out kPatchWidth wide, in kSteps times 16 positions;
// the halo of a consumer in kHaloHeight rows of kPitch positions, a multiple of eight, for the swizzle of a
// lane's rows to be the same throughout.
template <int kUnitHeight, int kUnitWidth, int kPatchWidth, int kPatchSteps, int kHaloHeight, int kHaloPitch,
          int kHaloStages>
struct Shape {
  static constexpr int kHeight = kUnitHeight, kWidth = kUnitWidth, kPatch = kPatchWidth,
                       kSteps = kPatchSteps, kRows = kHaloHeight, kPitch = kHaloPitch, kStages = kHaloStages;
  static constexpr int kHaloBytes = kRows * kPitch * 2 * kBox;
  static constexpr int kBandBytes = kSteps * kBandStep;
  static_assert(kHeight * kWidth == kUnit && kPitch % 8 == 0 && kHaloBytes % 1024 == 0);
};
using Five = Shape<4, 4, 8, 4, 12, 16, 2>;     // kernels up to 5 x 5
using Seven = Shape<8, 2, 8, 7, 14, 16, 2>;    // up to 7 x 7
using Eleven = Shape<4, 4, 16, 14, 18, 24, 1>;  // up to 11 x 11

struct Parameters {
  Lattice map;
  const void *bands, *packed, *bias;  // `prepare_cores`; bias: [out], or null
  int squares_w, squares_h, squares;  // squares of outputs, those of all images
};

// Bytes of shared memory: halos and staged outputs first, whose swizzle wants multiples of 1024.
template <class S, int kC>
struct Layout {
  // A is resident, or streams through a ring of blocks of 16 channels.
  static constexpr bool kResident = kC == kBox;
  static constexpr int kBlocks = kC / 16, kBlockBytes = kRanks * 16 * kC * 2;
  static constexpr int kRing = kResident ? 1 : S::kStages + 1;
  static constexpr int kWeightBytes = (kResident ? kBlocks : kRing) * kBlockBytes;
  static constexpr int kOut = kGroups * S::kStages * S::kHaloBytes;
  static constexpr int kOutBytes = kUnit * kC * 2;  // of a warp
  static constexpr int kBands = kOut + kGroups * 4 * kOutBytes;
  static constexpr int kWeights = kBands + S::kBandBytes;
  static constexpr int kBarriers = kWeights + kWeightBytes;
  static constexpr int kBarrierCount = 1 + 2 * kGroups * S::kStages + 2 * kRing;
  static constexpr int kAlignment = 1024;
  static constexpr int kBytes = kBarriers + 8 * kBarrierCount + kAlignment;
  static_assert(kBytes <= 227 * 1024);
};

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

template <typename T, class S, int kC>
class BasisConv {
  using L = Layout<S, kC>;

 public:
  __device__ __forceinline__ BasisConv(const CUtensorMap* x, const CUtensorMap* y, const Parameters& p)
      : x_(x), y_(y), p_(p) {
    const uint32_t address = ptx::shared_address(ptx::dynamic_shared());
    base_ = (address + L::kAlignment - 1) & ~(L::kAlignment - 1);
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(constants(), 1);
      for (int g = 0; g < kGroups; ++g) {
        for (int s = 0; s < S::kStages; ++s) {
          ptx::mbarrier_init(halo_full(g, s), 1);
          ptx::mbarrier_init(halo_empty(g, s), 4);
        }
      }
      for (int s = 0; s < L::kRing; ++s) {
        ptx::mbarrier_init(weights_full(s), 1);
        ptx::mbarrier_init(weights_empty(s), 4 * kGroups);
      }
      ptx::fence_proxy_async();  // the barriers, which the copy engine arrives at
    }
    __syncthreads();  // the barriers are there
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
    if (group < 0) {
      ptx::fewer_registers<24>();
      if (threadIdx.x == 0) produce();
    } else {
      ptx::more_registers<240>();
      consume(group);
    }
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int i) const { return base_ + L::kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t constants() const { return barrier(0); }
  __device__ __forceinline__ uint32_t halo_full(int g, int s) const {
    return barrier(1 + g * S::kStages + s);
  }
  __device__ __forceinline__ uint32_t halo_empty(int g, int s) const {
    return barrier(1 + (kGroups + g) * S::kStages + s);
  }
  __device__ __forceinline__ uint32_t weights_full(int s) const {
    return barrier(1 + 2 * kGroups * S::kStages + s);
  }
  __device__ __forceinline__ uint32_t weights_empty(int s) const { return weights_full(L::kRing + s); }
  __device__ __forceinline__ uint32_t halo(int g, int s) const {
    return base_ + (g * S::kStages + s) * S::kHaloBytes;
  }

  // First output of a square: width, height, image.
  struct Square {
    int w, h, n;
  };
  __device__ __forceinline__ Square square(int i) const {
    const int row = i / p_.squares_w;
    return {i % p_.squares_w * kSide, row % p_.squares_h * kSide, row / p_.squares_h};
  }

  // The copies in the order in which the consumers use them. A square beyond the last one is all zeros.
  __device__ __forceinline__ void produce() const {
    const int origin_h = phase_origin(p_.map.axis[1], 0), origin_w = phase_origin(p_.map.axis[2], 0);
    Ring<S::kStages> stage(1);
    Ring<L::kRing> ring(1);
    bool first = true;
    for (int i = blockIdx.x * kGroups; i < p_.squares; i += gridDim.x * kGroups) {
      for (int c = 0; c < kC; c += kBox) {
        for (int g = 0; g < kGroups; ++g) {
          const Square at = square(i + g);
          ptx::mbarrier_wait(halo_empty(g, stage.at), stage.parity);
          ptx::mbarrier_expect(halo_full(g, stage.at), S::kHaloBytes);
          ptx::tensor_load(halo(g, stage.at), x_, c, at.w + origin_w, at.h + origin_h, at.n,
                           halo_full(g, stage.at));
        }
        stage.advance();
        if (first) {
          ptx::mbarrier_expect(constants(), S::kBandBytes + (L::kResident ? L::kWeightBytes : 0));
          ptx::bulk_load(base_ + L::kBands, p_.bands, S::kBandBytes, constants());
          if (L::kResident) ptx::bulk_load(base_ + L::kWeights, p_.packed, L::kWeightBytes, constants());
          first = false;
        }
        if constexpr (!L::kResident) {
          for (int block = c / 16; block < (c + kBox) / 16; ++block) {
            ptx::mbarrier_wait(weights_empty(ring.at), ring.parity);
            ptx::mbarrier_expect(weights_full(ring.at), L::kBlockBytes);
            ptx::bulk_load(base_ + L::kWeights + ring.at * L::kBlockBytes,
                           static_cast<const char*>(p_.packed) + block * L::kBlockBytes, L::kBlockBytes,
                           weights_full(ring.at));
            ring.advance();
          }
        }
      }
    }
  }

  // What a lane holds of x' for 16 channels, from the halo: by its row of the first 8x8 matrices, the others
  // are a constant further.
  __device__ __forceinline__ void load(uint32_t (&patch)[S::kSteps][4], uint32_t row) const {
    constexpr int kStep = (S::kPatch == 8 ? 2 * S::kPitch : S::kPitch) * 2 * kBox;
#pragma unroll
    for (int j = 0; j < S::kSteps; ++j) ptx::ldmatrix_x4_trans(patch[j], row + j * kStep);
  }

  __device__ __forceinline__ void consume(int group) const {
    const int lane = threadIdx.x % 32, unit = threadIdx.x / 32 % 4;
    constexpr int kAcross = kSide / S::kWidth;
    const int unit_h = unit / kAcross * S::kHeight, unit_w = unit % kAcross * S::kWidth;
    // Matrices 0 and 1 of ldmatrix are eight positions by channels 0..7 and 8..15; 2 and 3 the next eight.
    const int next = S::kPatch == 8 ? S::kPitch : 8;
    const int column = unit_w + lane % 8;
    const int position = unit_h * S::kPitch + column + lane / 16 * next;
    const uint32_t row = position * 2 * kBox + ((lane / 8 % 2 ^ column % 8) << 4);
    const uint64_t bands = ptx::core_descriptor(base_ + L::kBands, kColumns / 8 * 128);
    const uint64_t weights = ptx::core_descriptor(base_ + L::kWeights, kC / 8 * 128);

    uint32_t patch[S::kSteps][4], left[2][kRanks][4];
    float z[kColumns / 2], y[kC / 2];
    Ring<S::kStages> stage(0);
    Ring<L::kRing> ring(0);
    int released = 0;  // of the ring, next

    const auto form = [&] {
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < S::kSteps; ++j) {
        ptx::Wgmma<T, kColumns>::multiply(z, patch[j], bands + j * (kBandStep >> 4), j > 0);
      }
      ptx::wgmma_commit();
    };
    const auto mix = [&](const uint32_t (&left)[kRanks][4], int block) {
      const int64_t at = (L::kResident ? block : ring.at) * (L::kBlockBytes >> 4);
      ptx::wgmma_fence();
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        ptx::Wgmma<T, kC>::multiply(y, left[r], weights + at + r * (16 * kC * 2 >> 4), block + r > 0);
      }
      ptx::wgmma_commit();
    };
    // Halves of z' (channels i / 2, outputs i % 2), each transposed.
    const auto turn = [&](uint32_t (&left)[kRanks][4]) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = z + 4 * (2 * r + i % 2) + 2 * (i / 2);
          left[r][i] = ptx::movmatrix_trans(ptx::pack<T>(pair[0], pair[1]));
        }
      }
    };
    const auto release = [&] {
      if constexpr (!L::kResident) {
        if (lane == 0) ptx::mbarrier_arrive(weights_empty(released));
        if (++released == L::kRing) released = 0;
      }
    };

    bool first = true;
    for (int i = blockIdx.x * kGroups; i < p_.squares; i += gridDim.x * kGroups) {
      ptx::mbarrier_wait(halo_full(group, stage.at), stage.parity);
      load(patch, halo(group, stage.at) + row);
      if (first) ptx::mbarrier_wait(constants(), 0);
      first = false;
      form();
#pragma unroll
      for (int block = 0; block < L::kBlocks; ++block) {
        // Under way: z of this block and, behind it or before, y of the last one.
        if (block == 0) {
          ptx::wgmma_wait<0>();
        } else {
          ptx::wgmma_wait<1>();
        }
        ptx::keep(z);
        if (block >= 2) release();  // what y of the last block but one has read
        turn(left[block % 2]);
        const bool last_of_box = (block + 1) % (kBox / 16) == 0;
        if (last_of_box) {
          if (lane == 0) ptx::mbarrier_arrive(halo_empty(group, stage.at));
          stage.advance();
        }
        if (block + 1 < L::kBlocks) {
          if (last_of_box) ptx::mbarrier_wait(halo_full(group, stage.at), stage.parity);
          load(patch, (halo(group, stage.at) + row) ^ (block + 1) % (kBox / 16) << 5);
          form();
        }
        if constexpr (!L::kResident) ptx::mbarrier_wait(weights_full(ring.at), ring.parity);
        mix(left[block % 2], block);
        if constexpr (!L::kResident) ring.advance();
      }
      ptx::wgmma_wait<0>();
      ptx::keep(y);
      release();
      release();
      store(y, group, unit, lane, i + group);
    }
    if (lane == 0) ptx::store_wait();
  }

  // y of a warp's unit and the bias: staged, then stored by the copy engine, which clips at the edges.
  __device__ __forceinline__ void store(const float (&y)[kC / 2], int group, int unit, int lane,
                                        int i) const {
    const T* bias = static_cast<const T*>(p_.bias);
    const uint32_t staged = base_ + L::kOut + (4 * group + unit) * L::kOutBytes;
    constexpr int kBoxBytes = kUnit * 2 * kBox;
    const int row = lane % 16;
    if (lane == 0) ptx::store_wait_read();
    __syncwarp();  // the last unit has left
#pragma unroll
    for (int c = 0; c < kC; c += 16) {
      uint32_t pairs[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float low = y[c / 2 + 2 * m], high = y[c / 2 + 2 * m + 1];
        if (bias) {
          const int channel = c + m / 2 * 8 + 2 * (lane % 4);
          low += ptx::to_float(bias[channel]);
          high += ptx::to_float(bias[channel + 1]);
        }
        pairs[m] = ptx::pack<T>(low, high);
      }
      const int chunk = c % kBox / 8 + lane / 16;
      ptx::stmatrix_x4(staged + c / kBox * kBoxBytes + row * 2 * kBox + ((chunk ^ row % 8) << 4), pairs);
    }
    ptx::fence_proxy_async();
    __syncwarp();  // all of the unit is there, and fenced
    if (lane != 0 || i >= p_.squares) return;
    const Square at = square(i);
    constexpr int kAcross = kSide / S::kWidth;
    const int h = at.h + unit / kAcross * S::kHeight, w = at.w + unit % kAcross * S::kWidth;
    for (int c = 0; c < kC; c += kBox) {
      ptx::tensor_store(staged + c / kBox * kBoxBytes, y_, c, w, h, at.n);
    }
    ptx::store_commit();
  }

  const CUtensorMap *x_, *y_;
  const Parameters& p_;
  uint32_t base_;
};

template <typename T, class S, int kC>
__global__ __launch_bounds__(kThreads, 1) void basis_conv_sm90_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y,
    const __grid_constant__ Parameters p) {
#if defined(HYPERCONV_HOST_RUNTIME) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BasisConv<T, S, kC>(&x, &y, p).run();
#endif
}

template <typename T, class S, int kC>
Status run(const Lattice& map, const Choice& choice, const ConvArguments& a, cudaStream_t stream) {
  using L = Layout<S, kC>;
  const Axis &height = map.axis[1], &width = map.axis[2];
  if (choice.shared_bytes != L::kBytes || choice.slice != S::kSteps || choice.ranks != kRanks ||
      choice.patch_width != S::kPatch ||
      height.unit != S::kHeight || width.unit != S::kWidth || a.rank > kRanks || a.groups != 1 ||
      a.x.channels != kC || a.y_channels != kC || !a.aligned) {
    return kUnknownPlan;
  }
  Parameters p = {};
  p.map = map;
  p.bands = a.bands;
  p.packed = a.packed;
  p.bias = a.bias;
  p.squares_w = ceil_div(width.out_size, kSide);
  p.squares_h = ceil_div(height.out_size, kSide);
  p.squares = p.squares_w * p.squares_h * map.batch;
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  CUtensorMap x, y;
  const int in_sizes[4] = {kC, width.in_size, height.in_size, map.batch};
  const int out_sizes[4] = {kC, width.out_size, height.out_size, map.batch};
  const int halo[3] = {kBox, S::kPitch, S::kRows}, unit[3] = {kBox, S::kWidth, S::kHeight};
  Status status = encode_map(&x, kBfloat16, a.x.data, in_sizes, a.x.strides, halo);
  if (status.error == cudaSuccess && status.known) {
    status = encode_map(&y, kBfloat16, a.y, out_sizes, a.y_strides, unit);
  }
  if (status.error != cudaSuccess || !status.known) return status;
  int processors = 0;
  status.error = multiprocessors(&processors);
  if (status.error != cudaSuccess) return status;
  const int blocks = std::min(processors, ceil_div(p.squares, kGroups));
  return launch<basis_conv_sm90_kernel<T, S, kC>>(blocks, kThreads, L::kBytes, stream, x, y, p);
}

template <typename T, class S>
Status with_channels(const Lattice& map, const Choice& choice, const ConvArguments& a,
                     cudaStream_t stream) {
  if (choice.out_tiles == 4) return run<T, S, 64>(map, choice, a, stream);
  if (choice.out_tiles == 8) return run<T, S, 128>(map, choice, a, stream);
  return kUnknownPlan;
}

template <typename T>
Status with_shape(const Lattice& map, const Choice& choice, const ConvArguments& a, cudaStream_t stream) {
  if (choice.slice == Five::kSteps) return with_channels<T, Five>(map, choice, a, stream);
  if (choice.slice == Seven::kSteps) return with_channels<T, Seven>(map, choice, a, stream);
  if (choice.slice == Eleven::kSteps) return with_channels<T, Eleven>(map, choice, a, stream);
  return kUnknownPlan;
}

}  // namespace

Status basis_conv_sm90(Number number, const Lattice& map, const Choice& choice, const ConvArguments& a,
                       cudaStream_t stream) {
  if (number == Number::kHalf) return with_shape<__half>(map, choice, a, stream);
  if (number == Number::kBfloat16) return with_shape<__nv_bfloat16>(map, choice, a, stream);
  return kUnknownPlan;
}

}  // namespace hyperconv
