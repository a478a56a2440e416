// basis_conv_fwd and basis_conv_bwd_input: y = A z with z = phi * x, one kernel for both.
//
// A warp owns kUnits units of 16 outputs. For 16 input channels and kRanks basis functions it forms
//
//   z_r [16 outputs, 16 channels] = band_r [16, patch] x [patch, 16 channels]      (tiles of 16 along the patch)
//   y [16 outputs, out]          += z_r [16, 16] A_r [16, out]
//
// and z_r goes from the first product to the second in the registers that it was summed in.
#include <type_traits>

#include "launch.cuh"
#include "responses.cuh"

namespace hyperconv {
namespace {

template <class N>
struct ConvParameters {
  using Element = typename N::Element;
  Lattice map;
  Source<N> x;
  const Element* bands;   // [bands, R, chunks] tiles
  const Element* packed;  // [groups, in / 16, R, out tiles] tiles
  const Element* bias;    // [out channels] or null
  Element* y;
  Strides y_strides;
  int y_channels;  // per group
  int rank, slice, halo_stages;
  bool y_pairs;  // y's channels can be written two at a time
};

template <class N, int kOutTiles, int kRanks>
struct ConvShared {
  using Element = typename N::Element;
  int halo_elements;
  Element *halo, *coefficients, *bands;
  int64_t* elements;  // of the halo's positions
  int* patch_table;
  int bytes;

  __host__ __device__ __forceinline__ ConvShared(Arena arena, const ConvParameters<N>& p) {
    const bool resident = p.slice >= p.map.chunks();
    halo_elements = p.map.halo() * kChannels;
    halo = arena.take<Element>(p.halo_stages * halo_elements);
    coefficients = arena.take<Element>(2 * kRanks * kOutTiles * kTileElements);
    bands = arena.take<Element>((resident ? p.rank : 2 * kRanks) * p.slice * kTileElements);
    elements = arena.take<int64_t>(p.map.halo());
    patch_table = arena.take<int>(p.map.chunks() * 16);
    bytes = arena.used();
  }
};

template <class N, int kOutTiles, int kRanks>
class BasisConv {
  using Element = typename N::Element;

 public:
  __device__ __forceinline__ explicit BasisConv(const ConvParameters<N>& p)
      : p_(p),
        chunks_(p.map.chunks()),
        slices_(p.slice, chunks_),
        shared_(Arena(ptx::dynamic_shared()), p),
        units_(p.map),
        out_tiles_(ceil_div(p.y_channels, 16 * kOutTiles) * kOutTiles) {
    const int out_blocks = out_tiles_ / kOutTiles;
    out_ = blockIdx.x % out_blocks * kOutTiles;
    const int rest = blockIdx.x / out_blocks;
    const int blocks = p.map.blocks() * p.map.phases();
    block_ = locate(p.map, rest % blocks);
    group_ = rest / blocks;
  }

  __device__ __forceinline__ void run() {
    fill_element_table(shared_.elements, p_.map, block_, p_.x.strides);
    fill_patch_table(shared_.patch_table, p_.map);
    if (resident()) copy_bands(shared_.bands, 0, p_.rank, 0);
    __syncthreads();  // the tables
    // Items are blocks of input channels; turns, groups of basis functions; steps, slices of the patch.
    pipeline<0>(
        0, ceil_div(p_.x.channels, kChannels), ceil_div(p_.rank, kRanks), slices_.count,
        p_.halo_stages == 1, [](int) {}, [&](int c) { copy_halo(c); }, [&](const Step& s) { copy(s); },
        [&](const Step& s) { compute(s); });
    store();
  }

 private:
  __device__ __forceinline__ bool resident() const { return slices_.count == 1; }
  __device__ __forceinline__ int first(const Step& s) const { return s.turn * kRanks; }
  __device__ __forceinline__ int ranks(const Step& s) const {
    return min(kRanks, p_.rank - first(s));
  }

