// basis_conv_bwd_coeff by wgmma and TMA, of the geometries of basis_conv_sm90.cu. A block sums its share of the
// squares for 64 input and 64 output channels and a pack of functions. The unit of both consumer warpgroups is the
// same, but their functions are not:
//
//   z' [64 channels, functions x 16 outputs] = x' [64, patch] bands' [patch, functions x 16]
//   dA_r' [64 channels, 64 out]             += z_r' [64, 16 outputs] g [16, 64 out]
//
// The sums of z' are the left operand of the second product as they are. z of the next unit is on its way before
// the sums of this one begin, and runs beside them.
#include <type_traits>

#include "launch.cuh"
#include "squares.cuh"

namespace hyperconv {
namespace {

constexpr int kFirstGroup = 3;  // functions of a pack that the first warpgroup has
static_assert(0 < kFirstGroup && kFirstGroup < kRanks);
constexpr int kGradBytes = kUnit * 2 * kBox;  // of a unit

struct Parameters {
  Lattice map;
  const void* bands;  // `prepare_cores`
  float* partial;     // [splits, R, out, in]
  const float* scales;  // [R], or null
  Squares squares;
  int in, out, rank, splits;
  bool atomic;
};

// Bytes of shared memory: halos and gradients first, whose swizzle wants multiples of 1024.
template <class S>
struct Layout {
  static constexpr int kStageBytes = S::kHaloBytes + kSquareUnits * kGradBytes;
  static constexpr int kStages = S::kHaloBytes > 32 * 1024 ? 3 : 4;
  static constexpr int kBands = kStages * kStageBytes;
  static constexpr int kBarriers = kBands + S::kBandBytes;
  static constexpr int kBarrierCount = 1 + 2 * kStages;
  static constexpr int kBytes = kBarriers + 8 * kBarrierCount + kAlignment;
  static_assert(kBytes <= kSharedBytes);
};

template <typename T, class S>
class CoefficientGradient {
  using L = Layout<S>;

 public:
  __device__ __forceinline__ CoefficientGradient(const CUtensorMap* x, const CUtensorMap* g,
                                                 const Parameters& p)
      : x_(x), g_(g), p_(p), base_(aligned_base()) {
    int index = blockIdx.x;
    in_ = index % (p.in / kBox) * kBox;
    index /= p.in / kBox;
    out_ = index % (p.out / kBox) * kBox;
    index /= p.out / kBox;
    pack_ = index % packs_of(p.rank);
    split_ = index / packs_of(p.rank);
    const int share = ceil_div(p.squares.count, p.splits);
    begin_ = split_ * share;
    end_ = min(begin_ + share, p.squares.count);
  }

  __device__ __forceinline__ void run() {
    run_roles(
        [&] {
          ptx::mbarrier_init(constants(), 1);
          for (int s = 0; s < L::kStages; ++s) {
            ptx::mbarrier_init(full(s), 1);
            ptx::mbarrier_init(empty(s), 4 * kGroups);
          }
        },
        [&] { produce(); }, [&](int group) {
          if (group == 0) {
            consume<0, kFirstGroup>();
          } else {
            consume<kFirstGroup, kRanks - kFirstGroup>();
          }
        });
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int i) const { return base_ + L::kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t constants() const { return barrier(0); }
  __device__ __forceinline__ uint32_t full(int s) const { return barrier(1 + s); }
  __device__ __forceinline__ uint32_t empty(int s) const { return barrier(1 + L::kStages + s); }
  __device__ __forceinline__ uint32_t halo(int s) const { return base_ + s * L::kStageBytes; }
  __device__ __forceinline__ uint32_t grad(int s) const { return halo(s) + S::kHaloBytes; }

  // Of each square the halo, and g unit by unit.
  __device__ __forceinline__ void produce() const {
    const int origin_h = phase_origin(p_.map.axis[1], 0), origin_w = phase_origin(p_.map.axis[2], 0);
    Ring<L::kStages> stage(1);
    ptx::mbarrier_expect(constants(), S::kBandBytes);
    const char* bands = static_cast<const char*>(p_.bands) + static_cast<int64_t>(pack_) * S::kBandBytes;
    ptx::bulk_load(base_ + L::kBands, bands, S::kBandBytes, constants());
    for (int i = begin_; i < end_; ++i) {
      const auto at = p_.squares[i];
      ptx::mbarrier_wait(empty(stage.at), stage.parity);
      ptx::mbarrier_expect(full(stage.at), L::kStageBytes);
      ptx::tensor_load(halo(stage.at), x_, in_, at.w + origin_w, at.h + origin_h, at.n, full(stage.at));
      for (int unit = 0; unit < kSquareUnits; ++unit) {
        ptx::tensor_load(grad(stage.at) + unit * kGradBytes, g_, out_, at.w + S::unit_w(unit),
                         at.h + S::unit_h(unit), at.n, full(stage.at));
      }
      stage.advance();
    }
  }

  // Functions kFirst to kFirst + kCount - 1 of the pack.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void consume() const {
    constexpr int kWidth = kCount * kUnit;
    const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % 4;  // 16 of the input channels
    const uint64_t bands = band_descriptor(base_ + L::kBands, kFirst);
    uint32_t row[kSquareUnits], patch[S::kSteps][4], left[2][kCount][4];
#pragma unroll
    for (int unit = 0; unit < kSquareUnits; ++unit) row[unit] = transposed_row<S>(unit, lane) ^ quarter << 5;
    float z[kWidth / 2], sum[kCount][kBox / 2] = {};
    Ring<L::kStages> stage(0);

    ptx::mbarrier_wait(constants(), 0);
    for (int i = begin_; i < end_; ++i) {
      ptx::mbarrier_wait(full(stage.at), stage.parity);
      load_patch<S>(patch, halo(stage.at) + row[0]);
      form<T, S, kWidth>(z, patch, bands);
#pragma unroll
      for (int unit = 0; unit < kSquareUnits; ++unit) {
        // Under way: z of this unit and, behind it, the sums of the last one.
        if (unit == 0) {
          ptx::wgmma_wait<0>();
        } else {
          ptx::wgmma_wait<1>();
        }
        ptx::keep(z);
#pragma unroll
        for (int r = 0; r < kCount; ++r) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float* pair = z + 4 * (2 * r + n / 2) + 2 * (n % 2);
            left[unit % 2][r][n] = ptx::pack<T>(pair[0], pair[1]);
          }
        }
        if (unit + 1 < kSquareUnits) {
          load_patch<S>(patch, halo(stage.at) + row[unit + 1]);
          form<T, S, kWidth>(z, patch, bands);
        }
        const uint64_t g = ptx::swizzled_descriptor(grad(stage.at) + unit * kGradBytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int r = 0; r < kCount; ++r) {
          ptx::Wgmma<T, kBox, 1>::multiply(sum[r], left[unit % 2][r], g, true);
        }
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();
      if (lane == 0) ptx::mbarrier_arrive(empty(stage.at));
      stage.advance();
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      ptx::keep(sum[r]);
      const int rank = pack_ * kRanks + kFirst + r;
      if (rank < p_.rank) store(sum[r], rank, 16 * quarter, lane);
    }
  }

