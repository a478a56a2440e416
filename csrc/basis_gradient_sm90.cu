// basis_conv_bwd_basis by wgmma and TMA, of the geometries of basis_conv_sm90.cu: the gradient of the bands, summed
// along their diagonals at the end. A block sums its share of the squares for 64 input channels, kC output channels
// and a pack of functions. A consumer warpgroup works on a square of its own, 32 of the input channels at a time:
//
//   u_r [4 units x 16 outputs, 32 channels]  = g [64, kC] A_r' [kC, 32]
//   d bands [patch, R x 16 outputs]         += x [patch, 32 channels] u' [32, R x 16]      (unit by unit)
//
// The rows of the second product are the patch, 64 positions at a time, so that a thread holds the gradients of
// all its functions; u goes through shared memory, since all four warps need that of every unit.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "squares.cuh"

namespace hyperconv {
namespace {

constexpr int kPart = 32;                     // channels of u together
constexpr int kSlab = kColumns * 16;          // bytes of u for eight channels of a unit
constexpr int kUnitBytes = kPart / 8 * kSlab;
constexpr int kGradBytes = kUnit * 2 * kBox;  // of a unit and 64 output channels

struct Parameters {
  Lattice map;
  const void* packed;   // `prepare_cores`: [in / 64, out / 16, packs * kRanks, 2, 64, 8]
  float* partial;       // [splits, out / kC, in / 64, R, K]; [R, K] if atomic
  const float* scales;  // [R], or null
  Squares squares;
  int in, out, rank, splits;
  bool atomic;
};

// Bytes of shared memory: halos and gradients first, whose swizzle wants multiples of 1024.
template <class S, int kC>
struct Layout {
  static constexpr int kTiles = ceil_div(S::kSteps, 4);  // of 64 positions of the patch
  static constexpr int kBoxBytes = kSquareUnits * kGradBytes;
  static constexpr int kStageBytes = S::kHaloBytes + kC / kBox * kBoxBytes;
  static constexpr int kPartBytes = kSquareUnits * kUnitBytes;
  static constexpr int kWeightBytes = kRanks * kC * kBox * 2;
  static constexpr int kFree = kSharedBytes - kAlignment - 64 - kWeightBytes - kGroups * kPartBytes;
  static constexpr int kStages = kFree / (kGroups * kStageBytes) >= 2 ? 2 : 1;  // of a consumer
  static constexpr int kParts = kGroups * kStages * kStageBytes;
  static constexpr int kWeights = kParts + kGroups * kPartBytes;
  static constexpr int kBarriers = kWeights + kWeightBytes;
  static constexpr int kBarrierCount = 1 + 2 * kGroups * kStages;
  static constexpr int kBytes = kBarriers + 8 * kBarrierCount + kAlignment;
  static constexpr int kTotal = S::kSteps * 16 * kColumns;  // sums of a consumer, at the end
  static_assert(kBytes <= kSharedBytes && kGroups * kTotal * 4 <= kBarriers);
  static_assert(64 * kTiles >= 16 * S::kSteps);
};

template <typename T, class S, int kC>
class BasisGradient {
  using L = Layout<S, kC>;

 public:
  __device__ __forceinline__ BasisGradient(const CUtensorMap* x, const CUtensorMap* g, const Parameters& p)
      : x_(x), g_(g), p_(p), base_(aligned_base()) {
    piece_ = blockIdx.x % pieces();
    in_ = piece_ % in_blocks() * kBox;
    const int share = ceil_div(ceil_div(p.squares.count, kGroups), p.splits) * kGroups;
    begin_ = split() * share;
    end_ = min(begin_ + share, p.squares.count);
  }

  __device__ __forceinline__ void run() {
    run_roles(
        [&] {
          ptx::mbarrier_init(constants(), 1);
          for (int g = 0; g < kGroups; ++g) {
            for (int s = 0; s < L::kStages; ++s) {
              ptx::mbarrier_init(full(g, s), 1);
              ptx::mbarrier_init(empty(g, s), 4);
            }
          }
        },
        [&] { produce(); }, [&](int group) { consume(group); });
  }