  __device__ __forceinline__ Halo<N> halo_of(int c) const {
    return {shared_.halo + (p_.halo_stages == 1 ? 0 : c % 2 * shared_.halo_elements)};
  }
  __device__ __forceinline__ Element* coefficients_of(const Step& s) const {
    return shared_.coefficients + s.turns % 2 * kRanks * kOutTiles * kTileElements;
  }
  // Bands of basis function first(s), those of the next `band_stride` tiles further.
  __device__ __forceinline__ Element* bands_of(const Step& s) const {
    const int tiles = resident() ? first(s) * chunks_ : s.steps % 2 * kRanks * p_.slice;
    return shared_.bands + tiles * kTileElements;
  }
  __device__ __forceinline__ int band_stride() const { return resident() ? chunks_ : p_.slice; }

  __device__ __forceinline__ void copy(const Step& s) {
    if (s.slice == 0) {
      const int channel_blocks = ceil_div(p_.x.channels, kChannels);
      const int64_t tile =
          (static_cast<int64_t>(group_ * channel_blocks + s.item) * p_.rank + first(s)) * out_tiles_ +
          out_;
      const Element* packed = p_.packed + tile * kTileElements;
      copy_tiles<N>(coefficients_of(s), ranks(s) * kOutTiles, [&](unsigned n) {
        return packed + (n / kOutTiles * out_tiles_ + n % kOutTiles) * kTileElements;
      });
    }
    if (!resident()) copy_bands(bands_of(s), first(s), ranks(s), s.slice);
  }

  __device__ __forceinline__ void copy_halo(int c) {
    const auto where = [&](int position, int64_t* element) {
      *element = shared_.elements[position];
      return *element >= 0;
    };
    copy_rows<N>(halo_of(c), p_.map.halo(), where, p_.x, group_, c * kChannels);
  }

  __device__ __forceinline__ void copy_bands(Element* shared, int first, int ranks, int slice) {
    const int tiles = slices_.tiles(slice, chunks_);
    for (int j = 0; j < ranks; ++j) {
      const int64_t row = static_cast<int64_t>(block_.band) * p_.rank + first + j;
      const Element* first_tile = p_.bands + (row * chunks_ + slice * p_.slice) * kTileElements;
      copy_tiles<N>(shared + j * band_stride() * kTileElements, tiles,
                    [&](unsigned n) { return first_tile + n * kTileElements; });
    }
  }

  __device__ __forceinline__ void compute(const Step& s) {
    if (s.slice == 0) responses_.clear();
    with_constant<kRanks>(ranks(s), [&](auto count) {
      form_responses<count>(s);
      if (s.slice + 1 == slices_.count) mix<count>(s);
    });
  }

  // z_r += band_r x, over the tiles of one slice.
  template <int kCount>
  __device__ __forceinline__ void form_responses(const Step& s) {
    responses_.template accumulate<N, false, kCount>(
        halo_of(s.item), units_, shared_.patch_table + s.slice * p_.slice * 16,
        slices_.tiles(s.slice, chunks_), bands_of(s), band_stride());
  }

  // y += z_r A_r.
  template <int kCount>
  __device__ __forceinline__ void mix(const Step& s) {
    const Element* coefficients = coefficients_of(s);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Tile<N> z[kUnits];
#pragma unroll
      for (int m = 0; m < kUnits; ++m) z[m] = chain<N>(responses_.z[m][j]);
#pragma unroll
      for (int o = 0; o < kOutTiles; ++o) {
        const auto weights = load_packed<N>(coefficients + (j * kOutTiles + o) * kTileElements);
#pragma unroll
        for (int m = 0; m < kUnits; ++m) {
          multiply<N>(y_[m][o], z[m], weights);
        }
      }
    }
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int m = 0; m < kUnits; ++m) {
      const int unit = unit_of_warp(m);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Offset at = output_offset(p_.map, unit * kUnit + product_row(2 * half));
        if (!is_output(p_.map, block_, at)) continue;
        const int64_t element = first_output(p_.map, block_, p_.y_strides) +
                                output_distance(p_.map, p_.y_strides, at);
#pragma unroll
        for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            store_pair(element, (out_ + o) * 16 + product_column(n, 0), y_[m][o][n][2 * half],
                       y_[m][o][n][2 * half + 1]);
          }
        }
      }
    }
  }

  // Channels `channel` and `channel` + 1 of the group at `element`.
  __device__ __forceinline__ void store_pair(int64_t element, int channel, float low,
                                             float high) const {
    if (channel >= p_.y_channels) return;
    const int64_t absolute = static_cast<int64_t>(group_) * p_.y_channels + channel;
    const bool both = channel + 1 < p_.y_channels;
    if (p_.bias) {
      low += ptx::to_float(p_.bias[absolute]);
      if (both) high += ptx::to_float(p_.bias[absolute + 1]);
    }
    Element* y = p_.y + element + absolute * p_.y_strides.channel;
    if (p_.y_pairs) {
      struct alignas(2 * sizeof(Element)) Two {
        Element low, high;
      };
      *reinterpret_cast<Two*>(y) = {ptx::from_float<Element>(low), ptx::from_float<Element>(high)};
    } else {
      y[0] = ptx::from_float<Element>(low);
      if (both) y[p_.y_strides.channel] = ptx::from_float<Element>(high);
    }
  }

  const ConvParameters<N>& p_;
  const int chunks_;
  const Slices slices_;
  const ConvShared<N, kOutTiles, kRanks> shared_;
  const UnitHalos units_;
  const int out_tiles_;
  int out_;  // first output tile of the block, within the group
  int group_;
  Block block_;
  Responses<kRanks> responses_;
  float y_[kUnits][kOutTiles][2][4] = {};
};

