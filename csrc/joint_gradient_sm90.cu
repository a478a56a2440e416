// basis_conv_bwd by wgmma and TMA: the gradients of a layer's input and of A together, of the geometries of
// basis_conv_sm90.cu, 64 channels in and out. g is the gradient of the layer's output; z = phi * g serves both:
//
//   dx[i, q]    = sum over o, r of A[o, i, r] z[o, r, q]
//   dA[o, i, r] = sum over q    of x[i, q]    z[o, r, q]
//
// A block sums its share of the squares. Each of its three consumer warpgroups has a part of its own, since no
// thread could hold the sums of all:
//
//   z' [4 units x 16 channels, 5 x 16 positions] = g' [channels, patch] bands' [patch, 80]
//   dx' [64 in, 64 positions]                   += A_r' [64 in, 16 channels] z_r' [16, 64]   (function by function)
//   dA' [64 in, 5 x 16 channels]                += x' [64 in, 16 positions] z [16, 80]       (unit by unit)
//
// The first, that of basis_conv_sm90.cu, hands z on through shared memory, 16 channels of a square at a time. To
// both others it is the right operand, so that each reads it once: the same cores have positions along N for the
// one and along k for the other. Their left operands stay in registers: A for the whole launch, x for a square.
//
// Clocks of a square by the tensor cores and by shared memory (128 bytes a clock: the patch is g's, z goes in once
// and out twice, copies are counted); and those of the two kernels in whose place this one is, each by its slower
// resource:
//
//   kernels up to    tensor   shared    apart
//   5 x 5             1,920    1,984    2,688
//   7 x 7             2,400    2,448    3,824
//   11 x 11           3,520    3,664    6,624
//
// Had the warpgroups of coefficient_gradient_sm90.cu formed z and kept the sums of dA, both would read the patch,
// and dx would read A beside z: 3,152 clocks of shared memory at 7 x 7.
#include <type_traits>

#include "launch.cuh"
#include "squares.cuh"

namespace hyperconv {
namespace {

constexpr int kJointThreads = 4 * 128;
constexpr int kBlocks = kBox / 16;            // of 16 channels: slots of z
constexpr int kCore = 128;                    // bytes, as all of these
constexpr int kSlab = kColumns / 8 * kCore;   // of z: eight positions by 16 channels, function by function
constexpr int kSlotBytes = kSide * kSlab;
constexpr int kUnitBytes = kUnit * 2 * kBox;  // of x or dx
enum NamedBarrier { kForming = 1, kStoring };
// Of a thread of each warpgroup; they begin with as many as there are for all, 128.
constexpr int kCopying = 24, kSummingInput = 144, kSummingCoefficients = 216;
static_assert(kCopying + 128 + kSummingInput + kSummingCoefficients <= 65536 / 128);

struct Parameters {
  Lattice map;
  const void *bands, *packed;  // `prepare_cores`
  float* partial;              // [splits, R, o, i]
  const float* scales;         // [R], or null
  Squares squares;
  int rank, splits;
  bool atomic;
};

// Bytes of shared memory: what is swizzled first, at multiples of 1024.
template <class S>
struct Layout {
  static constexpr int kStageBytes = S::kHaloBytes + kSquareUnits * kUnitBytes;
  static constexpr int kStages = 2;
  static constexpr int kOut = kStages * kStageBytes;
  static constexpr int kBands = kOut + kSquareUnits * kUnitBytes;
  static constexpr int kSlots = kBands + S::kBandBytes;
  static constexpr int kBarriers = kSlots + kBlocks * kSlotBytes;
  static constexpr int kBarrierCount = 1 + 2 * kStages + 2 * kBlocks;
  static constexpr int kBytes = kBarriers + 8 * kBarrierCount + kAlignment;
  static_assert(kBytes <= kSharedBytes);
};

template <typename T, class S>
class JointGradient {
  using L = Layout<S>;
  // Positions of the patch that are in registers together, twice: those of the next product, too.
  static constexpr int kParts = S::kSteps > 7 ? 2 : 1;

 public:
  __device__ __forceinline__ JointGradient(const CUtensorMap* g, const CUtensorMap* x, const CUtensorMap* dx,
                                           const Parameters& p)
      : g_(g), x_(x), dx_(dx), p_(p), base_(aligned_base()) {
    const int share = ceil_div(p.squares.count, p.splits);
    begin_ = static_cast<int>(blockIdx.x) * share;
    end_ = min(begin_ + share, p.squares.count);
  }