 private:
  // A block of [splits, packs, out / kC, in / 64].
  __device__ __forceinline__ int in_blocks() const { return p_.in / kBox; }
  __device__ __forceinline__ int pieces() const { return p_.out / kC * in_blocks(); }
  __device__ __forceinline__ int split() const { return blockIdx.x / (pieces() * packs_of(p_.rank)); }
  // The first function of its pack, and the first output channel.
  __device__ __forceinline__ int first() const {
    return static_cast<int>(blockIdx.x) / pieces() % packs_of(p_.rank) * kRanks;
  }
  __device__ __forceinline__ int out() const { return piece_ / in_blocks() * kC; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base_ + L::kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t constants() const { return barrier(0); }
  __device__ __forceinline__ uint32_t full(int g, int s) const { return barrier(1 + g * L::kStages + s); }
  __device__ __forceinline__ uint32_t empty(int g, int s) const {
    return barrier(1 + (kGroups + g) * L::kStages + s);
  }
  __device__ __forceinline__ uint32_t halo(int g, int s) const {
    return base_ + (g * L::kStages + s) * L::kStageBytes;
  }
  __device__ __forceinline__ uint32_t grad(int g, int s) const { return halo(g, s) + S::kHaloBytes; }

  // A once; of each square the halo, and g unit by unit. A square beyond the last one is all zeros.
  __device__ __forceinline__ void produce() const {
    const int origin_h = phase_origin(p_.map.axis[1], 0), origin_w = phase_origin(p_.map.axis[2], 0);
    constexpr int kPackBytes = kRanks * 16 * 2 * kBox;  // of 16 output channels
    const int64_t packs = packs_of(p_.rank), block = in_ / kBox * (p_.out / 16) + out() / 16;
    ptx::mbarrier_expect(constants(), L::kWeightBytes);
    for (int i = 0; i < kC / 16; ++i) {
      const int64_t pack = (block + i) * packs + first() / kRanks;
      ptx::bulk_load(base_ + L::kWeights + i * kPackBytes,
                     static_cast<const char*>(p_.packed) + pack * kPackBytes, kPackBytes, constants());
    }
    Ring<L::kStages> stage(1);
    for (int i = begin_; i < end_; i += kGroups) {
      for (int g = 0; g < kGroups; ++g) {
        const auto at = p_.squares[i + g];
        const uint32_t barrier = full(g, stage.at);
        ptx::mbarrier_wait(empty(g, stage.at), stage.parity);
        ptx::mbarrier_expect(barrier, L::kStageBytes);
        ptx::tensor_load(halo(g, stage.at), x_, in_, at.w + origin_w, at.h + origin_h, at.n, barrier);
        for (int c = 0; c < kC; c += kBox) {
          for (int unit = 0; unit < kSquareUnits; ++unit) {
            ptx::tensor_load(grad(g, stage.at) + c / kBox * L::kBoxBytes + unit * kGradBytes, g_, out() + c,
                             at.w + S::unit_w(unit), at.h + S::unit_h(unit), at.n, barrier);
          }
        }
      }
      stage.advance();
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t part = base_ + L::kParts + group * L::kPartBytes;
    const uint64_t weights = ptx::core_descriptor(base_ + L::kWeights, kBox / 8 * 128);
    const uint64_t right = ptx::core_descriptor(part, kSlab);
    // g of this warp's unit: matrices 0 and 1 are eight outputs and the next eight, 2 and 3 the next channels.
    const uint32_t grad_row =
        warp * kGradBytes + lane % 16 * 2 * kBox + ((lane / 16 ^ lane % 8) << 4);
    // The rows of matrices 0 and 1 of ldmatrix are eight positions and the next eight; tile 4 i + warp of the
    // patch is a constant further.
    uint32_t row[kSquareUnits];
#pragma unroll
    for (int unit = 0; unit < kSquareUnits; ++unit) {
      row[unit] = patch_row<S>(unit, lane, lane / 8 % 2, lane / 16);
    }
    // Where u of a lane's row goes: matrices 0 and 1 are outputs 0..7 and 8..15, 2 and 3 of the next channels.
    const uint32_t stored = part + warp * kUnitBytes + lane / 16 * kSlab + lane % 16 * 16;

    float sum[L::kTiles][kColumns / 2] = {}, u[2][kPart / 2];
    uint32_t left[kC / 16][4], patch[2][L::kTiles][4];
    Ring<L::kStages> stage(0);

    const auto gather = [&](float (&u)[kPart / 2], int r, int channel) {
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < kC / 16; ++j) {
        const int64_t at = ((j * kRanks + r) * 2 * kBox + channel) * 16 >> 4;
        ptx::Wgmma<T, kPart>::multiply(u, left[j], weights + at, j > 0);
      }
      ptx::wgmma_commit();
    };

    ptx::mbarrier_wait(constants(), 0);
    for (int i = begin_; i < end_; i += kGroups) {
      ptx::mbarrier_wait(full(group, stage.at), stage.parity);
#pragma unroll
      for (int channel = 0; channel < kBox; channel += kPart) {
#pragma unroll
        for (int j = 0; j < kC / 16; ++j) {
          const uint32_t box = grad(group, stage.at) + 16 * j / kBox * L::kBoxBytes;
          ptx::ldmatrix_x4(left[j], (box + grad_row) ^ j % 4 << 5);
        }
        gather(u[0], 0, channel);
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          if (r + 1 < kRanks) {
            gather(u[(r + 1) % 2], r + 1, channel);
            ptx::wgmma_wait<1>();
          } else {
            ptx::wgmma_wait<0>();
          }
          ptx::keep(u[r % 2]);
          if (r == 0) ptx::named_barrier<128>(1 + group);  // all have read the last part
#pragma unroll
          for (int n = 0; n < kPart / 16; ++n) {
            const float* d = u[r % 2] + 8 * n;
            const uint32_t pairs[4] = {ptx::pack<T>(d[0], d[1]), ptx::pack<T>(d[2], d[3]),
                                       ptx::pack<T>(d[4], d[5]), ptx::pack<T>(d[6], d[7])};
            ptx::stmatrix_x4(stored + 2 * n * kSlab + r * kUnit * 16, pairs);
          }
        }
        ptx::fence_proxy_async();
        ptx::named_barrier<128>(1 + group);  // this part is there
#pragma unroll
        for (int s = 0; s < kSquareUnits * kPart / 16; ++s) {
          const int unit = s / (kPart / 16), j = s % (kPart / 16);
          const uint32_t at = (halo(group, stage.at) + row[unit]) ^ (channel / 16 + j) << 5;
          if (s >= 2) ptx::wgmma_wait<1>();
#pragma unroll
          for (int n = 0; n < L::kTiles; ++n) {
            ptx::ldmatrix_x4(patch[s % 2][n], at + min(4 * n + warp, S::kSteps - 1) * kPatchStep<S>);
          }
          ptx::wgmma_fence();
#pragma unroll
          for (int n = 0; n < L::kTiles; ++n) {
            const int64_t from = (unit * kUnitBytes + 2 * j * kSlab) >> 4;
            ptx::Wgmma<T, kColumns>::multiply(sum[n], patch[s % 2][n], right + from, true);
          }
          ptx::wgmma_commit();
        }
        ptx::wgmma_wait<0>();
      }
      if (lane == 0) ptx::mbarrier_arrive(empty(group, stage.at));
      stage.advance();
    }
#pragma unroll
    for (int n = 0; n < L::kTiles; ++n) ptx::keep(sum[n]);
    store(sum, group, warp, lane);
  }

