// One small launch before each convolution kernel: phi as banded matrices and the coefficients, both as
// the packed tiles of tile.cuh, so that the kernels that follow load whole operands 16 bytes at a time.
//
// phi is read, or the coordinate MLP is evaluated here: a warp does so at one tap and writes its phi
// wherever the bands meet that tap, while other blocks write the zeros between. No element has two
// writers, so nothing has to wait.
#include <cstring>
#include <type_traits>

#include "coordinate_mlp.cuh"
#include "lattice.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace hyperconv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneElements = kTileElements / 32;

// The residues of the bands [depth, height, width].
struct Residues {
  int axis[3];

  __device__ __forceinline__ Residues(const Lattice& map, int band) {
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      axis[d] = band % map.axis[d].bands;
      band /= map.axis[d].bands;
    }
  }
};

// Index of the kernel tap at which output `t` of a unit meets position `l` of its patch; -1 for none.
__device__ __forceinline__ int tap_index(const Lattice& map, const Residues& residue, int l, int t) {
  bool meets = l < map.patch();
  int tap = 0, stride = 1;
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const Axis& a = map.axis[d];
    const int at = tap_at(a, residue.axis[d], l % a.patch, t % a.unit);
    meets = meets && at >= 0;
    tap += at * stride;
    stride *= a.kernel;
    l /= a.patch;
    t /= a.unit;
  }
  return meets ? tap : -1;
}

// The power of two above `sum`, with room for the rounding of its terms; 1 if there is nothing to scale by.
__device__ __forceinline__ float power_above(float sum) {
  sum *= 1.0f + 1.0f / 512;
  uint32_t bits;
  memcpy(&bits, &sum, 4);
  const uint32_t exponent = bits >> 23;
  if (exponent == 0 || exponent > 250) return 1.0f;
  bits = (exponent + 1) << 23;
  memcpy(&sum, &bits, 4);
  return sum;
}

// What a whole warp divides function `rank` of the first product's factor by, so that the product does not
// exceed its other factor: phi by its sum of magnitudes over the taps, A by the largest one over outputs.
__device__ __forceinline__ float scale_of(const Lattice& map, const PrepareArguments& p, int64_t rank) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  if (p.bands) {
    const float* basis = p.basis + rank * map.taps();
    for (int k = lane; k < map.taps(); k += 32) sum += fabsf(basis[k]);
    for (int m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(kAll, sum, m);
  } else {
    for (int i = lane; i < p.norm_rows; i += 32) sum = fmaxf(sum, p.norms[i * p.rank + rank]);
    for (int m = 16; m > 0; m /= 2) sum = fmaxf(sum, __shfl_xor_sync(kAll, sum, m));
  }
  return power_above(sum);
}

// Number, among a lane's pairs, of that in half `row` of a tile's rows and half `column` of its columns.
__device__ __forceinline__ int pair_number(bool transposed, int row, int column) {
  return transposed ? column + 2 * row : row + 2 * column;
}

// Tile `index` / 32 of the bands [bands, R, chunks]: rows are the outputs t of a unit, columns 16
// positions l of its patch, elements phi_r at the tap where they meet. kZeros: those that meet none alone.
template <class N, bool kZeros>
__device__ void write_band(const Lattice& map, const PrepareArguments& p, int64_t index) {
  using Element = typename N::Element;
  const int lane = index % 32, g = lane / 4, t = lane % 4;
  const int64_t tile = index / 32;
  const int chunk = tile % map.chunks();
  const int64_t rank = tile / map.chunks() % p.rank;
  const Residues residue(map, static_cast<int>(tile / map.chunks() / p.rank));
  const float* basis = p.basis + rank * map.taps();
  float factor = 1.0f;
  if constexpr (kScaled<N>) {
    const float scale = scale_of(map, p, rank);
    factor = 1.0f / scale;
    if (p.scales && tile == rank * map.chunks() && lane == 0) p.scales[rank] = scale;
  }
  Tile<N> result;
  unsigned taken = 0;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int low = m % 2, high = m / 2;
    const int row = p.transposed_bands ? high : low, column = p.transposed_bands ? low : high;
    float value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int l = chunk * 16 + 2 * t + 8 * column + e;
      const int tap = tap_index(map, residue, l, g + 8 * row);
      taken |= static_cast<unsigned>(tap >= 0) << (2 * m + e);
      value[e] = kZeros || tap < 0 ? 0.0f : basis[tap];
      if constexpr (kScaled<N>) value[e] *= factor;
    }
    result.m[m] = N::pair(value[0], value[1]);
  }
  if (!kZeros || taken == 0) {
    static_cast<Tile<N>*>(p.bands)[index] = result;
    return;
  }
  Element* elements = static_cast<Element*>(p.bands) + index * kLaneElements;
  for (int i = 0; i < kLaneElements; ++i) {
    if (!(taken >> i & 1)) elements[i] = ptx::from_float<Element>(0.0f);
  }
}