  __device__ __forceinline__ void run() {
    const int group = warpgroup([&] {
      ptx::mbarrier_init(constants(), 1);
      for (int s = 0; s < L::kStages; ++s) {
        ptx::mbarrier_init(full(s), 1);
        ptx::mbarrier_init(empty(s), 2 * 4);
      }
      for (int s = 0; s < kBlocks; ++s) {
        ptx::mbarrier_init(formed(s), 1);
        ptx::mbarrier_init(taken(s), 2 * 4);
      }
    });
    if (group < 2) {
      if (group == 0) {
        ptx::fewer_registers<kCopying>();
        if (threadIdx.x == 0) produce();
      } else {
        form_z();
      }
    } else if (group == 2) {
      ptx::more_registers<kSummingInput>();
      sum_input();
    } else {
      ptx::more_registers<kSummingCoefficients>();
      sum_coefficients();
    }
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int i) const { return base_ + L::kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t constants() const { return barrier(0); }
  __device__ __forceinline__ uint32_t full(int s) const { return barrier(1 + s); }
  __device__ __forceinline__ uint32_t empty(int s) const { return barrier(1 + L::kStages + s); }
  __device__ __forceinline__ uint32_t formed(int s) const { return barrier(1 + 2 * L::kStages + s); }
  __device__ __forceinline__ uint32_t taken(int s) const { return formed(kBlocks + s); }
  __device__ __forceinline__ uint32_t halo(int s) const { return base_ + s * L::kStageBytes; }
  __device__ __forceinline__ uint32_t target(int s) const { return halo(s) + S::kHaloBytes; }

  // Of each square the halo of g, and x unit by unit.
  __device__ __forceinline__ void produce() const {
    const int origin_h = phase_origin(p_.map.axis[1], 0), origin_w = phase_origin(p_.map.axis[2], 0);
    Ring<L::kStages> stage(1);
    ptx::mbarrier_expect(constants(), S::kBandBytes);
    ptx::bulk_load(base_ + L::kBands, p_.bands, S::kBandBytes, constants());
    for (int i = begin_; i < end_; ++i) {
      const auto at = p_.squares[i];
      ptx::mbarrier_wait(empty(stage.at), stage.parity);
      ptx::mbarrier_expect(full(stage.at), L::kStageBytes);
      ptx::tensor_load(halo(stage.at), g_, 0, at.w + origin_w, at.h + origin_h, at.n, full(stage.at));
      for (int unit = 0; unit < kSquareUnits; ++unit) {
        ptx::tensor_load(target(stage.at) + unit * kUnitBytes, x_, 0, at.w + S::unit_w(unit),
                         at.h + S::unit_h(unit), at.n, full(stage.at));
      }
      stage.advance();
    }
  }

  // z of a unit to each warp. The product of the next 16 channels is under way while these are handed on.
  __device__ __forceinline__ void form_z() const {
    constexpr int kPart = S::kSteps / kParts, kAll = kBlocks * kParts;
    const int lane = threadIdx.x % 32, unit = threadIdx.x / 32 % 4;
    const uint32_t row = transposed_row<S>(unit, lane);
    const uint64_t bands = band_descriptor(base_ + L::kBands);
    // Matrices 0 and 1 are channels 0..7 and 8..15, 2 and 3 of the next eight positions.
    const uint32_t stored = base_ + L::kSlots + (2 * unit + lane / 16) * kSlab + lane % 16 * 16;

    uint32_t patch[2][kPart][4], rounded[kRanks][4];
    float z[kColumns / 2];
    Ring<L::kStages> stage(0);
    uint32_t parity = 1;

    const auto load = [&](int n) {  // the patch of product n of a square
      const uint32_t block = (halo(stage.at) + row) ^ n / kParts << 5;
      load_patch<S>(patch[n % 2], block + n % kParts * kPart * kPatchStep<S>);
    };
    const auto hand_on = [&](int block, uint32_t parity) {
      ptx::mbarrier_wait(taken(block), parity);
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        ptx::stmatrix_x4(stored + block * kSlotBytes + r * 2 * kCore, rounded[r]);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier<128>(kForming);  // all of it is there
      if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(formed(block));
    };

    if (begin_ < end_) {
      ptx::mbarrier_wait(full(stage.at), stage.parity);
      load(0);
    }
    ptx::mbarrier_wait(constants(), 0);
    for (int i = begin_; i < end_; ++i) {
#pragma unroll
      for (int n = 0; n < kAll; ++n) {
        const int block = n / kParts, part = n % kParts, read = stage.at;
        form<T, S, kColumns>(z, patch[n % 2], bands + part * kPart * (kBandStep >> 4), part > 0);
        if (part == 0 && block > 0) hand_on(block - 1, parity);
        if (n == 0 && i > begin_) hand_on(kBlocks - 1, parity ^ 1);
        if (part > 0) ptx::wgmma_wait<1>();  // the last one has read its patch
        if (n + 1 < kAll) {
          load(n + 1);
        } else {
          stage.advance();
          if (i + 1 < end_) {
            ptx::mbarrier_wait(full(stage.at), stage.parity);
            load(0);
          }
        }
        if (part + 1 < kParts) continue;
        ptx::wgmma_wait<0>();
        ptx::keep(z);
        if (n + 1 == kAll && lane == 0) ptx::mbarrier_arrive(empty(read));
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
#pragma unroll
          for (int m = 0; m < 4; ++m) rounded[r][m] = ptx::pack<T>(z[8 * r + 2 * m], z[8 * r + 2 * m + 1]);
        }
      }
      parity ^= 1;
    }
    if (begin_ < end_) hand_on(kBlocks - 1, parity ^ 1);
  }

