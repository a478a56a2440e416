// basis_conv_bwd_basis: the gradient of the banded matrix, summed along its diagonals at the end.
//
//   u_r [16 outputs, 16 channels]  = g [16 outputs, out] A_r' [out, 16 channels]
//   d band_r [16 outputs, patch]  += u_r [16, 16] x' [16 channels, patch]
//   dphi_r(k)                      = sum of d band_r where tap k meets an output
//
// u_r goes from the first product to the second in the registers that it was summed in. A block sums its
// share of outputs and input channels for kRanks basis functions and one piece of the patch.
#include <type_traits>

#include "launch.cuh"
#include "responses.cuh"

namespace hyperconv {
namespace {

// 16-row tiles of the patch whose gradients a block holds: the whole patch of 4x4 outputs at k = 7.
constexpr int kPiece = 7;

template <class N>
struct BasisParameters {
  using Element = typename N::Element;
  Lattice map;
  Source<N> g, x;
  const Element* packed;  // [groups, out / 16, R, in / 16] tiles
  float* partial;         // [splits, pieces, R, K]; [R, K] if atomic
  int groups, rank, splits, halo_stages;
  bool atomic;
  const float* scales;    // [R], where A is scaled
};

template <class N, int kOutTiles, int kRanks>
struct BasisShared {
  using Element = typename N::Element;
  int halo_elements, grad_elements;
  Element *halo, *grad, *coefficients;
  Position *halo_table, *output_table;
  int* patch_table;
  Item* items;
  float* total;  // [kRanks, 16 outputs, piece], at the end, over the rest
  int bytes;

  __host__ __device__ __forceinline__ BasisShared(Arena arena, const BasisParameters<N>& p) {
    Arena end = arena;
    total = end.take<float>(kRanks * kUnit * 16 * kPiece);
    halo_elements = p.map.halo() * kChannels;
    halo = arena.take<Element>(p.halo_stages * halo_elements);
    grad_elements = p.map.units() * kUnit * 16 * kOutTiles;
    grad = arena.take<Element>(2 * grad_elements);
    coefficients = arena.take<Element>(2 * kRanks * kOutTiles * kTileElements);
    halo_table = arena.take<Position>(p.map.halo());
    output_table = arena.take<Position>(p.map.units() * kUnit);
    patch_table = arena.take<int>(p.map.chunks() * 16);
    items = arena.take<Item>(ItemTable::kItems);
    bytes = max(arena.used(), end.used());
  }
};

template <class N, int kOutTiles, int kRanks>
class BasisGradient {
  using Element = typename N::Element;
  static constexpr int kOut = 16 * kOutTiles;

 public:
  __device__ __forceinline__ explicit BasisGradient(const BasisParameters<N>& p)
      : p_(p),
        pieces_(ceil_div(p.map.chunks(), kPiece)),
        in_blocks_(ceil_div(p.x.channels, kChannels)),
        out_tiles_(ceil_div(p.g.channels, 16)),
        out_steps_(ceil_div(out_tiles_, kOutTiles)),
        shared_(Arena(ptx::dynamic_shared()), p),
        units_(p.map) {
    int index = blockIdx.x;
    const int rank_blocks = ceil_div(p.rank, kRanks);
    first_ = index % rank_blocks * kRanks;
    index /= rank_blocks;
    piece_ = index % pieces_;
    split_ = index / pieces_;
    ranks_ = min(kRanks, p.rank - first_);
    const int work = p.groups * p.map.blocks() * p.map.phases() * in_blocks_;
    const int share = ceil_div(work, p.splits);
    begin_ = split_ * share;
    end_ = min(begin_ + share, work);
  }

  __device__ __forceinline__ void run() {
    fill_halo_table(shared_.halo_table, p_.map, p_.x.strides);
    fill_output_table(shared_.output_table, p_.map, p_.g.strides);
    fill_patch_table(shared_.patch_table, p_.map);
    items().locate(begin_, where());
    __syncthreads();  // the tables
    // Items are blocks of outputs at 16 input channels; steps, blocks of output channels.
    pipeline<ItemTable::kBatch>(
        begin_, end_, 1, out_steps_, p_.halo_stages == 1,
        [&](int item) { items().locate(item + ItemTable::kBatch, where()); },
        [&](int item) { copy_inputs(item); },
        [&](const Step& s) { copy(s.item, s.slice, s.steps); },
        [&](const Step& s) {
          if (s.slice == 0) u_.clear();
          with_constant<kRanks>(ranks_, [&](auto count) {
            gather<count>(s.slice, s.steps);
            if (s.slice + 1 == out_steps_) correlate<count>(s.item);
          });
        });
    store();
  }

