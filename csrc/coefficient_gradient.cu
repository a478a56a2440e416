// basis_conv_bwd_coeff: dA[o, i, r] = sum_p g[o, p] z[i, r, p], with z formed again as in basis_conv.cu,
// but transposed, so that its accumulators are a left operand whose inner dimension is the outputs:
//
//   z_r' [16 channels, 16 outputs] = x' [16 channels, patch] band_r' [patch, 16 outputs]
//   dA_r' [16 channels, out]      += z_r' [16, 16] g [16 outputs, out]
//
// A block sums its share of the outputs for one 16 input channels, one range of output channels and
// kRanks basis functions.
#include <type_traits>

#include "launch.cuh"
#include "responses.cuh"

namespace hyperconv {
namespace {

template <class N>
struct CoefficientParameters {
  using Element = typename N::Element;
  Lattice map;
  Source<N> g, x;
  const Element* bands;  // [1, R, chunks] tiles
  float* partial;        // [splits, C_out, C_in / groups, R]
  int groups, rank, splits, slice, halo_stages;
  bool atomic;
  const float* scales;    // [R], where the bands are scaled
};

template <class N, int kOutTiles, int kRanks>
struct CoefficientShared {
  using Element = typename N::Element;
  int halo_elements, grad_elements;
  Element *halo, *grad, *bands;
  Position *halo_table, *output_table;
  int* patch_table;
  Item* items;
  float* total;  // [kRanks, 16 channels, out], at the end, over the rest
  int bytes;

  __host__ __device__ __forceinline__ CoefficientShared(Arena arena,
                                                        const CoefficientParameters<N>& p) {
    const int copies = p.slice >= p.map.chunks() ? 1 : 2;
    Arena end = arena;
    total = end.take<float>(kRanks * kChannels * 16 * kOutTiles);
    halo_elements = p.map.halo() * kChannels;
    halo = arena.take<Element>(p.halo_stages * halo_elements);
    grad_elements = p.map.units() * kUnit * 16 * kOutTiles;
    grad = arena.take<Element>(p.halo_stages * grad_elements);
    bands = arena.take<Element>(copies * kRanks * p.slice * kTileElements);
    halo_table = arena.take<Position>(p.map.halo());
    output_table = arena.take<Position>(p.map.units() * kUnit);
    patch_table = arena.take<int>(p.map.chunks() * 16);
    items = arena.take<Item>(ItemTable::kItems);
    bytes = max(arena.used(), end.used());
  }
};

template <class N, int kOutTiles, int kRanks>
class CoefficientGradient {
  using Element = typename N::Element;
  static constexpr int kOut = 16 * kOutTiles;

 public:
  __device__ __forceinline__ explicit CoefficientGradient(const CoefficientParameters<N>& p)
      : p_(p),
        chunks_(p.map.chunks()),
        slices_(p.slice, chunks_),
        shared_(Arena(ptx::dynamic_shared()), p),
        units_(p.map) {
    int index = blockIdx.x;
    const int rank_blocks = ceil_div(p.rank, kRanks);
    first_ = index % rank_blocks * kRanks;
    index /= rank_blocks;
    const int in_blocks = ceil_div(p.x.channels, kChannels);
    in_ = index % in_blocks * kChannels;
    index /= in_blocks;
    const int out_blocks = ceil_div(p.g.channels, kOut);
    out_ = index % out_blocks * kOut;
    index /= out_blocks;
    split_ = index % p.splits;
    group_ = index / p.splits;
    ranks_ = min(kRanks, p.rank - first_);
    const int work = p.map.blocks() * p.map.phases();
    const int share = ceil_div(work, p.splits);
    begin_ = split_ * share;
    end_ = min(begin_ + share, work);
  }

