// float16 as CUDA has it: two bytes, and conversions that round to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

namespace hyperconv_host {
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
}  // namespace hyperconv_host

inline float __half2float(__half value) {
  constexpr uint32_t kExponent = 31u << 23;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = magnitude & kExponent;
  // The exponent's bias is 127 instead of 15, and all ones are inf and NaN.
  const uint32_t normal = magnitude + ((exponent == kExponent ? 224u : 112u) << 23);
  const float subnormal = static_cast<float>(value.bits & 0x3ff) * 0x1p-24f;
  const uint32_t bits = exponent == 0 ? hyperconv_host::bits_of(subnormal) : normal;
  return hyperconv_host::float_of(bits | (value.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = hyperconv_host::bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return {0x7fff};  // CUDA's NaN
  uint32_t rounded;
  if (magnitude >= 0x47800000u) {  // 65536
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // 2^-14: multiples of 2^-24, as floats near 0.5 are
    rounded = hyperconv_host::bits_of(hyperconv_host::float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
