// The twins of the leaf functions of csrc/ptx_sm90.cuh and csrc/wgmma.cuh, as host_ptx.h has those of ptx.cuh.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "asynchronous.h"
#include "runtime.h"

#define HYPERCONV_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace hyperconv::ptx {

inline uint32_t shared_address(const void* pointer) { return hyperconv_host::shared_address(pointer); }

inline void mbarrier_init(uint32_t barrier, int count, HYPERCONV_CALLER) {
  hyperconv_host::mbarrier_init(barrier, count, {file, line});
}
inline void mbarrier_expect(uint32_t barrier, int bytes, HYPERCONV_CALLER) {
  hyperconv_host::mbarrier_arrive(barrier, bytes, {file, line});
}
inline void mbarrier_arrive(uint32_t barrier, HYPERCONV_CALLER) {
  hyperconv_host::mbarrier_arrive(barrier, 0, {file, line});
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, HYPERCONV_CALLER) {
  hyperconv_host::mbarrier_wait(barrier, parity, {file, line});
}
template <int kThreads>
void named_barrier(int id, HYPERCONV_CALLER) {
  hyperconv_host::named_barrier(id, kThreads, {file, line});
}
inline void fence_proxy_async(HYPERCONV_CALLER) { hyperconv_host::fence_proxy_async({file, line}); }

inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier,
                      HYPERCONV_CALLER) {
  hyperconv_host::bulk_load(shared, global, bytes, barrier, {file, line});
}
inline void tensor_load(uint32_t shared, const CUtensorMap* map, int c, int w, int h, int n,
                        uint32_t barrier, HYPERCONV_CALLER) {
  hyperconv_host::tensor_load(shared, *map, {c, w, h, n}, barrier, {file, line});
}
inline void tensor_store(uint32_t shared, const CUtensorMap* map, int c, int w, int h, int n,
                         HYPERCONV_CALLER) {
  hyperconv_host::tensor_store(shared, *map, {c, w, h, n}, {file, line});
}
inline void store_commit(HYPERCONV_CALLER) { hyperconv_host::store_commit({file, line}); }
inline void store_wait_read(HYPERCONV_CALLER) { hyperconv_host::store_wait(true, {file, line}); }
inline void store_wait(HYPERCONV_CALLER) { hyperconv_host::store_wait(false, {file, line}); }

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t row, HYPERCONV_CALLER) {
  hyperconv_host::ldmatrix(false, d, hyperconv_host::shared_pointer(row), {file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row, HYPERCONV_CALLER) {
  hyperconv_host::ldmatrix(true, d, hyperconv_host::shared_pointer(row), {file, line});
}
inline void stmatrix_x4(uint32_t row, const uint32_t (&s)[4], HYPERCONV_CALLER) {
  hyperconv_host::stmatrix(false, hyperconv_host::shared_pointer(row), s, {file, line});
}
inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&s)[4], HYPERCONV_CALLER) {
  hyperconv_host::stmatrix(true, hyperconv_host::shared_pointer(row), s, {file, line});
}
inline uint32_t movmatrix_trans(uint32_t pair, HYPERCONV_CALLER) {
  return hyperconv_host::movmatrix(pair, {file, line});
}

template <int kCount>
void fewer_registers(HYPERCONV_CALLER) {
  hyperconv_host::set_registers(false, kCount, {file, line});
}
template <int kCount>
void more_registers(HYPERCONV_CALLER) {
  hyperconv_host::set_registers(true, kCount, {file, line});
}

inline void wgmma_fence(HYPERCONV_CALLER) { hyperconv_host::wgmma_fence({file, line}); }
inline void wgmma_commit(HYPERCONV_CALLER) { hyperconv_host::wgmma_commit({file, line}); }
template <int kPending>
void wgmma_wait(HYPERCONV_CALLER) {
  hyperconv_host::wgmma_wait(kPending, {file, line});
}
inline uint64_t unknown(uint64_t value) { return value; }
template <int kCount>
void keep(float (&)[kCount]) {}

template <typename T, int kWidth, int kTransposed = 0>
struct Wgmma {
  static void multiply(float (&d)[kWidth / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                       HYPERCONV_CALLER) {
    using hyperconv_host::Format;
    constexpr Format kFormat = std::is_same_v<T, __half> ? Format::kHalf : Format::kBfloat16;
    hyperconv_host::wgmma(kFormat, kWidth, kTransposed != 0, d, a, b, accumulate, {file, line});
  }
};

}  // namespace hyperconv::ptx

#undef HYPERCONV_CALLER
