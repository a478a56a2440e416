// A number for the contents of memory, by which a change of it is noticed.
#pragma once
#include <cstdint>
#include <cstring>

namespace hyperconv {
namespace {

// Enough that several vectors of them are on their way at once: a multiplication takes up to 15 clocks.
constexpr int kChains = 32;

// One to one in either argument, so that a change of one word is never lost; the rotation carries it from
// the high bits to the low ones.
inline uint64_t mixed(uint64_t chain, uint64_t word) {
  chain = (chain ^ word) * 0x9E3779B97F4A7C15;
  return chain << 29 | chain >> 35;
}

// Differs, but for a chance of 2^-64, where a byte of any of these blocks or the size of one does.
uint64_t digest(const void* const* blocks, const int64_t* bytes, int32_t count) {
  uint64_t chains[kChains], words[kChains];
  constexpr int64_t kStride = sizeof(words);
  for (int i = 0; i < kChains; ++i) chains[i] = i;
  for (int32_t b = 0; b < count; ++b) {
    const char* data = static_cast<const char*>(blocks[b]);
    int64_t left = bytes[b];
    chains[0] = mixed(chains[0], left);
    for (; left >= kStride; data += kStride, left -= kStride) {
      std::memcpy(words, data, kStride);
      for (int i = 0; i < kChains; ++i) chains[i] = mixed(chains[i], words[i]);
    }
    if (left) {
      std::memset(words, 0, kStride);
      std::memcpy(words, data, left);
      for (int i = 0; i < kChains; ++i) chains[i] = mixed(chains[i], words[i]);
    }
  }
  uint64_t digest = 0;
  for (uint64_t chain : chains) digest = mixed(digest, chain);
  return digest;
}

}  // namespace
}  // namespace hyperconv