  // Lets z of this block of channels go: a warp's products have read it.
  __device__ __forceinline__ void take(int block, int lane) const {
    if (lane == 0) ptx::mbarrier_arrive(taken(block));
  }

  // dx, 16 of its channels to each warp.
  __device__ __forceinline__ void sum_input() const {
    const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % 4;
    const uint64_t right = ptx::core_descriptor(base_ + L::kSlots, kCore, kSlab);
    uint32_t left[kBlocks][kRanks][4];
    float dx[kBox / 2];
    uint32_t parity = 0;

    // Of [o / 16, ranks, 2, i, 8]: rows i and i + 8, then the same of the next eight o.
    const auto* packed = static_cast<const uint32_t*>(p_.packed) + (16 * quarter + lane / 4) * 4 + lane % 4;
#pragma unroll
    for (int n = 0; n < kBlocks * kRanks * 4; ++n) {
      left[n / 4 / kRanks][n / 4 % kRanks][n % 4] = packed[(n / 2 * kBox + n % 2 * 8) * 4];
    }
    for (int i = begin_; i < end_; ++i) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        ptx::mbarrier_wait(formed(block), parity);
        ptx::wgmma_fence();
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          const int64_t at = (block * kSlotBytes + r * 2 * kCore) >> 4;
          ptx::Wgmma<T, kBox, 1>::multiply(dx, left[block][r], right + at, block + r > 0);
        }
        ptx::wgmma_commit();
        if (block == 0) continue;
        ptx::wgmma_wait<1>();
        take(block - 1, lane);
      }
      ptx::wgmma_wait<0>();
      ptx::keep(dx);
      take(kBlocks - 1, lane);
      parity ^= 1;
      store(dx, quarter, lane, i);
    }
    if (lane == 0) ptx::store_wait();
  }

  // dx of a square: staged unit by unit, each then stored by a warp, clipped at the edges.
  __device__ __forceinline__ void store(const float (&dx)[kBox / 2], int quarter, int lane, int i) const {
    if (lane == 0) ptx::store_wait_read();
    ptx::named_barrier<128>(kStoring);  // the last square has left
    // Matrices 0 and 1 are channels 0..7 and 8..15 of this quarter, 2 and 3 of the next eight positions.
    const int chunk = 2 * quarter + lane / 8 % 2;
    const uint32_t staged =
        base_ + L::kOut + (lane / 16 * 8 + lane % 8) * 2 * kBox + ((chunk ^ lane % 8) << 4);
#pragma unroll
    for (int unit = 0; unit < kSquareUnits; ++unit) {
      uint32_t pairs[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        pairs[m] = ptx::pack<T>(dx[8 * unit + 2 * m], dx[8 * unit + 2 * m + 1]);
      }
      ptx::stmatrix_x4_trans(staged + unit * kUnitBytes, pairs);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier<128>(kStoring);  // all of it is there, and fenced
    if (lane != 0) return;
    const auto at = p_.squares[i];
    const int unit = quarter;
    ptx::tensor_store(base_ + L::kOut + unit * kUnitBytes, dx_, 0, at.w + S::unit_w(unit), at.h + S::unit_h(unit),
                      at.n);
    ptx::store_commit();
  }

  // dA, 16 channels of x to each warp.
  __device__ __forceinline__ void sum_coefficients() const {
    const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % 4;
    const uint64_t right = ptx::core_descriptor(base_ + L::kSlots, kSlab);
    // Matrices 0 and 1 are channels 0..7 and 8..15 of this quarter, 2 and 3 of the next eight positions.
    const int chunk = 2 * quarter + lane / 8 % 2;
    const uint32_t row = (lane / 16 * 8 + lane % 8) * 2 * kBox + ((chunk ^ lane % 8) << 4);
    uint32_t left[kSquareUnits][4];
    float sum[kBlocks][kColumns / 2] = {};
    Ring<L::kStages> stage(0);
    uint32_t parity = 0;

    for (int i = begin_; i < end_; ++i) {
      ptx::mbarrier_wait(full(stage.at), stage.parity);
#pragma unroll
      for (int unit = 0; unit < kSquareUnits; ++unit) {
        ptx::ldmatrix_x4_trans(left[unit], target(stage.at) + unit * kUnitBytes + row);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        ptx::mbarrier_wait(formed(block), parity);
        ptx::wgmma_fence();
#pragma unroll
        for (int unit = 0; unit < kSquareUnits; ++unit) {
          const int64_t at = (block * kSlotBytes + unit * 2 * kSlab) >> 4;
          ptx::Wgmma<T, kColumns>::multiply(sum[block], left[unit], right + at, true);
        }
        ptx::wgmma_commit();
        if (block == 0) continue;
        ptx::wgmma_wait<1>();
        take(block - 1, lane);
        if (block == 1 && lane == 0) ptx::mbarrier_arrive(empty(stage.at));
      }
      ptx::wgmma_wait<0>();
      take(kBlocks - 1, lane);
      parity ^= 1;
      stage.advance();
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      ptx::keep(sum[block]);
      add(sum[block], 16 * block, 16 * quarter, lane);
    }
  }

  // A warp's 16 channels i by 16 channels o of all functions: eight channels i are 32 bytes.
  __device__ __forceinline__ void add(const float (&sum)[kColumns / 2], int o, int i, int lane) const {
    const int64_t row = static_cast<int64_t>(p_.atomic ? 0 : blockIdx.x) * p_.rank * kBox + o + 2 * (lane % 4);
    float* first = p_.partial + row * kBox + i + lane / 4;
    const auto each = [&](const auto& put) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        if (r >= p_.rank) return;
        float scale = 1.0f;
        if constexpr (std::is_same_v<T, __half>) scale = p_.scales[r];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          put(first + (r * kBox + n / 4 * 8 + n % 2) * kBox + n / 2 % 2 * 8, sum[8 * r + n] * scale);
        }
      }
    };
    if (p_.atomic) {
      each([](float* address, float value) { atomicAdd(address, value); });
    } else {
      each([](float* address, float value) { *address = value; });
    }
  }

  const CUtensorMap *g_, *x_, *dx_;
  const Parameters& p_;
  const uint32_t base_;
  int begin_, end_;
};

