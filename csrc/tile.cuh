// 16x16 operand tiles and their products, the same for every number format.
//
// A Pair is two neighbours along the inner dimension k. Whatever the format, a lane holds the elements
// that mma.m16n8k16 gives it, g = lane / 4, t = lane % 4:
//
//   left operand  [16, k 16]   a[0] (row g, k 2t)  a[1] (row g + 8, k 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//   right operand [k 16, 8]    b[0] (k 2t, column g)  b[1] (k 2t + 8, column g)
//   product       [16, 8]      c[0], c[1] (row g, columns 2t, 2t + 1)  c[2], c[3] (row g + 8)
//
// so two products side by side are, pair by pair, the left operand of a further one (`chain`). For
// float32 the hardware's k8 products take k in any order that both operands share: 2t for its k = t, and
// 2t + 1 for its k = t + 4.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace hyperconv {

// Whether a format has so few exponents that z or u could overflow where the result does not: `prepare` then
// scales the two factors of a sum by powers of two, one against the other.
template <class N>
constexpr bool kScaled = std::is_same_v<typename N::Element, __half>;

// 16-bit operands, T = __half or __nv_bfloat16.
template <typename T>
struct Half {
  using Element = T;
  using Pair = uint32_t;

  static __device__ __forceinline__ Pair pair(float low, float high) {
    return ptx::pack<T>(low, high);
  }

  static __device__ __forceinline__ void mma(float (&c)[4], const Pair& a0, const Pair& a1,
                                             const Pair& a2, const Pair& a3, const Pair& b0,
                                             const Pair& b1) {
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    ptx::mma_m16n8k16<T>(c, a, b);
  }
};

// float32 operands rounded to TF32.
struct Tf32 {
  using Element = float;
  struct Pair {
    uint32_t low, high;
  };

  static __device__ __forceinline__ Pair pair(float low, float high) {
    return {ptx::to_tf32(low), ptx::to_tf32(high)};
  }

  static __device__ __forceinline__ void mma(float (&c)[4], const Pair& a0, const Pair& a1,
                                             const Pair& a2, const Pair& a3, const Pair& b0,
                                             const Pair& b1) {
    const uint32_t a_low[4] = {a0.low, a1.low, a0.high, a1.high}, b_low[2] = {b0.low, b0.high};
    ptx::mma_m16n8k8_tf32(c, a_low, b_low);
    const uint32_t a_high[4] = {a2.low, a3.low, a2.high, a3.high}, b_high[2] = {b1.low, b1.high};
    ptx::mma_m16n8k8_tf32(c, a_high, b_high);
  }
};

// float32 operands as they are, multiplied by the ordinary units: each lane fetches the rows and columns
// of its four sums from the lanes that hold them.
struct Ieee {
  using Element = float;
  struct Pair {
    float low, high;
  };

  static __device__ __forceinline__ Pair pair(float low, float high) { return {low, high}; }

  static __device__ __forceinline__ void mma(float (&c)[4], const Pair& a0, const Pair& a1,
                                             const Pair& a2, const Pair& a3, const Pair& b0,
                                             const Pair& b1) {
    rank_8(c, a0, a1, b0);
    rank_8(c, a2, a3, b1);
  }

 private:
  static __device__ __forceinline__ void rank_8(float (&c)[4], const Pair& top, const Pair& bottom,
                                                const Pair& b) {
    const int lane = threadIdx.x % 32;
    const int row = lane & ~3, left = lane % 4 * 8, right = left + 4;
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {  // unrolled, all the fetched numbers would be in registers together
      rank_1(c, top.low, bottom.low, b.low, row + j, left + j, right + j);
      rank_1(c, top.high, bottom.high, b.high, row + j, left + j, right + j);
    }
  }

  static __device__ __forceinline__ void rank_1(float (&c)[4], float top, float bottom, float b,
                                                int row, int left, int right) {
    constexpr uint32_t kAll = 0xffffffffu;
    const float top_k = __shfl_sync(kAll, top, row), bottom_k = __shfl_sync(kAll, bottom, row);
    const float left_k = __shfl_sync(kAll, b, left), right_k = __shfl_sync(kAll, b, right);
    c[0] += top_k * left_k;
    c[1] += top_k * right_k;
    c[2] += bottom_k * left_k;
    c[3] += bottom_k * right_k;
  }
};

template <class N>
struct Tile {
  typename N::Pair m[4];
};

// A stored tile: every lane's pairs in the order they are loaded, 16 or 32 bytes a lane.
constexpr int kTileElements = 256;

template <class N>
__device__ __forceinline__ Tile<N> load_packed(const typename N::Element* tile) {
  constexpr int kWords = sizeof(Tile<N>) / 16;
  Tile<N> result;
  const uint4* words = reinterpret_cast<const uint4*>(tile) + threadIdx.x % 32 * kWords;
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(&result)[i] = words[i];
  return result;
}