  __device__ __forceinline__ void run() {
    fill_halo_table(shared_.halo_table, p_.map, p_.x.strides);
    fill_output_table(shared_.output_table, p_.map, p_.g.strides);
    fill_patch_table(shared_.patch_table, p_.map);
    if (resident()) copy_bands(0, 0);
    items().locate(begin_, where());
    __syncthreads();  // the tables
    // Items are blocks of outputs; steps, slices of the patch.
    pipeline<ItemTable::kBatch>(
        begin_, end_, 1, slices_.count, p_.halo_stages == 1,
        [&](int tile) { items().locate(tile + ItemTable::kBatch, where()); },
        [&](int tile) { copy_activations(tile); },
        [&](const Step& s) {
          if (!resident()) copy_bands(s.slice, s.steps);
        },
        [&](const Step& s) {
          if (s.slice == 0) responses_.clear();
          with_constant<kRanks>(ranks_, [&](auto count) {
            form_responses<count>(s);
            if (s.slice + 1 == slices_.count) correlate<count>(s.item);
          });
        });
    store();
  }

 private:
  __device__ __forceinline__ bool resident() const { return slices_.count == 1; }
  __device__ __forceinline__ int stage(int tile) const {
    return p_.halo_stages == 1 ? 0 : (tile - begin_) % 2;
  }
  __device__ __forceinline__ Halo<N> halo_of(int stage) const {
    return {shared_.halo + stage * shared_.halo_elements};
  }
  __device__ __forceinline__ Rows<N, kOut> grad_of(int stage) const {
    return {shared_.grad + stage * shared_.grad_elements};
  }
  __device__ __forceinline__ Element* bands_of(int number) const {
    return shared_.bands + (resident() ? 0 : number % 2) * kRanks * p_.slice * kTileElements;
  }

  __device__ __forceinline__ ItemTable items() const { return {shared_.items, begin_}; }
  __device__ __forceinline__ auto where() const {
    return [this](int tile) { return Item{locate(p_.map, tile), 0, 0}; };
  }

  __device__ __forceinline__ void copy_activations(int tile) {
    const Block& block = items()[tile].block;
    const int64_t input_base = first_input(block, p_.x.strides);
    const auto input = [&](int i, int64_t* element) {
      const Position position = shared_.halo_table[i];
      *element = input_base + position.element;
      return is_input(p_.map, block, position.at);
    };
    const int64_t output_base = first_output(p_.map, block, p_.g.strides);
    const auto output = [&](int i, int64_t* element) {
      const Position position = shared_.output_table[i];
      *element = output_base + position.element;
      return is_output(p_.map, block, position.at);
    };
    copy_rows<N>(halo_of(stage(tile)), p_.map.halo(), input, p_.x, group_, in_);
    copy_rows<N>(grad_of(stage(tile)), p_.map.units() * kUnit, output, p_.g, group_, out_);
  }

  __device__ __forceinline__ void copy_bands(int slice, int number) {
    for (int j = 0; j < ranks_; ++j) {
      const int64_t tile = static_cast<int64_t>(first_ + j) * chunks_ + slice * p_.slice;
      const Element* first_tile = p_.bands + tile * kTileElements;
      copy_tiles<N>(bands_of(number) + j * p_.slice * kTileElements, slices_.tiles(slice, chunks_),
                    [&](unsigned n) { return first_tile + n * kTileElements; });
    }
  }

  template <int kCount>
  __device__ __forceinline__ void form_responses(const Step& s) {
    responses_.template accumulate<N, true, kCount>(
        halo_of(stage(s.item)), units_,
        shared_.patch_table + s.slice * p_.slice * 16, slices_.tiles(s.slice, chunks_),
        bands_of(s.steps), p_.slice);
  }

  // dA_r' += z_r' g.
  template <int kCount>
  __device__ __forceinline__ void correlate(int tile) {
    const Rows<N, kOut> grad = grad_of(stage(tile));
#pragma unroll
    for (int m = 0; m < kUnits; ++m) {
      Tile<N> z[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) z[j] = chain<N>(responses_.z[m][j]);
      const ConsecutiveRows rows = {unit_of_warp(m) * kUnit};
#pragma unroll
      for (int o = 0; o < kOutTiles; ++o) {
        const auto g = load_right<N, Along::kRows>(grad, rows, 16 * o);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          multiply<N>(sum_[j][o], z[j], g);
        }
      }
    }
  }

