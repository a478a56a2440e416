// One small launch before each convolution kernel: phi as banded matrices and the coefficients, both as
// the packed tiles of tile.cuh, so that the kernels that follow load whole operands 16 bytes at a time.
#include "lattice.cuh"
#include "launch.cuh"

namespace hyperconv {
namespace {

constexpr int kThreads = 256;

// Tile `index` / 32 of the bands [bands, R, chunks]: rows are the outputs t of a unit, columns 16
// positions l of its patch, elements phi_r at the tap where they meet.
template <class N>
__device__ void write_band(const Lattice& map, const PrepareArguments& p, int64_t index) {
  const int lane = index % 32, g = lane / 4, t = lane % 4;
  const int64_t tile = index / 32;
  const int chunk = tile % map.chunks();
  const int rank = tile / map.chunks() % p.rank;
  int band = static_cast<int>(tile / map.chunks() / p.rank);
  int residue[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    residue[d] = band % map.axis[d].modulus;
    band /= map.axis[d].modulus;
  }
  Tile<N> result;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    float value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int row = g + 8 * (m % 2), l = chunk * 16 + 2 * t + 8 * (m / 2) + e;
      bool meets = l < map.patch();
      int tap[3];
#pragma unroll
      for (int d = 2; d >= 0; --d) {
        const Axis& a = map.axis[d];
        tap[d] = tap_at(a, residue[d], l % a.patch, row % a.unit);
        meets = meets && tap[d] >= 0;
        l /= a.patch;
        row /= a.unit;
      }
      const int k = (tap[0] * map.axis[1].kernel + tap[1]) * map.axis[2].kernel + tap[2];
      const int taps = map.axis[0].kernel * map.axis[1].kernel * map.axis[2].kernel;
      value[e] = meets ? p.basis[static_cast<int64_t>(rank) * taps + k] : 0.0f;
    }
    result.m[m] = N::pair(value[0], value[1]);
  }
  static_cast<Tile<N>*>(p.bands)[index] = result;
}

// Tile `index` / 32 of the coefficients [groups, in / 16, R, out_tiles]: rows are input channels, columns
// output channels, zero beyond the last of either.
template <class N>
__device__ void write_coefficients(const PrepareArguments& p, int64_t index) {
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
  Tile<N> result;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    float value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = in + 2 * t + 8 * (m % 2) + e, o = out + g + 8 * (m / 2);
      const bool present = i < p.in_channels && o < p.out_channels;
      value[e] = present ? ptx::to_float(source[i * p.stride_in + o * p.stride_out]) : 0.0f;
    }
    result.m[m] = N::pair(value[0], value[1]);
  }
  static_cast<Tile<N>*>(p.packed)[index] = result;
}

template <class N>
__global__ __launch_bounds__(kThreads) void prepare_kernel(const Lattice map,
                                                           const PrepareArguments p,
                                                           int64_t band_lanes,
                                                           int64_t coefficient_lanes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < band_lanes) {
    write_band<N>(map, p, index);
  } else if (index < band_lanes + coefficient_lanes) {
    write_coefficients<N>(p, index - band_lanes);
  }
}

}  // namespace

cudaError_t prepare(Number number, const Lattice& map, const PrepareArguments& p,
                    cudaStream_t stream) {
  const int64_t bands = static_cast<int64_t>(map.bands()) * p.rank * map.chunks() * 32;
  const int64_t coefficients = static_cast<int64_t>(p.groups) * ceil_div(p.in_channels, 16) *
                               p.rank * p.out_tiles * 32;
  const int64_t band_lanes = p.basis ? bands : 0;
  const int64_t coefficient_lanes = p.coefficients ? coefficients : 0;
  const int64_t blocks = (band_lanes + coefficient_lanes + kThreads - 1) / kThreads;
  return with_number(number, [&](auto n) {
    using N = decltype(n);
    return launch(prepare_kernel<N>, blocks, kThreads, 0, stream, map, p, band_lanes,
                  coefficient_lanes);
  });
}

}  // namespace hyperconv