template <class N, int kOutTiles, int kRanks>
__global__ __launch_bounds__(256) void basis_conv_kernel(const __grid_constant__ ConvParameters<N> p) {
  BasisConv<N, kOutTiles, kRanks>(p).run();
}

template <class N, int kOutTiles, int kRanks>
Status run(const Lattice& map, const Choice& choice, const ConvArguments& a,
           cudaStream_t stream) {
  if (choice.ranks != kRanks || a.x.channels == 0) return kUnknownPlan;
  using Element = typename N::Element;
  ConvParameters<N> p = {};
  p.map = map;
  p.x = {static_cast<const Element*>(a.x.data), a.x.strides, a.x.channels, a.aligned};
  p.bands = static_cast<const Element*>(a.bands);
  p.packed = static_cast<const Element*>(a.packed);
  p.bias = static_cast<const Element*>(a.bias);
  p.y = static_cast<Element*>(a.y);
  p.y_strides = a.y_strides;
  p.y_channels = a.y_channels;
  p.rank = a.rank;
  p.slice = choice.slice;
  p.halo_stages = choice.halo_stages;
  p.y_pairs = a.aligned && a.y_strides.channel == 1;
  const ConvShared<N, kOutTiles, kRanks> shared(Arena::measuring(), p);
  if (choice.shared_bytes != shared.bytes) return kUnknownPlan;
  const int64_t blocks = static_cast<int64_t>(a.groups) * map.phases() * map.blocks() *
                         ceil_div(a.y_channels, 16 * kOutTiles);
  return launch<basis_conv_kernel<N, kOutTiles, kRanks>>(blocks, choice.warps * 32, choice.shared_bytes,
                                                         stream, p);
}

}  // namespace

Status basis_conv(Number number, const Lattice& map, const Choice& choice,
                  const ConvArguments& a, cudaStream_t stream) {
  if (map.units() != choice.warps * kUnits) return kUnknownPlan;
  return with_number(number, [&](auto n) -> Status {
    using N = decltype(n);
    if constexpr (std::is_same_v<N, Ieee>) {
      // Ordinary units: one basis function at a time leaves room for what they fetch.
      if (choice.out_tiles == 1) return run<N, 1, 1>(map, choice, a, stream);
      if (choice.out_tiles == 4) return run<N, 4, 1>(map, choice, a, stream);
    } else {
      // Up to 16 output channels: the first and last levels of a U-Net.
      if (choice.out_tiles == 1) return run<N, 1, 5>(map, choice, a, stream);
      // 64: y takes 64 registers, z of the usual R = 5 all at once 80.
      if (choice.out_tiles == 4) return run<N, 4, 5>(map, choice, a, stream);
      // 128 halve how often z is formed: y takes 128 registers and leaves room for two z.
      if constexpr (sizeof(typename N::Element) == 2) {
        if (choice.out_tiles == 8) return run<N, 8, 2>(map, choice, a, stream);
      }
    }
    return kUnknownPlan;
  });
}

}  // namespace hyperconv