// Rows [rows][kChannels] in shared memory, in chunks of 16 bytes that are swizzled so that neither 8
// neighbouring rows of one chunk nor the chunks of one row share a bank.
template <class N, int kChannels>
struct Rows {
  using Element = typename N::Element;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kChunks = kChannels / kPerChunk;
  static constexpr int kPerLine = kChunks < 8 ? 8 / kChunks : 1;  // rows in the 128 bytes of all banks
  static_assert((kChunks & (kChunks - 1)) == 0, "rows of a power of two chunks");

  Element* data;

  __device__ __forceinline__ Element* chunk(unsigned row, unsigned chunk) const {
    const unsigned mixed = chunk ^ (row / kPerLine % (kChunks < 8 ? kChunks : 8));
    return data + (row * kChunks + mixed) * kPerChunk;
  }
  __device__ __forceinline__ Element* element(unsigned row, unsigned channel) const {
    return chunk(row, channel / kPerChunk) + channel % kPerChunk;
  }
};

// A 16x16 tile of Rows, rows row(0) .. row(15), channels channel .. channel + 15, as an operand of a product
// whose inner dimension k runs along the channels or along the rows. Its four pairs come in the order in
// which `multiply` takes them: registers of one instruction must be neighbours, and every other order
// would be mended by copies.
enum class Along { kChannels, kRows };

template <class N, Along kInner, bool kRowsFirst, int kChannels, class Row>
__device__ __forceinline__ Tile<N> load_rows(const Rows<N, kChannels>& rows, const Row& row,
                                             int channel) {
  const int lane = threadIdx.x % 32;
  Tile<N> tile;
  if constexpr (sizeof(typename N::Element) == 2) {
    const int low = lane / 8 % 2, high = lane / 16;  // of the number of the matrix a lane addresses
    const int r = lane % 8 + 8 * (kRowsFirst ? low : high);
    const auto* address = rows.chunk(row(r), channel / 8 + (kRowsFirst ? high : low));
    if constexpr (kInner == Along::kRows) {
      ptx::ldmatrix_x4_trans(tile.m, address);
    } else {
      ptx::ldmatrix_x4(tile.m, address);
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kInner == Along::kRows) {
        const int low = row(2 * t + 8 * i), high = row(2 * t + 8 * i + 1);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          tile.m[kRowsFirst ? i + 2 * c : c + 2 * i] =
              N::pair(*rows.element(low, channel + g + 8 * c), *rows.element(high, channel + g + 8 * c));
        }
      } else {
        const int r = row(g + 8 * i);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const auto* pair = reinterpret_cast<const float2*>(rows.element(r, channel + 2 * t + 8 * c));
          tile.m[kRowsFirst ? i + 2 * c : c + 2 * i] = N::pair(pair->x, pair->y);
        }
      }
    }
  }
  return tile;
}

// m[i]: half i % 2 of the operand's rows, half i / 2 of k.
template <class N, Along kInner, int kChannels, class Row>
__device__ __forceinline__ Tile<N> load_left(const Rows<N, kChannels>& rows, const Row& row,
                                             int channel) {
  return load_rows<N, kInner, kInner == Along::kChannels>(rows, row, channel);
}

// m[i]: half i % 2 of k, half i / 2 of the operand's columns.
template <class N, Along kInner, int kChannels, class Row>
__device__ __forceinline__ Tile<N> load_right(const Rows<N, kChannels>& rows, const Row& row,
                                              int channel) {
  return load_rows<N, kInner, kInner == Along::kRows>(rows, row, channel);
}

// c [2][16, 8] += left [16, k] right [k, 16], the two products side by side.
template <class N>
__device__ __forceinline__ void multiply(float (&c)[2][4], const Tile<N>& left,
                                         const Tile<N>& right) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    N::mma(c[n], left.m[0], left.m[1], left.m[2], left.m[3], right.m[2 * n], right.m[2 * n + 1]);
  }
}

// Two products side by side [16, 16], rounded to the operands' format: a left operand, k along columns.
template <class N>
__device__ __forceinline__ Tile<N> chain(const float (&c)[2][4]) {
  return {{N::pair(c[0][0], c[0][1]), N::pair(c[0][2], c[0][3]), N::pair(c[1][0], c[1][1]),
           N::pair(c[1][2], c[1][3])}};
}

// Row and column, in the [16, 16] of two products side by side, of this lane's c[n][i].
__device__ __forceinline__ int product_row(int i) {
  return threadIdx.x % 32 / 4 + 8 * (i / 2);
}
__device__ __forceinline__ int product_column(int n, int i) {
  return 8 * n + threadIdx.x % 4 * 2 + i % 2;
}

}  // namespace hyperconv
