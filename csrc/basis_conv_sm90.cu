// basis_conv_fwd and basis_conv_bwd_input by wgmma and TMA: two axes, stride and dilation 1. A persistent block
// has kOut of the output channels, one producer, which keeps the copy engine busy, and two consumer
// warpgroups. A consumer works on 8 x 8 outputs at a time; each of its four warps on a unit of 16 of them:
//
//   z' [16 channels, 5 x 16 outputs] = x' [16 channels, patch] bands' [patch, 80]    (16 positions at a time)
//   y [16 outputs, out]             += z_r [16 outputs, 16 channels] A_r [16, out]
//
// for one pack of functions after another, five and, of the second one, four or five: these and 16 channels are an
// item.
//
// The channels are the rows of the first product, so that its left operand is the patch: of another unit in
// every warp, while all of them share the bands. movmatrix turns z' into the left operand of the second product
// in registers. z of the next item is on its way before y of this one begins, and runs beside it: within a piece of
// kIn input channels, after which the tensor cores run dry, as ptxas wants it of a loop.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "squares.cuh"

namespace hyperconv {
namespace {

struct Parameters {
  Lattice map;
  const void *bands, *packed, *bias;  // `prepare_cores`, kOut outputs together; bias: [out], or null
  Squares squares;
  int pieces, slices;  // of kIn input channels, of kOut output channels
};

constexpr int kBarrierBytes = 128;  // no more

// Pieces of shared memory that are left beside so many bytes.
constexpr int room(int bytes, int piece) {
  return (kSharedBytes - kAlignment - kBarrierBytes - bytes) / piece;
}

// Bytes of shared memory: halos and staged outputs first, whose swizzle wants multiples of 1024. `kWhole`: one
// piece has all input channels.
template <class S, int kIn, int kOut, int kFunctions, bool kWhole>
struct Layout {
  static constexpr int kPacks = packs_of(kFunctions), kLast = kFunctions - (kPacks - 1) * kRanks;
  static_assert(0 < kLast && kLast <= kRanks);  // functions of the last pack
  static constexpr int kItems = kIn / 16 * kPacks, kItemBytes = kRanks * 16 * kOut * 2;  // of a piece
  static constexpr int kStages = S::kHaloBytes > 32 * 1024 ? 1 : 2;  // halos of a consumer
  static constexpr int kHalos = kGroups * kStages * S::kHaloBytes;
  static constexpr int kOutBytes = kUnit * kOut * 2;  // of a warp
  static constexpr int kBandBytes = kPacks * S::kBandBytes;
  // y is staged beside the halos; where this leaves too little for A, in the consumer's halo.
  static constexpr bool kInHalo = room(kHalos + kGroups * 4 * kOutBytes + kBandBytes, kItemBytes) < 2;
  static constexpr int kStaged = kInHalo ? 0 : kHalos, kStagedStep = kInHalo ? S::kHaloBytes : 4 * kOutBytes;
  static constexpr int kBands = kInHalo ? kHalos : kStaged + kGroups * kStagedStep;
  static constexpr int kWeights = kBands + kBandBytes;
  // A is resident, or streams item by item through a ring.
  static constexpr int kRoom = room(kWeights, kItemBytes);
  static constexpr bool kResident = kWhole && kRoom >= kItems;
  static constexpr int kRing = kResident ? 1 : std::min(kRoom, 3);
  static constexpr int kWeightBytes = (kResident ? kItems : kRing) * kItemBytes;
  static constexpr int kBarriers = kWeights + kWeightBytes;
  static constexpr int kBarrierCount = 1 + 2 * kGroups * kStages + 2 * kRing;
  static constexpr int kBytes = kBarriers + 8 * kBarrierCount + kAlignment;
  static_assert(kBytes <= kSharedBytes && 8 * kBarrierCount <= kBarrierBytes);
  static_assert(kRing >= 2 || kResident);  // an item's A is not free before y of the next has begun
  // Whoever has A of the last item knows by the ring that all warps have their last patch in registers.
  static_assert(!kInHalo || (kStages == 1 && 4 * kOutBytes <= S::kHaloBytes && kRing <= kPacks + 1));
};

template <typename T, class S, int kIn, int kOut, int kFunctions, bool kWhole>
class BasisConv {
  using L = Layout<S, kIn, kOut, kFunctions, kWhole>;
  static constexpr int kPacks = L::kPacks, kBoxBlocks = kBox / 16;

