// wgmma.mma_async with its left operand in registers. Inline assembly names every register, so that there is
// one function for each width.
#pragma once

#include "ptx.cuh"

namespace hyperconv::ptx {

// This warpgroup's d [64, kWidth] (+)= a [64, 16] b [16, kWidth], accumulated in float32; T is __half or
// __nv_bfloat16, b in shared memory. Warp w of the four has rows 16 w to 16 w + 15: a as in mma_m16n8k16;
// d[4 i] to d[4 i + 3] are columns 8 i to 8 i + 7, as the c of that one.
template <typename T, int kWidth>
struct Wgmma;

#define HYPERCONV_WGMMA_64(number)                                                                       \
  asm volatile(                                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." number "." number " {"                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "            \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                  \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                                     \
      :                                                                                                  \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),  \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),         \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),       \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),       \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

template <>
struct Wgmma<__half, 64> {
  static __device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_64("f16");
  }
};

template <>
struct Wgmma<__nv_bfloat16, 64> {
  static __device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_64("bf16");
  }
};
#undef HYPERCONV_WGMMA_64

#define HYPERCONV_WGMMA_80(number)                                                                       \
  asm volatile(                                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %45, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n80k16.f32." number "." number " {"                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "            \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "            \
      "%36, %37, %38, %39"                                                                               \
      "}, {%40, %41, %42, %43}, %44, p, 1, 1, 0;\n}"                                                     \
      :                                                                                                  \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),  \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),         \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),       \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),       \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),       \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

template <>
struct Wgmma<__half, 80> {
  static __device__ __forceinline__ void multiply(float (&d)[40], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_80("f16");
  }
};

template <>
struct Wgmma<__nv_bfloat16, 80> {
  static __device__ __forceinline__ void multiply(float (&d)[40], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_80("bf16");
  }
};
#undef HYPERCONV_WGMMA_80

#define HYPERCONV_WGMMA_128(number)                                                                      \
  asm volatile(                                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." number "." number " {"                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "            \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "            \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "            \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                            \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"                                                     \
      :                                                                                                  \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),  \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),         \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),       \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),       \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),       \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),       \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),       \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),       \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

template <>
struct Wgmma<__half, 128> {
  static __device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_128("f16");
  }
};

template <>
struct Wgmma<__nv_bfloat16, 128> {
  static __device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate) {
    HYPERCONV_WGMMA_128("bf16");
  }
};
#undef HYPERCONV_WGMMA_128

}  // namespace hyperconv::ptx