  // The consumers' sums together, folded along the diagonals.
  __device__ __forceinline__ void store(const float (&sum)[L::kTiles][kColumns / 2], int group, int warp,
                                        int lane) const {
    constexpr int kCount = 128 * kGroups;
    unsigned char* shared = ptx::dynamic_shared();
    float* total = reinterpret_cast<float*>(shared + (base_ - ptx::shared_address(shared)));
    ptx::named_barrier<kCount>(1 + kGroups);  // nobody needs what is there any more
#pragma unroll
    for (int n = 0; n < L::kTiles; ++n) {
      if (4 * n + warp >= S::kSteps) continue;
      float* tile = total + group * L::kTotal + (4 * n + warp) * 16 * kColumns;
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        tile[(lane / 4 + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + 2 * (lane % 4) + i % 2] = sum[n][i];
      }
    }
    ptx::named_barrier<kCount>(1 + kGroups);  // all sums are there
    const int height = p_.map.axis[1].kernel, width = p_.map.axis[2].kernel, taps = height * width;
    const int first = this->first();
    const int64_t slice = p_.atomic ? 0 : split() * pieces() + piece_;
    float* partial = p_.partial + (slice * p_.rank + first) * taps;
    for (int i = threadIdx.x - 128; i < min(kRanks, p_.rank - first) * taps; i += kCount) {
      const int r = i / taps, k = i % taps;
      float value = 0.0f;
      for (int t = 0; t < kUnit; ++t) {
        const int l = (t / S::kWidth + k / width) * S::kPatch + t % S::kWidth + k % width;
        for (int g = 0; g < kGroups; ++g) {
          value += total[g * L::kTotal + l * kColumns + r * kUnit + t];
        }
      }
      if constexpr (std::is_same_v<T, __half>) value *= p_.scales[first + r];
      if (p_.atomic) {
        atomicAdd(partial + i, value);
      } else {
        partial[i] = value;
      }
    }
  }

