// z = phi * x of one warp's units, for 16 input channels and a few basis functions, in registers.
#pragma once

#include "staging.cuh"

namespace hyperconv {

// Units of a warp. With one, each band read from shared memory would serve one product only, and shared
// memory would be busier than the tensor cores.
constexpr int kUnits = 2;

__device__ __forceinline__ int unit_of_warp(int m) { return threadIdx.x / 32 * kUnits + m; }

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

  // Adds the products with `chunks` 16-row tiles of the patch; `table` begins at the first of them.
  // `bands`: their tiles for the first basis function; for the next ones `stride` tiles further each.
  template <class N, bool kTransposed>
  __device__ __forceinline__ void accumulate(const Lattice& map, const Halo<N>& halo,
                                             const int* table, int chunks,
                                             const typename N::Element* bands, int stride,
                                             int ranks) {
    int first[kUnits];
#pragma unroll
    for (int m = 0; m < kUnits; ++m) first[m] = unit_halo(map, unit_of_warp(m));
    const int zero = map.halo();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      Tile<N> patch[kUnits];
#pragma unroll
      for (int m = 0; m < kUnits; ++m) {
        patch[m] = load_trans<N>(halo, PatchRows{table + chunk * 16, first[m], zero}, 0);
      }
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (j < ranks) {
          const auto band = load_packed<N>(bands + (j * stride + chunk) * kTileElements);
#pragma unroll
          for (int m = 0; m < kUnits; ++m) {
            if constexpr (kTransposed) {
              multiply<N, Along::kRows, Along::kColumns>(z[m][j], patch[m], band);
            } else {
              multiply<N, Along::kColumns, Along::kRows>(z[m][j], band, patch[m]);
            }
          }
        }
      }
    }
  }
};

}  // namespace hyperconv
