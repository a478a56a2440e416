// wgmma.mma_async with its left operand in registers. Inline assembly names every register of a product: the
// lists of a width are those of the one before and eight columns after eight more.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace hyperconv::ptx {

#define HYPERCONV_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HYPERCONV_NAMES_48 HYPERCONV_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define HYPERCONV_NAMES_64 HYPERCONV_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HYPERCONV_NAMES_80 HYPERCONV_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HYPERCONV_NAMES_128                                                      \
  HYPERCONV_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define HYPERCONV_SUMS_8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),          \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HYPERCONV_SUMS_32 HYPERCONV_SUMS_8(0), HYPERCONV_SUMS_8(8)
#define HYPERCONV_SUMS_48 HYPERCONV_SUMS_32, HYPERCONV_SUMS_8(16)
#define HYPERCONV_SUMS_64 HYPERCONV_SUMS_48, HYPERCONV_SUMS_8(24)
#define HYPERCONV_SUMS_80 HYPERCONV_SUMS_64, HYPERCONV_SUMS_8(32)
#define HYPERCONV_SUMS_128 HYPERCONV_SUMS_80, HYPERCONV_SUMS_8(40), HYPERCONV_SUMS_8(48), HYPERCONV_SUMS_8(56)

// The operands after the sums have the numbers width / 2 and up.
#define HYPERCONV_WGMMA(width, number, a0, a1, a2, a3, right, add, transposed)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\n"                                        \
               "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." number "." number                   \
               " {" HYPERCONV_NAMES_##width "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #right      \
               ", p, 1, 1, %" #transposed ";\n}"                                                         \
               : HYPERCONV_SUMS_##width                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),  \
                 "n"(kTransposed))
#define HYPERCONV_WGMMA_OF(width, ...)             \
  if constexpr (std::is_same_v<T, __half>) {       \
    HYPERCONV_WGMMA(width, "f16", __VA_ARGS__);    \
  } else {                                         \
    HYPERCONV_WGMMA(width, "bf16", __VA_ARGS__);   \
  }

// This warpgroup's d [64, kWidth] (+)= a [64, 16] b [16, kWidth], accumulated in float32; T is __half or
// __nv_bfloat16, b in shared memory: by core_descriptor(), or with `kTransposed` by swizzled_descriptor(), too. Warp
// w of the four has rows 16 w to 16 w + 15: a as in mma_m16n8k16; d[4 i] to d[4 i + 3] are columns 8 i to 8 i + 7,
// as the c of that one.
template <typename T, int kWidth, int kTransposed = 0>
struct Wgmma {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kWidth == 32 || kWidth == 48 || kWidth == 64 || kWidth == 80 || kWidth == 128);

  static __device__ __forceinline__ void multiply(float (&d)[kWidth / 2], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    if constexpr (kWidth == 32) {
      HYPERCONV_WGMMA_OF(32, 16, 17, 18, 19, 20, 21, 22)
    } else if constexpr (kWidth == 48) {
      HYPERCONV_WGMMA_OF(48, 24, 25, 26, 27, 28, 29, 30)
    } else if constexpr (kWidth == 64) {
      HYPERCONV_WGMMA_OF(64, 32, 33, 34, 35, 36, 37, 38)
    } else if constexpr (kWidth == 80) {
      HYPERCONV_WGMMA_OF(80, 40, 41, 42, 43, 44, 45, 46)
    } else {
      HYPERCONV_WGMMA_OF(128, 64, 65, 66, 67, 68, 69, 70)
    }
  }
};

#undef HYPERCONV_WGMMA_OF
#undef HYPERCONV_WGMMA
#undef HYPERCONV_SUMS_128
#undef HYPERCONV_SUMS_80
#undef HYPERCONV_SUMS_64
#undef HYPERCONV_SUMS_48
#undef HYPERCONV_SUMS_32
#undef HYPERCONV_SUMS_8
#undef HYPERCONV_NAMES_128
#undef HYPERCONV_NAMES_80
#undef HYPERCONV_NAMES_64
#undef HYPERCONV_NAMES_48
#undef HYPERCONV_NAMES_32

}  // namespace hyperconv::ptx