  // A warp's 16 channels by 64 of function `rank`: eight channels after another are 32 bytes.
  __device__ __forceinline__ void store(const float (&sum)[kBox / 2], int rank, int channel, int lane) const {
    float scale = 1.0f;
    if constexpr (std::is_same_v<T, __half>) scale = p_.scales[rank];
    const int64_t slice = static_cast<int64_t>(p_.atomic ? 0 : split_) * p_.rank + rank;
    float* partial = p_.partial + (slice * p_.out + out_) * p_.in + in_ + channel + lane / 4;
#pragma unroll
    for (int i = 0; i < kBox / 2; ++i) {
      const int64_t out = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float* address = partial + out * p_.in + i / 2 % 2 * 8;
      if (p_.atomic) {
        atomicAdd(address, sum[i] * scale);
      } else {
        *address = sum[i] * scale;
      }
    }
  }

  const CUtensorMap *x_, *g_;
  const Parameters& p_;
  const uint32_t base_;
  int in_, out_, pack_, split_, begin_, end_;
};

template <typename T, class S>
__global__ __launch_bounds__(kThreads, 1) void coefficient_gradient_sm90_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap g,
    const __grid_constant__ Parameters p) {
#if defined(HYPERCONV_HOST_RUNTIME) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CoefficientGradient<T, S>(&x, &g, p).run();
#endif
}

template <typename T, class S>
Status run(const Lattice& map, const Choice& choice, const CoefficientArguments& a, cudaStream_t stream) {
  using L = Layout<S>;
  if (!fits<S>(map, choice, L::kBytes) || a.groups != 1 || a.x.channels % kBox != 0 ||
      a.g.channels % kBox != 0 || !a.aligned) {
    return kUnknownPlan;
  }
  const Parameters p = {map, a.bands, a.partial, a.scales, squares_of(map), a.x.channels, a.g.channels,
                        a.rank, a.splits, a.atomic};
  CUtensorMap x, g;
  Status status = encode_halos<T, S>(&x, map, a.x.data, a.x.strides, p.in);
  if (status.good()) {
    status = encode_units<T, S>(&g, map, a.g.data, a.g.strides, p.out);
  }
  if (!status.good()) return status;
  const int64_t blocks = static_cast<int64_t>(p.in / kBox) * (p.out / kBox) * packs_of(p.rank) * p.splits;
  return launch<coefficient_gradient_sm90_kernel<T, S>>(blocks, kThreads, L::kBytes, stream, x, g, p);
}

}  // namespace

Status coefficient_gradient_sm90(Number number, const Lattice& map, const Choice& choice,
                                 const CoefficientArguments& a, cudaStream_t stream) {
  return with_shape(number, choice, [&](auto element, auto shape) {
    return run<decltype(element), decltype(shape)>(map, choice, a, stream);
  });
}

}  // namespace hyperconv
