// Matrix products of packed operands: c[m][n] += sum_l a(m, l) b[l][n].
#pragma once
#include "vec.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace hyperconv {
namespace {

// What l counts: numbers as they are.
template <class T>
struct Singles {
  using Number = T;
  using Sum = T;
  using Sums = Vec<T>;
  using Row = Vec<T>;
  static Row row(const T* b) { return load(b); }
  static Sums add(Sums sum, T a, Row b) { return sum + broadcast(a) * b; }
};

// Or pairs of numbers rounded to bfloat16, multiplied and summed in float by one instruction, where the
// level has it.
template <class T>
struct Pairs {
  static constexpr bool kThere = false;
};
#ifdef __AVX512BF16__
template <>
struct Pairs<float> {
  static constexpr bool kThere = true;
  using Number = uint32_t;
  using Sum = float;
  using Sums = __m512;
  using Row = __m512bh;
  static Row row(const uint32_t* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Sums add(Sums sum, uint32_t a, Row b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
  }

  // Neighbours of `count` numbers, a multiple of 16.
  static void join(const float* from, int64_t count, uint32_t* to) {
    for (; count >= 32; count -= 32, from += 32, to += 16)
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + 16), (__m512)load(from)));
    if (count) _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)load(from)));
  }
  // Rows l and l + 1 of `rows`, of `width` numbers, a multiple of 16; zeros after the last.
  static void join_rows(const float* from, int64_t rows, int64_t width, uint32_t* to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t l = 0; l < rows; l += 2, from += 2 * width, to += width) {
      for (int64_t n = 0; n < width; n += 16) {
        const Vec<float> next = l + 1 < rows ? load(from + width + n) : Vec<float>{};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)load(from + n));
        _mm512_storeu_si512(to + n, _mm512_permutexvar_epi16(order, both));
      }
    }
  }
};
#endif

// MR rows by NV vectors of columns in registers; a(m, l) = a[m * am + l * al].
template <class P, int MR, int NV>
void product_block(int64_t length, const typename P::Number* a, int64_t am, int64_t al,
                   const typename P::Number* b, int64_t bl, typename P::Sum* c, int64_t cm) {
  constexpr int V = kLanes<typename P::Sum>;
  typename P::Sums sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = (typename P::Sums)load(c + m * cm + n * V);
  for (int64_t l = 0; l < length; ++l) {
    typename P::Row row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = P::row(b + l * bl + n * V);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename P::Number value = a[m * am + l * al];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] = P::add(sum[m][n], value, row[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * cm + n * V, (Vec<typename P::Sum>)sum[m][n]);
}

template <class P, int MR, int NV>
void product_rows(int64_t rows, int64_t length, const typename P::Number* a, int64_t am, int64_t al,
                  const typename P::Number* b, int64_t bl, typename P::Sum* c, int64_t cm) {
  for (; rows >= MR; rows -= MR, a += MR * am, c += MR * cm)
    product_block<P, MR, NV>(length, a, am, al, b, bl, c, cm);
  if constexpr (MR > 1) {
    constexpr int kNext = MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
    if (rows) product_rows<P, kNext, NV>(rows, length, a, am, al, b, bl, c, cm);
  }
}

// Rows that fill the registers beside NV columns.
template <int NV>
constexpr int kRowsBeside = kRegisters == 32 ? (NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 14)
                                             : (NV == 2 ? 6 : 8);
constexpr int kMostColumns = kRegisters == 32 ? 4 : 2;

// `columns` counts vectors. Rows go by panels, lest a and c leave the cache between two columns.
template <class P>
void product(int64_t rows, int columns, int64_t length, const typename P::Number* a, int64_t am,
             int64_t al, const typename P::Number* b, int64_t bl, typename P::Sum* c, int64_t cm) {
  constexpr int V = kLanes<typename P::Sum>;
  constexpr int64_t kPanel = 96;
  for (int64_t m = 0; m < rows; m += kPanel) {
    const int64_t height = rows - m < kPanel ? rows - m : kPanel;
    const typename P::Number* am0 = a + m * am;
    for (int n = 0; n < columns;) {
      const int left = columns - n;
      const int width = left >= 2 * kMostColumns || left <= kMostColumns
                            ? (left < kMostColumns ? left : kMostColumns)
                            : (left + 1) / 2;
      const typename P::Number* bn = b + static_cast<int64_t>(n) * V;
      typename P::Sum* cn = c + m * cm + static_cast<int64_t>(n) * V;
      switch (width) {
        case 1:
          product_rows<P, kRowsBeside<1>, 1>(height, length, am0, am, al, bn, bl, cn, cm);
          break;
        case 2:
          product_rows<P, kRowsBeside<2>, 2>(height, length, am0, am, al, bn, bl, cn, cm);
          break;
        default:
          if constexpr (kMostColumns == 4) {
            if (width == 3)
              product_rows<P, kRowsBeside<3>, 3>(height, length, am0, am, al, bn, bl, cn, cm);
            else
              product_rows<P, kRowsBeside<4>, 4>(height, length, am0, am, al, bn, bl, cn, cm);
          }
      }
      n += width;
    }
  }
}

}  // namespace
}  // namespace hyperconv
