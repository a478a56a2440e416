// Matrix products of packed operands: c[m][n] += sum_l a(m, l) b[l][n].
#pragma once
#include "vec.h"

namespace hyperconv {
namespace {

// MR rows by NV vectors of columns in registers; a(m, l) = a[m * am + l * al].
template <class T, int MR, int NV>
void product_block(int64_t length, const T* a, int64_t am, int64_t al, const T* b, int64_t bl, T* c,
                   int64_t cm) {
  constexpr int V = kLanes<T>;
  Vec<T> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = load(c + m * cm + n * V);
  for (int64_t l = 0; l < length; ++l) {
    Vec<T> row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load(b + l * bl + n * V);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> value = broadcast(a[m * am + l * al]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] += value * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * cm + n * V, sum[m][n]);
}

template <class T, int MR, int NV>
void product_rows(int64_t rows, int64_t length, const T* a, int64_t am, int64_t al, const T* b,
                  int64_t bl, T* c, int64_t cm) {
  for (; rows >= MR; rows -= MR, a += MR * am, c += MR * cm)
    product_block<T, MR, NV>(length, a, am, al, b, bl, c, cm);
  if constexpr (MR > 1) {
    constexpr int kNext = MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
    if (rows) product_rows<T, kNext, NV>(rows, length, a, am, al, b, bl, c, cm);
  }
}

// Rows that fill the registers beside NV columns.
template <int NV>
constexpr int kRowsBeside = kRegisters == 32 ? (NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 14)
                                             : (NV == 2 ? 6 : 8);
constexpr int kMostColumns = kRegisters == 32 ? 4 : 2;

// `columns` counts vectors. Rows go by panels, lest a and c leave the cache between two columns.
template <class T>
void product(int64_t rows, int columns, int64_t length, const T* a, int64_t am, int64_t al, const T* b,
             int64_t bl, T* c, int64_t cm) {
  constexpr int V = kLanes<T>;
  constexpr int64_t kPanel = 96;
  for (int64_t m = 0; m < rows; m += kPanel) {
    const int64_t height = rows - m < kPanel ? rows - m : kPanel;
    const T* am0 = a + m * am;
    for (int n = 0; n < columns;) {
      const int left = columns - n;
      const int width = left >= 2 * kMostColumns || left <= kMostColumns
                            ? (left < kMostColumns ? left : kMostColumns)
                            : (left + 1) / 2;
      const T* bn = b + static_cast<int64_t>(n) * V;
      T* cn = c + m * cm + static_cast<int64_t>(n) * V;
      switch (width) {
        case 1:
          product_rows<T, kRowsBeside<1>, 1>(height, length, am0, am, al, bn, bl, cn, cm);
          break;
        case 2:
          product_rows<T, kRowsBeside<2>, 2>(height, length, am0, am, al, bn, bl, cn, cm);
          break;
        default:
          if constexpr (kMostColumns == 4) {
            if (width == 3)
              product_rows<T, kRowsBeside<3>, 3>(height, length, am0, am, al, bn, bl, cn, cm);
            else
              product_rows<T, kRowsBeside<4>, 4>(height, length, am0, am, al, bn, bl, cn, cm);
          }
      }
      n += width;
    }
  }
}

}  // namespace
}  // namespace hyperconv
