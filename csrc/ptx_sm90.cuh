// Leaf instructions of compute capability 9.0a; tests/host/host_ptx_sm90.h has a twin for each. Layouts and
// rules are those of the PTX ISA, sections "Asynchronous warpgroup level matrix instructions", "mbarrier" and
// "Tensors". Addresses are those of the shared window: they are compared, masked and put into descriptors.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace hyperconv::ptx {

// What wgmma reads as its right operand [16, N], N the rows: 8x8 cores of 128 consecutive bytes (a row's eight
// numbers along k, then the next row; for Wgmma with `kTransposed` eight along N, then the next along k), no
// swizzle; `k_stride` bytes between the two cores along k, `n_stride` between those along N.
__device__ __forceinline__ uint64_t core_descriptor(uint32_t address, int k_stride, int n_stride = 128) {
  const uint64_t leading = k_stride >> 4, stride = n_stride >> 4;
  return (address & 0x3ffff) >> 4 | leading << 16 | stride << 32;
}

// Where a row holds 64 numbers along N, 128 swizzled bytes, and the rows follow each other along k: as the copy
// engine brings 64 channels of neighbouring outputs, which are k. For Wgmma with `kTransposed`, N = 64,
// at a multiple of 1024.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  const uint64_t unused = 1, stride = 8 * 128 >> 4, by_128_bytes = 1;
  return (address & 0x3ffff) >> 4 | unused << 16 | stride << 32 | by_128_bytes << 62;
}

}  // namespace hyperconv::ptx

#ifdef HYPERCONV_HOST_RUNTIME
#include "host_ptx_sm90.h"
#else

#include "wgmma.cuh"

namespace hyperconv::ptx {

// Barriers: `count` arrivals, and the bytes that expect() announces, complete a phase.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// One arrival, after which `bytes` more have to land.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete; that before the first one, of parity 1, is.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Until kThreads threads, whole warps, have come to barrier `id`, 1 to 15; 0 is that of __syncthreads().
template <int kThreads>
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// This thread's ordinary writes to shared memory, before what the copy engine, or a wgmma, does after a
// barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes` (a multiple of 16, as both addresses are) to shared memory; they count for `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}
// The map's box at channel, width, height and image; zeros outside the tensor. All its bytes count.
__device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap* map, int c, int w, int h,
                                            int n, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared),
      "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(barrier)
      : "memory");
}
// From shared memory into the tensor; what lies outside is dropped.
__device__ __forceinline__ void tensor_store(uint32_t shared, const CUtensorMap* map, int c, int w, int h,
                                             int n) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(
                   shared),
               "l"(map), "r"(c), "r"(w), "r"(h), "r"(n)
               : "memory");
}
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the stores that this thread committed have read shared memory.
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until they have written, too.
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}
// Four 8x8 matrices: lane l passes the address of row l % 8 of matrix l / 8; s[m]: (row g, columns 2t, 2t + 1).
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(s[0]),
               "r"(s[1]), "r"(s[2]), "r"(s[3])
               : "memory");
}
// The same of the matrices transposed: the row has what lanes hold of column l % 8.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(s[0]),
               "r"(s[1]), "r"(s[2]), "r"(s[3])
               : "memory");
}
// An 8x8 matrix of which this lane has (row g, columns 2t, 2t + 1), transposed.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Registers that this thread's warpgroup gives up, or waits for.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first wgmma after any other access to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kPending groups are done. Their results may be read after keep().
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// `value`, of which the compiler knows nothing: what is worked out from it, it works out again at every call rather
// than keep it in registers.
__device__ __forceinline__ uint64_t unknown(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
// Lest the compiler move a use of these registers to before the wait that precedes this call.
template <int kCount>
__device__ __forceinline__ void keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace hyperconv::ptx

#endif