// Tap k of the MLP, by a warp: phi(k) into the basis [R, K], and into the bands where they meet k.
template <class N, typename T>
__device__ void write_tap(const Lattice& map, const PrepareArguments& p, const MlpArguments& mlp,
                          float* basis, int k) {
  using Element = typename N::Element;
  Features& kept = reinterpret_cast<Features*>(ptx::dynamic_shared())[threadIdx.x / 32];
  evaluate<T>(mlp, k, kept);
  const int lane = threadIdx.x % 32, features = mlp.widths[mlp.layers];
  const float* feature = kept.value(mlp.layers);
  const auto phi = [&](int r) { return r < features ? feature[r] : 1.0f; };
  for (int r = lane; r < p.rank; r += 32) basis[static_cast<int64_t>(r) * mlp.taps + k] = phi(r);
  for (int band = 0; band < map.bands(); ++band) {
    const Residues residue(map, band);
    int first[3];
    bool meets = true;
    int tap = k;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const Axis& a = map.axis[d];
      first[d] = position_of(a, residue.axis[d], tap % a.kernel);
      meets = meets && first[d] >= 0;
      tap /= a.kernel;
    }
    if (!meets) continue;
    for (int i = lane; i < kUnit * p.rank; i += 32) {
      const int row = i % kUnit, rank = i / kUnit;
      int t = row, l = 0, stride = 1;
#pragma unroll
      for (int d = 2; d >= 0; --d) {
        const Axis& a = map.axis[d];
        l += (first[d] + a.stride * (t % a.unit)) * stride;
        stride *= a.patch;
        t /= a.unit;
      }
      const int column = l % 16, holder = row % 8 * 4 + column % 8 / 2;
      const int64_t tile = (static_cast<int64_t>(band) * p.rank + rank) * map.chunks() + l / 16;
      const int pair = pair_number(p.transposed_bands, row / 8, column / 8);
      const int64_t element =
          tile * kTileElements + holder * kLaneElements + 2 * pair + column % 2;
      const typename N::Pair rounded = N::pair(phi(rank), 0.0f);
      memcpy(static_cast<Element*>(p.bands) + element, &rounded, sizeof(Element));
    }
  }
}

// Tile `index` / 32 of the coefficients [groups, in / 16, R, out_tiles]: rows are input channels, columns
// output channels, zero beyond the last of either.
template <class N>
__device__ void write_coefficients(const Lattice& map, const PrepareArguments& p, int64_t index) {
  using Element = typename N::Element;
  const int lane = index % 32, g = lane / 4, t = lane % 4;
  int64_t tile = index / 32;
  const int out = tile % p.out_tiles * 16;
  tile /= p.out_tiles;
  const int rank = tile % p.rank;
  tile /= p.rank;
  const int in = tile % ceil_div(p.in_channels, 16) * 16;
  const int64_t group = tile / ceil_div(p.in_channels, 16);
  const Element* source = static_cast<const Element*>(p.coefficients) + group * p.stride_group +
                          rank * p.stride_rank;
  float factor = 1.0f;
  if constexpr (kScaled<N>) {
    const float scale = scale_of(map, p, rank);
    factor = p.bands ? scale : 1.0f / scale;
    if (p.scales && out + in + group == 0 && lane == 0) p.scales[rank] = scale;
  }
  Tile<N> result;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    float value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = in + 2 * t + 8 * (m % 2) + e, o = out + g + 8 * (m / 2);
      const bool present = i < p.in_channels && o < p.out_channels;
      value[e] = present ? ptx::to_float(source[i * p.stride_in + o * p.stride_out]) : 0.0f;
      if constexpr (kScaled<N>) value[e] *= factor;
    }
    result.m[m] = N::pair(value[0], value[1]);
  }
  static_cast<Tile<N>*>(p.packed)[index] = result;
}