template <typename T, class S>
__global__ __launch_bounds__(kJointThreads, 1) void joint_gradient_sm90_kernel(
    const __grid_constant__ CUtensorMap g, const __grid_constant__ CUtensorMap x,
    const __grid_constant__ CUtensorMap dx, const __grid_constant__ Parameters p) {
#if defined(HYPERCONV_HOST_RUNTIME) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JointGradient<T, S>(&g, &x, &dx, p).run();
#endif
}

template <typename T, class S>
Status run(const Lattice& map, const Choice& choice, const JointArguments& a, cudaStream_t stream) {
  using L = Layout<S>;
  if (!fits<S>(map, choice, L::kBytes) || a.rank > kRanks || a.groups != 1 || a.g.channels != kBox ||
      a.x.channels != kBox || a.dx_channels != kBox || !a.aligned) {
    return kUnknownPlan;
  }
  const Parameters p = {map, a.bands, a.packed, a.partial, a.scales, squares_of(map), a.rank, a.splits,
                        a.atomic};
  CUtensorMap g, x, dx;
  Status status = encode_halos<T, S>(&g, map, a.g.data, a.g.strides, kBox);
  if (status.good()) {
    status = encode_units<T, S>(&x, map, a.x.data, a.x.strides, kBox);
  }
  if (status.good()) {
    status = encode_units<T, S>(&dx, map, a.dx, a.dx_strides, kBox);
  }
  if (!status.good()) return status;
  return launch<joint_gradient_sm90_kernel<T, S>>(p.splits, kJointThreads, L::kBytes, stream, g, x, dx, p);
}

}  // namespace

Status joint_gradient_sm90(Number number, const Lattice& map, const Choice& choice,
                           const JointArguments& a, cudaStream_t stream) {
  return with_shape(number, choice, [&](auto element, auto shape) {
    return run<decltype(element), decltype(shape)>(map, choice, a, stream);
  });
}

}  // namespace hyperconv