 public:
  __device__ __forceinline__ BasisConv(const CUtensorMap* x, const CUtensorMap* y, const Parameters& p)
      : x_(x), y_(y), p_(p), base_(aligned_base()), slice_(blockIdx.x % p.slices) {}

  __device__ __forceinline__ void run() {
    run_roles(
        [&] {
          ptx::mbarrier_init(constants(), 1);
          for (int g = 0; g < kGroups; ++g) {
            for (int s = 0; s < L::kStages; ++s) {
              ptx::mbarrier_init(halo_full(g, s), 1);
              ptx::mbarrier_init(halo_empty(g, s), 4);
            }
          }
          for (int s = 0; s < L::kRing; ++s) {
            ptx::mbarrier_init(weights_full(s), 1);
            ptx::mbarrier_init(weights_empty(s), 4 * kGroups);
          }
        },
        [&] { produce(); }, [&](int group) { consume(group); });
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int i) const { return base_ + L::kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t constants() const { return barrier(0); }
  __device__ __forceinline__ uint32_t halo_full(int g, int s) const {
    return barrier(1 + g * L::kStages + s);
  }
  __device__ __forceinline__ uint32_t halo_empty(int g, int s) const {
    return barrier(1 + (kGroups + g) * L::kStages + s);
  }
  __device__ __forceinline__ uint32_t weights_full(int s) const {
    return barrier(1 + 2 * kGroups * L::kStages + s);
  }
  __device__ __forceinline__ uint32_t weights_empty(int s) const { return weights_full(L::kRing + s); }
  __device__ __forceinline__ uint32_t halo(int g, int s) const {
    return base_ + (g * L::kStages + s) * S::kHaloBytes;
  }

  __device__ __forceinline__ int pieces() const { return kWhole ? 1 : p_.pieces; }
  // The block's squares, from the first on; its neighbours have other outputs of the same.
  __device__ __forceinline__ int first_square() const { return blockIdx.x / p_.slices * kGroups; }
  __device__ __forceinline__ int squares_apart() const { return gridDim.x / p_.slices * kGroups; }

  // The copies in the order in which the consumers use them. A square beyond the last one is all zeros.
  __device__ __forceinline__ void produce() const {
    const int origin_h = phase_origin(p_.map.axis[1], 0), origin_w = phase_origin(p_.map.axis[2], 0);
    const char* packed =
        static_cast<const char*>(p_.packed) + int64_t{slice_} * pieces() * L::kItems * L::kItemBytes;
    Ring<L::kStages> stage(1);
    Ring<L::kRing> ring(1);
    bool first = true;
    for (int i = first_square(); i < p_.squares.count; i += squares_apart()) {
      for (int c = 0; c < pieces() * kIn; c += kBox) {
        for (int g = 0; g < kGroups; ++g) {
          const auto at = p_.squares[i + g];
          ptx::mbarrier_wait(halo_empty(g, stage.at), stage.parity);
          ptx::mbarrier_expect(halo_full(g, stage.at), S::kHaloBytes);
          ptx::tensor_load(halo(g, stage.at), x_, c, at.w + origin_w, at.h + origin_h, at.n,
                           halo_full(g, stage.at));
        }
        stage.advance();
        if (first) {
          ptx::mbarrier_expect(constants(), L::kBandBytes + (L::kResident ? L::kWeightBytes : 0));
          ptx::bulk_load(base_ + L::kBands, p_.bands, L::kBandBytes, constants());
          if (L::kResident) ptx::bulk_load(base_ + L::kWeights, packed, L::kWeightBytes, constants());
          first = false;
        }
        if constexpr (!L::kResident) {
          for (int item = c / 16 * kPacks, n = 0; n < kBoxBlocks * kPacks; ++item, ++n) {
            ptx::mbarrier_wait(weights_empty(ring.at), ring.parity);
            ptx::mbarrier_expect(weights_full(ring.at), L::kItemBytes);
            ptx::bulk_load(base_ + L::kWeights + ring.at * L::kItemBytes,
                           packed + int64_t{item} * L::kItemBytes, L::kItemBytes, weights_full(ring.at));
            ring.advance();
          }
        }
      }
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    const int lane = threadIdx.x % 32, unit = threadIdx.x / 32 % 4;
    const uint32_t row = transposed_row<S>(unit, lane);
    const uint64_t bands = band_descriptor(base_ + L::kBands);
    const uint64_t weights = ptx::core_descriptor(base_ + L::kWeights, kOut / 8 * 128);

    uint32_t patch[S::kSteps][4], left[2][kRanks][4];
    float z[kColumns / 2], last[kUnit * L::kLast / 2], y[kOut / 2];
    Ring<L::kStages> stage(0);
    Ring<L::kRing> ring(0);
    int released = 0;  // of the ring, next

    // Calls use(z' of this item, its functions). Where the last pack is narrower, it has registers of its own: ptxas
    // serialises products that share some of them (C7511).
    const auto with_z = [&](int item, const auto& use) {
      if (L::kLast == kRanks || item % kPacks + 1 < kPacks) {
        use(z, std::integral_constant<int, kRanks>{});
      } else {
        use(last, std::integral_constant<int, L::kLast>{});
      }
    };
    const auto begin = [&](int item) {
      const uint64_t right = kPacks == 1 ? bands : ptx::unknown(bands + item % kPacks * (S::kBandBytes >> 4));
      with_z(item, [&](auto& z, auto count) { form<T, S, kUnit * count.value>(z, patch, right); });
    };
    const auto mix = [&](const uint32_t (&left)[kRanks][4], int piece, int item) {
      const int64_t at = (L::kResident ? item : ring.at) * (L::kItemBytes >> 4);
      ptx::wgmma_fence();
      with_z(item, [&](auto&, auto count) {
#pragma unroll
        for (int r = 0; r < count.value; ++r) {
          const bool add = piece > 0 || item + r > 0;
          ptx::Wgmma<T, kOut>::multiply(y, left[r], weights + at + r * (16 * kOut * 2 >> 4), add);
        }
      });
      ptx::wgmma_commit();
    };
    // Halves of z' (channels i / 2, outputs i % 2), each transposed.
    const auto turn = [&](uint32_t (&left)[kRanks][4], int item) {
      with_z(item, [&](auto& z, auto count) {
        ptx::keep(z);
#pragma unroll
        for (int r = 0; r < count.value; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = z + 4 * (2 * r + i % 2) + 2 * (i / 2);
            left[r][i] = ptx::movmatrix_trans(ptx::pack<T>(pair[0], pair[1]));
          }
        }
      });
    };
    const auto release = [&] {
      if constexpr (!L::kResident) {
        if (lane == 0) ptx::mbarrier_arrive(weights_empty(released));
        if (++released == L::kRing) released = 0;
      }
    };

    bool first = true;
    for (int i = first_square(); i < p_.squares.count; i += squares_apart()) {
      for (int piece = 0; piece < pieces(); ++piece) {
        ptx::mbarrier_wait(halo_full(group, stage.at), stage.parity);
        load_patch<S>(patch, halo(group, stage.at) + row);
        if (first) ptx::mbarrier_wait(constants(), 0);
        first = false;
        begin(0);
#pragma unroll
        for (int item = 0; item < L::kItems; ++item) {
          // Under way: z of this item and, behind it or before, y of the last one.
          if (item == 0) {
            ptx::wgmma_wait<0>();
          } else {
            ptx::wgmma_wait<1>();
          }
          if (item >= 2) release();  // what y of the last item but one has read
          turn(left[item % 2], item);
          // The first item of the last patch: all of this halo has been read.
          if (item % (kBoxBlocks * kPacks) == (kBoxBlocks - 1) * kPacks) {
            const bool kept = L::kInHalo && item + kPacks == L::kItems && piece + 1 == pieces();
            if (lane == 0 && !kept) ptx::mbarrier_arrive(halo_empty(group, stage.at));
            stage.advance();
          }
          if (item + 1 < L::kItems) {
            const int block = (item + 1) / kPacks % kBoxBlocks;
            if ((item + 1) % kPacks == 0) {
              if (block == 0) ptx::mbarrier_wait(halo_full(group, stage.at), stage.parity);
              load_patch<S>(patch, (halo(group, stage.at) + row) ^ block << 5);
            }
            begin(item + 1);
          }
          if constexpr (!L::kResident) ptx::mbarrier_wait(weights_full(ring.at), ring.parity);
          mix(left[item % 2], piece, item);
          if constexpr (!L::kResident) ring.advance();
        }
        ptx::wgmma_wait<0>();
        ptx::keep(y);
        release();
        release();
      }
      store(y, group, unit, lane, i + group);
    }
    if (lane == 0) ptx::store_wait();
  }

  // y of a warp's unit and the bias: staged, then stored by the copy engine, which clips at the edges.
  __device__ __forceinline__ void store(const float (&y)[kOut / 2], int group, int unit, int lane,
                                        int i) const {
    const T* bias = static_cast<const T*>(p_.bias);
    const uint32_t staged = base_ + L::kStaged + group * L::kStagedStep + unit * L::kOutBytes;
    constexpr int kBoxBytes = kUnit * 2 * kBox;
    const int row = lane % 16;
    if (lane == 0) ptx::store_wait_read();
    __syncwarp();  // the last unit has left
#pragma unroll
    for (int c = 0; c < kOut; c += 16) {
      uint32_t pairs[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float low = y[c / 2 + 2 * m], high = y[c / 2 + 2 * m + 1];
        if (bias) {
          const int channel = slice_ * kOut + c + m / 2 * 8 + 2 * (lane % 4);
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
    if (lane != 0) return;
    if (i < p_.squares.count) {
      const auto at = p_.squares[i];
      const int h = at.h + S::unit_h(unit), w = at.w + S::unit_w(unit);
      for (int c = 0; c < kOut; c += kBox) {
        ptx::tensor_store(staged + c / kBox * kBoxBytes, y_, slice_ * kOut + c, w, h, at.n);
      }
      ptx::store_commit();
    }
    if constexpr (L::kInHalo) {
      ptx::store_wait_read();
      ptx::mbarrier_arrive(halo_empty(group, 0));
    }
  }

  const CUtensorMap *x_, *y_;
  const Parameters& p_;
  const uint32_t base_;
  const int slice_;
};

template <typename T, class S, int kIn, int kOut, int kFunctions, bool kWhole>
__global__ __launch_bounds__(kThreads, 1) void basis_conv_sm90_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y,
    const __grid_constant__ Parameters p) {
#if defined(HYPERCONV_HOST_RUNTIME) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BasisConv<T, S, kIn, kOut, kFunctions, kWhole>(&x, &y, p).run();
#endif
}

template <typename T, class S, int kIn, int kOut, int kFunctions, bool kWhole>
Status run(const Lattice& map, const Choice& choice, const ConvArguments& a, cudaStream_t stream) {
  using L = Layout<S, kIn, kOut, kFunctions, kWhole>;
  if (!fits<S>(map, choice, L::kBytes) || a.groups != 1 || !a.aligned || a.y_channels % kOut != 0 ||
      (kWhole ? a.x.channels != kIn : a.x.channels % kIn != 0)) {
    return kUnknownPlan;
  }
  const Parameters p = {map, a.bands, a.packed, a.bias, squares_of(map), a.x.channels / kIn,
                        a.y_channels / kOut};
  CUtensorMap x, y;
  Status status = encode_halos<T, S>(&x, map, a.x.data, a.x.strides, a.x.channels);
  if (status.good()) {
    status = encode_units<T, S>(&y, map, a.y, a.y_strides, a.y_channels);
  }
  if (!status.good()) return status;
  int processors = 0;
  status.error = multiprocessors(&processors);
  if (status.error != cudaSuccess) return status;
  const int blocks = std::min(std::max(processors / p.slices, 1), ceil_div(p.squares.count, kGroups));
  return launch<basis_conv_sm90_kernel<T, S, kIn, kOut, kFunctions, kWhole>>(
      int64_t{blocks} * p.slices, kThreads, L::kBytes, stream, x, y, p);
}

}  // namespace

Status basis_conv_sm90(Number number, const Lattice& map, const Choice& choice, const ConvArguments& a,
                       cudaStream_t stream) {
  return with_shape(number, choice, [&](auto element, auto shape) -> Status {
    using T = decltype(element);
    using S = decltype(shape);
    const auto with = [&](auto functions) -> Status {
      // There are no registers for z' of another width where the patch and y are largest.
      constexpr int kWide = std::is_same_v<S, Eleven> && functions == 9 ? 10 : functions;
      if (choice.out_tiles == 4) {
        return a.x.channels == 64 ? run<T, S, 64, 64, functions, true>(map, choice, a, stream)
                                  : run<T, S, 64, 64, functions, false>(map, choice, a, stream);
      }
      if (choice.out_tiles == 8) {
        return a.x.channels == 128 ? run<T, S, 128, 128, kWide, true>(map, choice, a, stream)
                                   : run<T, S, 64, 128, kWide, false>(map, choice, a, stream);
      }
      return kUnknownPlan;
    };
    if (a.rank <= 5) return with(std::integral_constant<int, 5>{});
    if (a.rank <= 9) return with(std::integral_constant<int, 9>{});
    if (a.rank <= 10) return with(std::integral_constant<int, 10>{});
    return kUnknownPlan;
  });
}

}  // namespace hyperconv