 private:
  __device__ __forceinline__ int stage(int item) const {
    return p_.halo_stages == 1 ? 0 : (item - begin_) % 2;
  }
  __device__ __forceinline__ Halo<N> halo_of(int stage) const {
    return {shared_.halo + stage * shared_.halo_elements};
  }
  __device__ __forceinline__ Rows<N, kOut> grad_of(int number) const {
    return {shared_.grad + number % 2 * shared_.grad_elements};
  }
  __device__ __forceinline__ Element* coefficients_of(int number) const {
    return shared_.coefficients + number % 2 * kRanks * kOutTiles * kTileElements;
  }

  // Items: input channels fastest, then blocks of outputs, then groups.
  __device__ __forceinline__ ItemTable items() const { return {shared_.items, begin_}; }
  __device__ __forceinline__ auto where() const {
    return [this](int item) {
      const int tiles = p_.map.blocks() * p_.map.phases();
      return Item{locate(p_.map, item / in_blocks_ % tiles), item % in_blocks_,
                  item / in_blocks_ / tiles};
    };
  }
  __device__ __forceinline__ int step_tiles(int out) const {
    return min(kOutTiles, out_tiles_ - out * kOutTiles);
  }

  __device__ __forceinline__ void copy(int item, int out, int number) {
    const Item& at = items()[item];
    const int64_t output_base = first_output(p_.map, at.block, p_.g.strides);
    const auto output = [&](int i, int64_t* element) {
      const Position position = shared_.output_table[i];
      *element = output_base + position.element;
      return is_output(p_.map, at.block, position.at);
    };
    copy_rows<N>(grad_of(number), p_.map.units() * kUnit, output, p_.g, at.group, out * kOut);
    // In shared memory [o, kRanks]; for functions beyond the last, the last again.
    const int64_t row = static_cast<int64_t>(at.group) * out_tiles_ + out * kOutTiles;
    copy_tiles<N>(coefficients_of(number), step_tiles(out) * kRanks, [&](unsigned n) {
      const int64_t rank = min(first_ + static_cast<int>(n % kRanks), p_.rank - 1);
      const int64_t tile = ((row + n / kRanks) * p_.rank + rank) * in_blocks_ + at.in_block;
      return p_.packed + tile * kTileElements;
    });
  }

  __device__ __forceinline__ void copy_inputs(int item) {
    const Item& at = items()[item];
    const int64_t input_base = first_input(at.block, p_.x.strides);
    const auto input = [&](int i, int64_t* element) {
      const Position position = shared_.halo_table[i];
      *element = input_base + position.element;
      return is_input(p_.map, at.block, position.at);
    };
    copy_rows<N>(halo_of(stage(item)), p_.map.halo(), input, p_.x, at.group,
                 at.in_block * kChannels);
  }

  // u_r += g A_r', over the output channels of one step.
  template <int kCount>
  __device__ __forceinline__ void gather(int out, int number) {
    const Rows<N, kOut> grad = grad_of(number);
    const Element* coefficients = coefficients_of(number);
    for (int o = 0; o < step_tiles(out); ++o) {
      Tile<N> g[kUnits];
#pragma unroll
      for (int m = 0; m < kUnits; ++m) {
        g[m] = load_left<N, Along::kChannels>(grad, ConsecutiveRows{unit_of_warp(m) * kUnit}, 16 * o);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const auto weights = load_packed<N>(coefficients + (o * kRanks + j) * kTileElements);
#pragma unroll
        for (int m = 0; m < kUnits; ++m) {
          multiply<N>(u_.z[m][j], g[m], weights);
        }
      }
    }
  }

  // d band_r += u_r x', over this block's piece of the patch.
  template <int kCount>
  __device__ __forceinline__ void correlate(int item) {
    const Halo<N> halo = halo_of(stage(item));
    const int chunks = min(kPiece, p_.map.chunks() - piece_ * kPiece);
#pragma unroll
    for (int m = 0; m < kUnits; ++m) {
      Tile<N> u[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) u[j] = chain<N>(u_.z[m][j]);
#pragma unroll
      for (int chunk = 0; chunk < kPiece; ++chunk) {
        if (chunk < chunks) {
          const int* table = shared_.patch_table + (piece_ * kPiece + chunk) * 16;
          const auto patch = load_right<N, Along::kChannels>(halo, PatchRows{table, units_.first[m]}, 0);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            multiply<N>(sum_[j][chunk], u[j], patch);
          }
        }
      }
    }
  }

