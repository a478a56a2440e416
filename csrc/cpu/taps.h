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

// Calls f with a number of functions from 1 to kFunctions as a constant, for all of them in turn: f.of<NR>
// (first function).
template <class F>
void by_functions(int rank, const F& f) {
  int passes = (rank + kFunctions - 1) / kFunctions;
  for (int r = 0; r < rank; --passes) {
    const int n = (rank - r + passes - 1) / passes;
    switch (n) {
      case 1:
        f.template of<1>(r);
        break;
      case 2:
        f.template of<2>(r);
        break;
      case 3:
        f.template of<3>(r);
        break;
      case 4:
        f.template of<4>(r);
        break;
      case 5:
        f.template of<5>(r);
        break;
      default:
        if constexpr (kFunctions == 6) f.template of<6>(r);
    }
    r += n;
  }
}

template <class T>
struct Responses {
  const Patch& s;
  const T *patch, *phi;
  const int64_t* pitch;
  int rank;
  T* z;
  template <int NR>
  void of(int r) const {
    responses<T, NR>(s, patch, phi + r, pitch, rank, z + r * kLanes<T>);
  }
};

template <class T, int NQ>
struct TapSums {
  const Patch& s;
  const T *patch, *u;
  int rank;
  T* sums;
  int64_t pitch;
  template <int NR>
  void of(int r) const {
    tap_sums<T, NQ, NR>(s, patch, u + r * kLanes<T>, rank, sums + r * kLanes<T>, pitch);
  }
};

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
          by_functions(rank, TapSums<T, 1>{s, x, u, rank, at, pitch[2]});
        } else if (n == 2) {
          by_functions(rank, TapSums<T, 2>{s, x, u, rank, at, pitch[2]});
        } else if constexpr (kStep == 4) {
          if (n == 3) by_functions(rank, TapSums<T, 3>{s, x, u, rank, at, pitch[2]});
          else by_functions(rank, TapSums<T, 4>{s, x, u, rank, at, pitch[2]});
        }
        jw += n;
      }
    }
  }
}

}  // namespace
}  // namespace hyperconv