  // The warps' sums together, then to global memory in A's order.
  __device__ __forceinline__ void store() {
    float* total = shared_.total;
    sum_over_warps(total, [&](const auto& add) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
#pragma unroll
        for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int row = j * kChannels + product_row(i % 4);
            add(row * kOut + 16 * o + product_column(i / 4, i % 4), sum_[j][o][i / 4][i % 4]);
          }
        }
      }
    });
    const int64_t out_channels = static_cast<int64_t>(p_.groups) * p_.g.channels;
    float* partial = p_.partial + (p_.atomic ? 0 : split_ * out_channels * p_.x.channels * p_.rank);
    for (int i = threadIdx.x; i < kOut * kChannels * kRanks; i += blockDim.x) {
      const int j = i % kRanks, channel = i / kRanks % kChannels, out = i / kRanks / kChannels;
      if (j >= ranks_ || in_ + channel >= p_.x.channels || out_ + out >= p_.g.channels) continue;
      const int64_t row = static_cast<int64_t>(group_) * p_.g.channels + out_ + out;
      float* address = partial + (row * p_.x.channels + in_ + channel) * p_.rank + first_ + j;
      float value = total[(j * kChannels + channel) * kOut + out];
      if constexpr (kScaled<N>) value *= p_.scales[first_ + j];
      if (p_.atomic) {
        atomicAdd(address, value);
      } else {
        *address = value;
      }
    }
  }

  const CoefficientParameters<N>& p_;
  const int chunks_;
  const Slices slices_;
  const CoefficientShared<N, kOutTiles, kRanks> shared_;
  const UnitHalos units_;
  int first_, ranks_, in_, out_, split_, group_, begin_, end_;
  Responses<kRanks> responses_;
  float sum_[kRanks][kOutTiles][2][4] = {};
};

template <class N, int kOutTiles, int kRanks>
__global__ __launch_bounds__(256) void coefficient_gradient_kernel(
    const __grid_constant__ CoefficientParameters<N> p) {
  CoefficientGradient<N, kOutTiles, kRanks>(p).run();
}

template <class N, int kOutTiles, int kRanks>
Status run(const Lattice& map, const Choice& choice, const CoefficientArguments& a,
           cudaStream_t stream) {
  using Element = typename N::Element;
  if (choice.ranks != kRanks) return kUnknownPlan;
  CoefficientParameters<N> p = {};
  p.map = map;
  p.g = {static_cast<const Element*>(a.g.data), a.g.strides, a.g.channels, a.aligned};
  p.x = {static_cast<const Element*>(a.x.data), a.x.strides, a.x.channels, a.aligned};
  p.bands = static_cast<const Element*>(a.bands);
  p.partial = a.partial;
  p.groups = a.groups;
  p.rank = a.rank;
  p.splits = a.splits;
  p.slice = choice.slice;
  p.halo_stages = choice.halo_stages;
  p.atomic = a.atomic;
  p.scales = a.scales;
  const CoefficientShared<N, kOutTiles, kRanks> shared(Arena::measuring(), p);
  if (choice.shared_bytes != shared.bytes) return kUnknownPlan;
  const int64_t blocks = static_cast<int64_t>(a.groups) * a.splits * ceil_div(a.rank, kRanks) *
                         ceil_div(a.x.channels, kChannels) * ceil_div(a.g.channels, 16 * kOutTiles);
  return launch<coefficient_gradient_kernel<N, kOutTiles, kRanks>>(blocks, choice.warps * 32, choice.shared_bytes,
                                                                   stream, p);
}

}  // namespace

Status coefficient_gradient(Number number, const Lattice& map, const Choice& choice,
                            const CoefficientArguments& a, cudaStream_t stream) {
  if (map.units() != choice.warps * kUnits || map.bands() != 1) return kUnknownPlan;
  return with_number(number, [&](auto n) -> Status {
    using N = decltype(n);
    if constexpr (std::is_same_v<N, Ieee>) {
      if (choice.out_tiles == 1) return run<N, 1, 1>(map, choice, a, stream);
      if (choice.out_tiles == 4) return run<N, 4, 1>(map, choice, a, stream);
    } else {
      // Few output channels: all of the usual R = 5 share one reading of the patch.
      if (choice.out_tiles == 1) return run<N, 1, 5>(map, choice, a, stream);
      // 64: the sums of three basis functions take 96 registers, their z 48.
      if (choice.out_tiles == 4) return run<N, 4, 3>(map, choice, a, stream);
    }
    return kUnknownPlan;
  });
}

}  // namespace hyperconv