  const CUtensorMap *x_, *g_;
  const Parameters& p_;
  const uint32_t base_;
  int piece_, in_, begin_, end_;
};

template <typename T, class S, int kC>
__global__ __launch_bounds__(kThreads, 1) void basis_gradient_sm90_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap g,
    const __grid_constant__ Parameters p) {
#if defined(HYPERCONV_HOST_RUNTIME) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BasisGradient<T, S, kC>(&x, &g, p).run();
#endif
}

template <typename T, class S, int kC>
Status run(const Lattice& map, const Choice& choice, const BasisArguments& a, cudaStream_t stream) {
  using L = Layout<S, kC>;
  if (!fits<S>(map, choice, L::kBytes) || a.groups != 1 || a.x.channels % kBox != 0 ||
      a.g.channels % kC != 0 || !a.aligned) {
    return kUnknownPlan;
  }
  const Parameters p = {map,          a.packed,     a.partial, a.scales, squares_of(map),
                        a.x.channels, a.g.channels, a.rank,    a.splits, a.atomic};
  CUtensorMap x, g;
  Status status = encode_halos<T, S>(&x, map, a.x.data, a.x.strides, p.in);
  if (status.good()) {
    status = encode_units<T, S>(&g, map, a.g.data, a.g.strides, p.out);
  }
  if (!status.good()) return status;
  const int64_t blocks = int64_t{p.out / kC} * (p.in / kBox) * packs_of(p.rank) * p.splits;
  return launch<basis_gradient_sm90_kernel<T, S, kC>>(blocks, kThreads, L::kBytes, stream, x,
                                                      g, p);
}

}  // namespace

int basis_gradient_sm90_pieces(const Choice& choice, int in_channels, int out_channels) {
  return in_channels / kBox * (out_channels / (16 * choice.out_tiles));
}

Status basis_gradient_sm90(Number number, const Lattice& map, const Choice& choice, const BasisArguments& a,
                           cudaStream_t stream) {
  return with_shape(number, choice, [&](auto element, auto shape) -> Status {
    using T = decltype(element);
    using S = decltype(shape);
    if (choice.out_tiles == 4) return run<T, S, 64>(map, choice, a, stream);
    // Larger kernels: neither shared memory nor registers suffice.
    if constexpr (!std::is_same_v<S, Eleven>) {
      if (choice.out_tiles == 8) return run<T, S, 128>(map, choice, a, stream);
    }
    return kUnknownPlan;
  });
}

}  // namespace hyperconv
