// The twins of the leaf functions of csrc/ptx.cuh: same names, same parameters, and what the PTX ISA
// says of their instructions. The last two parameters say where the call was: lanes at different calls
// do not take part in the same collective.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#define HYPERCONV_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace hyperconv::ptx {

inline unsigned char* dynamic_shared() { return hyperconv_host::dynamic_shared(); }

inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, HYPERCONV_CALLER) {
  hyperconv_host::ldmatrix(false, d, row, {file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, HYPERCONV_CALLER) {
  hyperconv_host::ldmatrix(true, d, row, {file, line});
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HYPERCONV_CALLER) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  using hyperconv_host::Format;
  hyperconv_host::mma(kHalf ? Format::kHalf : Format::kBfloat16, c, a, b, {file, line});
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             HYPERCONV_CALLER) {
  hyperconv_host::mma(hyperconv_host::Format::kTf32, c, a, b, {file, line});
}

// Adding half of the last place that stays carries into it for a tie, too: away from zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = hyperconv_host::bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void cp_async_16(void* shared, const void* global, bool inside, HYPERCONV_CALLER) {
  hyperconv_host::copy_async(shared, global, inside, {file, line});
}
inline void cp_async_commit() {}  // waiting for all groups is waiting for all copies
inline void cp_async_wait_all() { hyperconv_host::wait_for_copies(); }

template <typename T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<T, float>);
    return value;
  }
}

inline float to_float(float value) { return value; }
inline float to_float(__half value) { return __half2float(value); }
inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

}  // namespace hyperconv::ptx

#undef HYPERCONV_CALLER