// T: element type of the MLP's parameters, void without an MLP.
template <class N, typename T>
__global__ __launch_bounds__(kThreads) void prepare_kernel(
    const __grid_constant__ Lattice map, const __grid_constant__ PrepareArguments p,
    const __grid_constant__ MlpArguments mlp, float* computed_basis, int tap_blocks,
    int64_t band_lanes, int64_t coefficient_lanes) {
  constexpr bool kHasMlp = !std::is_void_v<T>;
  if constexpr (kHasMlp) {
    if (static_cast<int>(blockIdx.x) < tap_blocks) {
      const int k = blockIdx.x * kWarps + threadIdx.x / 32;
      if (k < mlp.taps) write_tap<N, T>(map, p, mlp, computed_basis, k);
      return;
    }
  }
  const int64_t block = static_cast<int64_t>(blockIdx.x) - tap_blocks;
  const int64_t index = block * kThreads + threadIdx.x;
  if (index < band_lanes) {
    write_band<N, kHasMlp>(map, p, index);
  } else if (index < band_lanes + coefficient_lanes) {
    write_coefficients<N>(map, p, index - band_lanes);
  }
}

template <class N, typename T>
Status launch_prepare(const Lattice& map, const PrepareArguments& p, const MlpArguments& mlp,
                           float* computed_basis, cudaStream_t stream) {
  const int64_t bands = static_cast<int64_t>(map.bands()) * p.rank * map.chunks() * 32;
  const int64_t coefficients = static_cast<int64_t>(p.groups) * ceil_div(p.in_channels, 16) *
                               p.rank * p.out_tiles * 32;
  const int64_t band_lanes = p.bands ? bands : 0;
  const int64_t coefficient_lanes = p.coefficients ? coefficients : 0;
  const int tap_blocks = std::is_void_v<T> ? 0 : ceil_div(mlp.taps, kWarps);
  const int64_t blocks = tap_blocks + (band_lanes + coefficient_lanes + kThreads - 1) / kThreads;
  const int shared = std::is_void_v<T> ? 0 : kWarps * static_cast<int>(sizeof(Features));
  return launch<prepare_kernel<N, T>>(blocks, kThreads, shared, stream, map, p, mlp, computed_basis,
                                      tap_blocks, band_lanes, coefficient_lanes);
}

// Sizes of the operands in cores. `ranks`: functions of all packs, the last ones zero; `outputs`: together.
struct Cores {
  int pack, ranks, steps, patch_width, outputs;
};

// The eight numbers of row `index` of the bands [packs, steps, 2, pack, 16 t]; a warp's are of one function.
template <class N>
__device__ void write_band_row(const Lattice& map, const PrepareArguments& p, const Cores& cores,
                               int64_t index) {
  using Element = typename N::Element;
  const int t = index % 16, half = index / 16 % 2, rank = index / 32 % cores.ranks;
  const int step = static_cast<int>(index / 32 / cores.ranks);
  const Axis &height = map.axis[1], &width = map.axis[2];
  float factor = 1.0f;
  if constexpr (kScaled<N>) {
    if (rank < p.rank) {
      const float scale = scale_of(map, p, rank);
      factor = 1.0f / scale;
      if (p.scales && step == 0 && index % 32 == 0) p.scales[rank] = scale;
    }
  }
  struct alignas(16) Row {
    Element e[8];
  } row;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int l = step * 16 + half * 8 + e;
    const int h = tap_at(height, 0, l / cores.patch_width, t / width.unit);
    const int w = tap_at(width, 0, l % cores.patch_width, t % width.unit);
    const bool meets = rank < p.rank && h >= 0 && w >= 0;
    const float phi = meets ? p.basis[static_cast<int64_t>(rank) * map.taps() + h * width.kernel + w] : 0.0f;
    row.e[e] = ptx::from_float<Element>(phi * factor);
  }
  const int64_t slice = (static_cast<int64_t>(rank / cores.pack) * cores.steps + step) * 2 + half;
  const int64_t at = (slice * cores.pack + rank % cores.pack) * 16 + t;
  static_cast<Row*>(p.bands)[at] = row;
}