  // The warps' sums together, folded along the diagonals.
  __device__ __forceinline__ void store() {
    constexpr int kWidth = 16 * kPiece;
    float* total = shared_.total;
    sum_over_warps(total, [&](const auto& add) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
#pragma unroll
        for (int chunk = 0; chunk < kPiece; ++chunk) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int row = j * kUnit + product_row(i % 4);
            add(row * kWidth + 16 * chunk + product_column(i / 4, i % 4),
                sum_[j][chunk][i / 4][i % 4]);
          }
        }
      }
    });
    const Axis *d = &p_.map.axis[0], *h = &p_.map.axis[1], *w = &p_.map.axis[2];
    const int taps = d->kernel * h->kernel * w->kernel;
    const int64_t slice = p_.atomic ? 0 : split_ * pieces_ + piece_;
    float* partial = p_.partial + slice * p_.rank * taps;
    for (int i = threadIdx.x; i < ranks_ * taps; i += blockDim.x) {
      const int k = i % taps, j = i / taps;
      const int k_w = k % w->kernel, k_h = k / w->kernel % h->kernel;
      const int k_d = k / w->kernel / h->kernel;
      float value = 0.0f;
      for (int t = 0; t < kUnit; ++t) {
        const int l_w = t % w->unit * w->stride + k_w;
        const int l_h = t / w->unit % h->unit * h->stride + k_h;
        const int l_d = t / w->unit / h->unit * d->stride + k_d;
        const int l = (l_d * h->patch + l_h) * w->patch + l_w - piece_ * kWidth;
        if (l >= 0 && l < kWidth) value += total[(j * kUnit + t) * kWidth + l];
      }
      if constexpr (kScaled<N>) value *= p_.scales[first_ + j];
      float* address = partial + static_cast<int64_t>(first_ + j) * taps + k;
      if (p_.atomic) {
        atomicAdd(address, value);
      } else {
        *address = value;
      }
    }
  }

  const BasisParameters<N>& p_;
  const int pieces_, in_blocks_, out_tiles_, out_steps_;
  int first_, ranks_, piece_, split_, begin_, end_;
  const BasisShared<N, kOutTiles, kRanks> shared_;
  const UnitHalos units_;
  Responses<kRanks> u_;  // [outputs, channels] as z is
  float sum_[kRanks][kPiece][2][4] = {};
};

template <class N, int kOutTiles, int kRanks>
__global__ __launch_bounds__(256) void basis_gradient_kernel(
    const __grid_constant__ BasisParameters<N> p) {
  BasisGradient<N, kOutTiles, kRanks>(p).run();
}

template <class N, int kOutTiles, int kRanks>
Status run(const Lattice& map, const Choice& choice, const BasisArguments& a,
           cudaStream_t stream) {
  using Element = typename N::Element;
  if (choice.ranks != kRanks || choice.out_tiles != kOutTiles) return kUnknownPlan;
  BasisParameters<N> p = {};
  p.map = map;
  p.g = {static_cast<const Element*>(a.g.data), a.g.strides, a.g.channels, a.aligned};
  p.x = {static_cast<const Element*>(a.x.data), a.x.strides, a.x.channels, a.aligned};
  p.packed = static_cast<const Element*>(a.packed);
  p.partial = a.partial;
  p.groups = a.groups;
  p.rank = a.rank;
  p.splits = a.splits;
  p.halo_stages = choice.halo_stages;
  p.atomic = a.atomic;
  p.scales = a.scales;
  const BasisShared<N, kOutTiles, kRanks> shared(Arena::measuring(), p);
  if (choice.shared_bytes != shared.bytes) return kUnknownPlan;
  const int64_t blocks = static_cast<int64_t>(a.splits) * ceil_div(a.rank, kRanks) *
                         basis_gradient_pieces(map);
  return launch<basis_gradient_kernel<N, kOutTiles, kRanks>>(blocks, choice.warps * 32, choice.shared_bytes,
                                                             stream, p);
}

}  // namespace

int basis_gradient_pieces(const Lattice& map) { return ceil_div(map.chunks(), kPiece); }

Status basis_gradient(Number number, const Lattice& map, const Choice& choice,
                      const BasisArguments& a, cudaStream_t stream) {
  if (map.units() != choice.warps * kUnits || map.bands() != 1) return kUnknownPlan;
  return with_number(number, [&](auto n) -> Status {
    using N = decltype(n);
    // Two basis functions: the gradients of their bands take 128 registers.
    constexpr int kRanks = std::is_same_v<N, Ieee> ? 1 : 2;
    return run<N, 2, kRanks>(map, choice, a, stream);
  });
}

}  // namespace hyperconv
