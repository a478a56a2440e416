// z and the gradient of phi, tap by tap, of a patch of kLanes channels.
#pragma once
#include "vec.h"

namespace hyperconv {
namespace {

// A block of positions and the patch that they read: along an axis position p meets tap j at patch
// position p * stride + j.
struct Patch {
  int positions[3], stride[3], length[3], taps[3];
};

// Positions and functions that fill the registers.
constexpr int kStep = kRegisters == 32 ? 4 : 2;
constexpr int kFunctions = kRegisters == 32 ? 6 : 5;

// z[p][r] = sum_j phi[j][r] patch[p * stride + j] for NR functions of `rank`. phi's taps are `pitch` apart
// along the first two axes.
template <class T, int NR>
void responses(const Patch& s, const T* patch, const T* phi, const int64_t* pitch, int rank, T* z) {
  constexpr int V = kLanes<T>;
  const int64_t step = static_cast<int64_t>(s.stride[2]) * V;
  for (int d = 0; d < s.positions[0]; ++d) {
    for (int h = 0; h < s.positions[1]; ++h) {
      for (int w = 0; w < s.positions[2]; w += kStep) {
        Vec<T> sum[NR][kStep] = {};
        for (int jd = 0; jd < s.taps[0]; ++jd) {
          for (int jh = 0; jh < s.taps[1]; ++jh) {
            const int64_t row = static_cast<int64_t>(d * s.stride[0] + jd) * s.length[1] +
                                h * s.stride[1] + jh;
            const T* x = patch + (row * s.length[2] + w * s.stride[2]) * V;
            const T* f = phi + jd * pitch[0] + jh * pitch[1];
            for (int jw = 0; jw < s.taps[2]; ++jw, x += V, f += rank) {
              Vec<T> v[kStep];
#pragma GCC unroll 4
              for (int i = 0; i < kStep; ++i) v[i] = load(x + i * step);
#pragma GCC unroll 8
              for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < kStep; ++i) sum[r][i] += v[i] * f[r];
            }
          }
        }
        const int kept = s.positions[2] - w;
#pragma GCC unroll 4
        for (int i = 0; i < kStep; ++i) {
          if (i >= kept) break;
#pragma GCC unroll 8
          for (int r = 0; r < NR; ++r) store(z + r * V, sum[r][i]);
          z += static_cast<int64_t>(rank) * V;
        }
      }
    }
  }
}

// sums[q][r] += sum_p u[p][r] patch[p * stride + j + q] for NQ taps along the last axis and NR functions;
// a tap's sums are `pitch` apart. Lanes are kept apart.
template <class T, int NQ, int NR>
void tap_sums(const Patch& s, const T* patch, const T* u, int rank, T* sums, int64_t pitch) {
  constexpr int V = kLanes<T>;
  Vec<T> sum[NQ][NR];
#pragma GCC unroll 4
  for (int q = 0; q < NQ; ++q)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) sum[q][r] = load(sums + q * pitch + r * V);
  for (int d = 0; d < s.positions[0]; ++d) {
    for (int h = 0; h < s.positions[1]; ++h) {
      const int64_t row = static_cast<int64_t>(d * s.stride[0]) * s.length[1] + h * s.stride[1];
      const T* x = patch + row * s.length[2] * V;
      for (int w = 0; w < s.positions[2]; ++w) {
        Vec<T> v[NQ];
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) v[q] = load(x + q * V);
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) {
          const Vec<T> value = load(u + r * V);
#pragma GCC unroll 4
          for (int q = 0; q < NQ; ++q) sum[q][r] += value * v[q];
        }
        x += static_cast<int64_t>(s.stride[2]) * V;
        u += static_cast<int64_t>(rank) * V;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < NQ; ++q)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) store(sums + q * pitch + r * V, sum[q][r]);
}

// All functions, as many at a time as the registers hold, evenly.
template <class T>
void all_responses(const Patch& s, const T* patch, const T* phi, const int64_t* pitch, int rank, T* z) {
  int passes = (rank + kFunctions - 1) / kFunctions;
  for (int r = 0; r < rank; --passes) {
    const int n = (rank - r + passes - 1) / passes;
    T* to = z + r * kLanes<T>;
    switch (n) {
      case 1:
        responses<T, 1>(s, patch, phi + r, pitch, rank, to);
        break;
      case 2:
        responses<T, 2>(s, patch, phi + r, pitch, rank, to);
        break;
      case 3:
        responses<T, 3>(s, patch, phi + r, pitch, rank, to);
        break;
      case 4:
        responses<T, 4>(s, patch, phi + r, pitch, rank, to);
        break;
      case 5:
        responses<T, 5>(s, patch, phi + r, pitch, rank, to);
        break;
      default:
        if constexpr (kFunctions == 6) responses<T, 6>(s, patch, phi + r, pitch, rank, to);
    }
    r += n;
  }
}

template <class T, int NQ>
void tap_sums_of(const Patch& s, const T* patch, const T* u, int rank, T* sums, int64_t pitch) {
  constexpr int V = kLanes<T>;
  int passes = (rank + kFunctions - 1) / kFunctions;
  for (int r = 0; r < rank; --passes) {
    const int n = (rank - r + passes - 1) / passes;
    const T* from = u + r * V;
    T* to = sums + r * V;
    switch (n) {
      case 1:
        tap_sums<T, NQ, 1>(s, patch, from, rank, to, pitch);
        break;
      case 2:
        tap_sums<T, NQ, 2>(s, patch, from, rank, to, pitch);
        break;
      case 3:
        tap_sums<T, NQ, 3>(s, patch, from, rank, to, pitch);
        break;
      case 4:
        tap_sums<T, NQ, 4>(s, patch, from, rank, to, pitch);
        break;
      case 5:
        tap_sums<T, NQ, 5>(s, patch, from, rank, to, pitch);
        break;
      default:
        if constexpr (kFunctions == 6) tap_sums<T, NQ, 6>(s, patch, from, rank, to, pitch);
    }
    r += n;
  }
}

// sums[tap of j][r] += sum_p u[p][r] patch[p * stride + j] for all taps of the patch; sums are `pitch`
// apart along the three axes.
template <class T>
void all_tap_sums(const Patch& s, const T* patch, const T* u, int rank, T* sums, const int64_t* pitch) {
  for (int jd = 0; jd < s.taps[0]; ++jd) {
    for (int jh = 0; jh < s.taps[1]; ++jh) {
      const T* row = patch + (static_cast<int64_t>(jd) * s.length[1] + jh) * s.length[2] * kLanes<T>;
      T* to = sums + jd * pitch[0] + jh * pitch[1];
      for (int jw = 0; jw < s.taps[2];) {
        const int left = s.taps[2] - jw;
        const int n = left > kStep ? kStep : left;
        const T* x = row + static_cast<int64_t>(jw) * kLanes<T>;
        T* at = to + jw * pitch[2];
        if (n == 1) {
          tap_sums_of<T, 1>(s, x, u, rank, at, pitch[2]);
        } else if (n == 2) {
          tap_sums_of<T, 2>(s, x, u, rank, at, pitch[2]);
        } else if constexpr (kStep == 4) {
          if (n == 3) tap_sums_of<T, 3>(s, x, u, rank, at, pitch[2]);
          else tap_sums_of<T, 4>(s, x, u, rank, at, pitch[2]);
        }
        jw += n;
      }
    }
  }
}

}  // namespace
}  // namespace hyperconv