// That of the coefficients [out / outputs, in / 16, ranks, 2, outputs].
template <class N>
__device__ void write_coefficient_row(const Lattice& map, const PrepareArguments& p, const Cores& cores,
                                      int64_t index) {
  using Element = typename N::Element;
  const int half = index / cores.outputs % 2, blocks = p.in_channels / 16;
  const int64_t item = index / cores.outputs / 2, block = item / cores.ranks;
  const int rank = item % cores.ranks, in = static_cast<int>(block % blocks) * 16 + half * 8;
  const int out = static_cast<int>(block / blocks) * cores.outputs + index % cores.outputs;
  const Element* source =
      static_cast<const Element*>(p.coefficients) + rank * p.stride_rank + out * p.stride_out;
  float factor = 1.0f;
  if constexpr (kScaled<N>) {
    if (rank < p.rank) {
      const float scale = scale_of(map, p, rank);
      factor = p.bands ? scale : 1.0f / scale;
      if (p.scales && in + out == 0) p.scales[rank] = scale;
    }
  }
  struct alignas(16) Row {
    Element e[8];
  } row;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float value = rank < p.rank ? ptx::to_float(source[(in + e) * p.stride_in]) : 0.0f;
    row.e[e] = ptx::from_float<Element>(value * factor);
  }
  static_cast<Row*>(p.packed)[index] = row;
}

template <class N>
__global__ __launch_bounds__(kThreads) void prepare_cores_kernel(
    const __grid_constant__ Lattice map, const __grid_constant__ PrepareArguments p,
    const __grid_constant__ Cores cores, int64_t band_rows, int64_t coefficient_rows) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < band_rows) {
    write_band_row<N>(map, p, cores, index);
  } else if (index < band_rows + coefficient_rows) {
    write_coefficient_row<N>(map, p, cores, index - band_rows);
  }
}

template <class N>
Status launch_prepare_cores(const Lattice& map, const PrepareArguments& p, const Cores& cores,
                            cudaStream_t stream) {
  if (p.groups != 1 || p.in_channels % 16 != 0 || p.out_channels % cores.outputs != 0) return kUnknownPlan;
  const int64_t band_rows = p.bands ? static_cast<int64_t>(cores.steps) * 2 * cores.ranks * 16 : 0;
  const int64_t coefficient_rows =
      static_cast<int64_t>(p.in_channels / 16) * cores.ranks * 2 * p.out_channels;
  const int64_t blocks = (band_rows + coefficient_rows + kThreads - 1) / kThreads;
  return launch<prepare_cores_kernel<N>>(blocks, kThreads, 0, stream, map, p, cores, band_rows,
                                         coefficient_rows);
}

}  // namespace

Status prepare_cores(Number number, const Lattice& map, const PrepareArguments& p, int outputs, int pack,
                     int steps, int patch_width, cudaStream_t stream) {
  const Cores cores = {pack, ceil_div(p.rank, pack) * pack, steps, patch_width, outputs};
  if (number == Number::kHalf) return launch_prepare_cores<Half<__half>>(map, p, cores, stream);
  if (number == Number::kBfloat16) return launch_prepare_cores<Half<__nv_bfloat16>>(map, p, cores, stream);
  return kUnknownPlan;
}

Status prepare(Number number, const Lattice& map, const PrepareArguments& p,
               cudaStream_t stream) {
  return with_number(number, [&](auto n) {
    return launch_prepare<decltype(n), void>(map, p, MlpArguments{}, nullptr, stream);
  });
}

Status prepare_from_mlp(Number number, const Lattice& map, const PrepareArguments& p,
                        const MlpArguments& mlp, bool wide, float* basis, cudaStream_t stream) {
  return with_number(number, [&](auto n) -> Status {
    using N = decltype(n);
    if constexpr (kScaled<N>) {
      return kUnknownPlan;  // no block knows the sum over all taps
    } else {
      return wide ? launch_prepare<N, float>(map, p, mlp, basis, stream)
                  : launch_prepare<N, typename N::Element>(map, p, mlp, basis, stream);
    }
  });
}

}  // namespace hyperconv
