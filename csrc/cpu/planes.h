// z and the gradients where source channels are few: lanes are neighbouring positions of one channel, so
// that none is idle. Positions are padded to whole vectors along the last axis, [channel][d][h][w].
#pragma once
#include "taps.h"
#include "vec.h"

namespace hyperconv {
namespace {

// The patch of one channel: rows of a plane for each residue of the last axis modulo the stride there, so
// that neighbouring positions read neighbours. Position (d, h, w) meets tap (jd, jh, jw) at
// row (d * stride + jd, h * stride + jh), plane jw % stride, number w + jw / stride.
struct Planes {
  Patch patch;
  int vectors;     // of positions along the last axis
  int64_t pitch;   // numbers of a plane's row
  int64_t size() const {
    return int64_t{1} * patch.length[0] * patch.length[1] * patch.stride[2] * pitch;
  }
  int64_t count() const { return int64_t{1} * patch.positions[0] * patch.positions[1] * vectors; }
  int64_t row(int64_t d, int64_t h) const {
    return (d * patch.length[1] + h) * patch.stride[2] * pitch;
  }
  int64_t tap(int jd, int jh, int jw) const {
    return row(jd, jh) + jw % patch.stride[2] * pitch + jw / patch.stride[2];
  }
  // Where vector n of positions begins in the patch.
  int64_t origin(int64_t n, int lanes) const {
    const int64_t w = n % vectors, h = n / vectors % patch.positions[1], d = n / vectors / patch.positions[1];
    return row(d * patch.stride[0], h * patch.stride[1]) + w * lanes;
  }
};

// z[r][position] of one channel for NR functions; phi's taps are `pitch` apart along the first two axes.
template <class T, int NR>
void plane_responses(const Planes& s, const T* patch, const T* phi, const int64_t* pitch, int rank, T* z) {
  constexpr int V = kLanes<T>;
  const int64_t count = s.count();
  for (int64_t n = 0; n < count; n += kStep) {
    const int kept = count - n < kStep ? static_cast<int>(count - n) : kStep;
    const T* x[kStep];
    for (int i = 0; i < kStep; ++i) x[i] = patch + s.origin(n + (i < kept ? i : 0), V);
    Vec<T> sum[NR][kStep] = {};
    for (int jd = 0; jd < s.patch.taps[0]; ++jd) {
      for (int jh = 0; jh < s.patch.taps[1]; ++jh) {
        const T* f = phi + jd * pitch[0] + jh * pitch[1];
        for (int jw = 0; jw < s.patch.taps[2]; ++jw, f += rank) {
          const int64_t at = s.tap(jd, jh, jw);
          Vec<T> v[kStep];
#pragma GCC unroll 4
          for (int i = 0; i < kStep; ++i) v[i] = load(x[i] + at);
#pragma GCC unroll 8
          for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kStep; ++i) sum[r][i] += v[i] * f[r];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
      if (i >= kept) break;
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) store(z + (r * count + n + i) * V, sum[r][i]);
    }
  }
}

// sums[r] += sum over positions of u[r][position] times what they meet at `at`, for NR functions; lanes
// are kept apart.
template <class T, int NR>
void plane_tap_sums(const Planes& s, const T* patch, const T* u, int64_t at, T* sums) {
  constexpr int V = kLanes<T>;
  const int64_t count = s.count();
  Vec<T> sum[NR];
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) sum[r] = load(sums + r * V);
  int64_t n = 0;
  for (int d = 0; d < s.patch.positions[0]; ++d) {
    for (int h = 0; h < s.patch.positions[1]; ++h) {
      const T* x = patch + s.row(d * s.patch.stride[0], h * s.patch.stride[1]) + at;
      for (int w = 0; w < s.vectors; ++w, ++n) {
        const Vec<T> v = load(x + w * V);
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) sum[r] += v * load(u + (r * count + n) * V);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) store(sums + r * V, sum[r]);
}

template <class T>
struct PlaneResponses {
  const Planes& s;
  const T *patch, *phi;
  const int64_t* pitch;
  int rank;
  T* z;
  template <int NR>
  void of(int r) const {
    plane_responses<T, NR>(s, patch, phi + r, pitch, rank, z + r * s.count() * kLanes<T>);
  }
};

template <class T>
struct PlaneTapSums {
  const Planes& s;
  const T *patch, *u;
  int64_t at;
  T* sums;
  template <int NR>
  void of(int r) const {
    constexpr int V = kLanes<T>;
    plane_tap_sums<T, NR>(s, patch, u + r * s.count() * V, at, sums + r * V);
  }
};

// sums[m][n] += the sum over positions of a[m] b[n]; rows are `count` vectors.
template <class T>
void plane_products(int rows, int columns, int64_t count, const T* a, const T* b, T* sums) {
  constexpr int V = kLanes<T>, kRows = kRegisters == 32 ? 4 : 2, kColumns = kRegisters == 32 ? 6 : 4;
  for (int m = 0; m < rows; m += kRows) {
    for (int n = 0; n < columns; n += kColumns) {
      Vec<T> sum[kRows][kColumns] = {};
      const T *left[kRows], *right[kColumns];  // the last ones again where there are fewer
      for (int i = 0; i < kRows; ++i) left[i] = a + (m + i < rows ? m + i : rows - 1) * count * V;
      for (int j = 0; j < kColumns; ++j)
        right[j] = b + (n + j < columns ? n + j : columns - 1) * count * V;
      for (int64_t p = 0; p < count * V; p += V) {
        Vec<T> v[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) v[i] = load(left[i] + p);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          const Vec<T> w = load(right[j] + p);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum[i][j] += v[i] * w;
        }
      }
      for (int i = 0; i < kRows && m + i < rows; ++i) {
        for (int j = 0; j < kColumns && n + j < columns; ++j) {
          T total = 0;
          for (int l = 0; l < V; ++l) total += sum[i][j][l];
          sums[static_cast<int64_t>(m + i) * columns + n + j] += total;
        }
      }
    }
  }
}

}  // namespace
}  // namespace hyperconv
