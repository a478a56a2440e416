// z = phi * x of one warp's units, for 16 input channels and a few basis functions, in registers.
#pragma once

#include <type_traits>

#include "staging.cuh"

namespace hyperconv {

// Units of a warp. With one, each band read from shared memory would serve one product only, and shared
// memory would be busier than the tensor cores.
constexpr int kUnits = 2;

__device__ __forceinline__ int unit_of_warp(int m) { return threadIdx.x / 32 * kUnits + m; }

// Halo positions of the first inputs of a warp's units: a dozen divisions, to be done once.
struct UnitHalos {
  int first[kUnits];

  __device__ __forceinline__ explicit UnitHalos(const Lattice& map) {
#pragma unroll
    for (int m = 0; m < kUnits; ++m) first[m] = unit_halo(map, unit_of_warp(m));
  }
};

// function(count), with `count` a constant: a branch inside the loops over basis functions would make the
// compiler copy their accumulators from register to register.
template <int kMost, class Function>
__device__ __forceinline__ void with_constant(int count, const Function& function) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, function);
  }
  function(std::integral_constant<int, kMost>());
}

// z_r of unit m as a product of two 16x8 halves; [outputs, channels], or transposed.
template <int kRanks>
struct Responses {
  float z[kUnits][kRanks][2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kUnits; ++m) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) z[m][j][i / 4][i % 4] = 0.0f;
      }
    }
  }

  // Adds the products of the first kCount functions with `chunks` 16-row tiles of the patch; `table` begins
  // at the first of them. `bands`: their tiles for the first function; for the next ones `stride` tiles
  // further each. kTransposed: z' = x' band', with tiles of band' as right operands.
  template <class N, bool kTransposed, int kCount>
  __device__ __forceinline__ void accumulate(const Halo<N>& halo, const UnitHalos& units,
                                             const int* table, int chunks,
                                             const typename N::Element* bands, int stride) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      Tile<N> patch[kUnits];
#pragma unroll
      for (int m = 0; m < kUnits; ++m) {
        const PatchRows rows = {table + chunk * 16, units.first[m]};
        patch[m] = kTransposed ? load_left<N, Along::kRows>(halo, rows, 0)
                               : load_right<N, Along::kRows>(halo, rows, 0);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const auto band = load_packed<N>(bands + (j * stride + chunk) * kTileElements);
#pragma unroll
        for (int m = 0; m < kUnits; ++m) {
          multiply<N>(z[m][j], kTransposed ? patch[m] : band, kTransposed ? band : patch[m]);
        }
      }
    }
  }
};

}  // namespace hyperconv
